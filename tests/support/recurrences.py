"""Weights of linear attention: a model's own recurrence, run step by step on the unit vectors.

Nothing here goes through ifr_fast. o_t is a sum over j of M[t, j] v_j, with a number M[t, j] for
each head, whatever v is. So with the T unit vectors as values, head by head, o is M.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# The function that a forward pass calls, and the one that computes it step by step.
STEP_BY_STEP = {"torch_chunk_gated_delta_rule": "torch_recurrent_gated_delta_rule"}
Attend = Callable[[Tensor, Tensor], Tensor]  # of M [1, H, T, T] and v [1, H, T, V]


def _gated_delta(own: Callable[..., Any], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    v = given["value"]
    (_, T, H, _), options = v.shape, given | {"output_final_state": False}
    options.pop("chunk_size", None)
    eye = torch.eye(T, dtype=v.dtype)[None, :, None].expand(1, T, H, T)
    weights, _ = own(**{**options, "value": eye})
    return weights.permute(0, 2, 1, 3), v.transpose(1, 2)


_WEIGHTS = {"torch_chunk_gated_delta_rule": _gated_delta}


@contextmanager
def by_weights(model: nn.Module, attend: Attend) -> Iterator[None]:
    """Within, every recurrence of the model is computed by `attend` from its weights."""
    changed = []
    for file in {type(module).__module__ for module in model.modules()}:
        names = vars(sys.modules[file])
        for name in STEP_BY_STEP.keys() & names.keys():
            changed.append((names, name, names[name]))
            names[name] = _weighted(names[name], name, names[STEP_BY_STEP[name]], attend)
    try:
        yield
    finally:
        for names, name, own in changed:
            names[name] = own


def _weighted(own: Callable[..., Any], name: str, steps: Any, attend: Attend) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        bound = inspect.signature(own).bind(*args, **kwargs).arguments
        given = {**bound, **bound.pop("kwargs", {})}
        return attend(*_WEIGHTS[name](steps, given)).transpose(1, 2), None

    return called
