"""Two models that are explained alike."""

from __future__ import annotations

from oracle import TOLERANCE
from same_graph import assert_same_graph, assert_within
from tiny import WINDOW, tiny_text

from ifr_fast import Tracer

TEXT = tiny_text(WINDOW + 6)


def assert_same_scores(mine: Tracer, theirs: Tracer, tolerance: float = TOLERANCE) -> None:
    """Both models' importances agree, in both recording modes."""
    for mode in ("full", "lean"):
        for x, y in zip(
            mine.contributions(mine.record(TEXT, mode=mode), keep=0.0),
            theirs.contributions(theirs.record(TEXT, mode=mode), keep=0.0),
            strict=True,
        ):
            for field in ("residual", "ffn", "head_total"):
                assert_within(getattr(x, field), getattr(y, field), tolerance)


def assert_generates_same(mine: Tracer, theirs: Tracer) -> None:
    """Both models generate the same tokens, by the same routes."""
    for a, b in zip(
        *(
            tracer.generate(TEXT, max_new_tokens=4, threshold=0.02, eos_token_id=[])
            for tracer in (mine, theirs)
        ),
        strict=True,
    ):
        assert a.token_id == b.token_id
        assert_same_graph(a.graph, b.graph, tolerance=TOLERANCE)
