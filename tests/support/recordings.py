"""Comparison of two recordings, tensor by tensor or by their scores."""

from __future__ import annotations

import torch
from same_graph import assert_within

from ifr_fast import Recording, Tracer
from ifr_fast.recording.recording import _tensors

tensors = _tensors  # by their names in a file


def assert_same_bits(mine: Recording, theirs: Recording) -> None:
    left, right = tensors(mine), tensors(theirs)
    assert left.keys() == right.keys()
    for name, x in left.items():
        assert x.dtype == right[name].dtype, name
        assert torch.equal(x, right[name]), name
    for one, other in zip(mine.layers, theirs.layers, strict=True):
        for name in ("scale", "window", "softcap"):
            assert getattr(one, name) == getattr(other, name)
    assert mine.tokens == theirs.tokens
    assert (mine.mode, mine.position) == (theirs.mode, theirs.position)


def assert_same_scores(tracer: Tracer, mine: Recording, theirs: Recording, atol: float) -> None:
    both = zip(
        tracer.contributions(mine, keep=0.0), tracer.contributions(theirs, keep=0.0), strict=True
    )
    for left, right in both:
        for name in ("residual", "ffn", "head_total"):
            assert_within(getattr(left, name), getattr(right, name), atol)
