"""The result of an analysis: a statement, the table behind it, and a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Finding:
    """One analysis of a survey."""

    name: str  # name of its files in a report
    title: str
    statement: str  # the result in words; one paragraph per line
    method: str  # how it was computed, and its limits
    table: pa.Table
    excerpt: pa.Table  # its most important rows
    figure: Figure


class NotApplicableError(ValueError):
    """Raised if the survey lacks the labels, corpora or documents that an analysis needs."""
