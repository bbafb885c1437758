"""Faces of other tools on this engine: a file or a package a tool, imported by its name."""
