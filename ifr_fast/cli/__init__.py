"""The `ifr-fast` command: one module per subcommand, registered in main.py."""

from .main import app, main

__all__ = ["app", "main"]
