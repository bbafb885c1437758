"""Interfaces of other tools on this engine: change an import and keep the code."""
