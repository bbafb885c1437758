"""A report on one task and one model, in a folder: tables, figures and text."""

from .results import Results, Settings
from .run import make_report

__all__ = ["Results", "Settings", "make_report"]
