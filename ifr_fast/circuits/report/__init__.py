"""A report on one task and one model: tables, figures and text in a folder."""

from .results import Results, Settings
from .run import make_report

__all__ = ["Results", "Settings", "make_report"]
