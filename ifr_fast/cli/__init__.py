"""The `ifr-fast` command: one module a subcommand, put together in main.py."""

from .main import app, main

__all__ = ["app", "main"]
