"""Exports of a RouteGraph, to other formats and as pictures; modules are imported on demand."""
