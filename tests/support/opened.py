"""Tiny models that are opened once, and their oracles that are computed once, for all tests."""

from __future__ import annotations

import copy
from functools import cache

import torch
from oracle import LayerImportance, importances
from tiny import account, tiny_model, tiny_text

from ifr_fast import Tracer
from ifr_fast.scoring.implementations import load_kernel


def tiny_tracer(family: str, dtype: torch.dtype = torch.float32, impl: str = "auto") -> Tracer:
    """A Tracer of a tiny model, for tests that do not change the model."""
    return _opened(family, dtype, impl)


@cache
def _opened(family: str, dtype: torch.dtype, impl: str) -> Tracer:
    if impl == "auto":
        return Tracer(tiny_model(family, dtype=dtype).eval())
    tracer = copy.copy(_opened(family, dtype, "auto"))
    tracer.impl, tracer.kernel = impl, load_kernel(impl)
    return tracer


@cache
def tiny_importances(family: str, n_tokens: int, seed: int = 0) -> list[LayerImportance]:
    """The oracle of `tiny_text(n_tokens, seed)` in a tiny model, layer by layer."""
    layers = account(tiny_model(family), tiny_text(n_tokens, seed))
    return [importances(layer) for layer in layers]
