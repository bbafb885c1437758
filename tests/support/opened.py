"""Tiny models that are opened once for all tests."""

from __future__ import annotations

from functools import cache

import torch
from tiny import tiny_model

from ifr_fast import Tracer


@cache
def tiny_tracer(family: str, dtype: torch.dtype = torch.float32) -> Tracer:
    """A Tracer of a tiny model, for tests that do not change the model."""
    return Tracer(tiny_model(family, dtype=dtype).eval())
