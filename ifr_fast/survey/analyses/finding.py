"""What an analysis gives: a statement, the table it rests on, and a figure of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Finding:
    """One analysis of a survey."""

    name: str  # of its files in a report
    title: str
    statement: str  # what the table says, in words; paragraphs end with a newline
    method: str  # how it was computed, and what it does not show
    table: pa.Table
    excerpt: pa.Table  # the rows of it that a reader wants first
    figure: Figure


class NotApplicableError(ValueError):
    """An analysis that this survey cannot carry: it lacks labels, corpora or documents."""
