"""Text and columns of the tokens in pictures of a graph."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..characters import Piece

if TYPE_CHECKING:
    from ..graph.data import GraphData

SHOW_ALL = 40  # longest text, in tokens, that is shown completely

_MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}


class Column(NamedTuple):
    """One token, or a gap of `last - first + 1` tokens that the graph does not reach."""

    first: int
    last: int
    gap: bool


def visible(token: str) -> str:
    """The token with marks for whitespace, and code points for invisible characters.

    The label of a piece of a character (characters.py) keeps its space.
    """
    if not token:
        return "∅"
    piece = Piece.read(token)
    if piece is not None:
        return str(piece._replace(text=visible(piece.text)))
    out: list[str] = []
    alone = True  # no visible character precedes, so an accent needs a carrier
    for char in token:
        category = unicodedata.category(char)
        hidden = char in _MARKS or category[0] in "CZ"
        if hidden:
            out.append(_MARKS.get(char, f"‹{ord(char):04X}›"))
        else:
            out.append("◌" + char if alone and category[0] == "M" else char)
        alone = hidden
    return "".join(out)


def columns(graph: GraphData) -> list[Column]:
    """Columns from left to right: all tokens, or in a long text those that the graph reaches."""
    T = len(graph.tokens)
    reached = torch.zeros(T, dtype=torch.bool)
    reached[list(graph.starts)] = True
    reached[graph.edges.target] = True
    reached[graph.edges.source] = True
    if T <= SHOW_ALL:
        reached[:] = True
    found: list[Column] = []
    for position, wide in enumerate(reached.tolist()):
        if wide or not found or not found[-1].gap:
            found.append(Column(position, position, not wide))
        else:
            found[-1] = found[-1]._replace(last=position)
    return found
