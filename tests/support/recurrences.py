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
STEP_BY_STEP = {
    "torch_chunk_gated_delta_rule": "torch_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention": "recurrent_kimi_delta_attention",
    "mamba2_chunk_scan": "mamba2_selective_state_update",
}
# Of M [1, H, T, T], which it may not ask for, v [1, H, T, V] and the model's own output.
Attend = Callable[[Callable[[], Tensor], Tensor, Tensor], Tensor]


def _gated_delta(own: Callable[..., Any], given: dict[str, Any]) -> Tensor:
    v = given["value"]
    (_, T, H, _), options = v.shape, given | {"output_final_state": False}
    options.pop("chunk_size", None)
    options = {"initial_state": None} | options
    eye = torch.eye(T, dtype=v.dtype)[None, :, None].expand(1, T, H, T)
    weights, _ = own(**{**options, "value": eye})
    return weights.permute(0, 2, 1, 3)


def _state_space(own: Callable[..., Any], given: dict[str, Any]) -> Tensor:
    v, A, B = given["hidden_states"], given["A"], given["B"]
    (_, T, H, _), N, eye = v.shape, B.shape[-1], torch.eye(v.shape[1], dtype=v.dtype)
    dt = given["dt"] + given["dt_bias"]
    dt = torch.nn.functional.softplus(dt) if given["dt_softplus"] else dt
    dt = dt.clamp(*given["dt_limit"])
    state = torch.zeros(1, H, T, N, dtype=v.dtype)
    rows = []
    for t in range(T):
        out = own(
            state,
            eye[t].expand(1, H, T),
            dt[:, t, :, None].expand(1, H, T),
            A[:, None, None].expand(H, T, N),
            B[:, t],
            given["C"][:, t],
            given["D"][:, None].expand(H, T),
        )
        rows.append(out)
    return torch.stack(rows, 2)


# What computes the weights, and the argument that holds the values.
_WEIGHTS = {
    "torch_chunk_gated_delta_rule": (_gated_delta, "value"),
    "chunk_kimi_delta_attention": (_gated_delta, "value"),
    "mamba2_chunk_scan": (_state_space, "hidden_states"),
}


@contextmanager
def by_weights(model: nn.Module, attend: Attend) -> Iterator[None]:
    """Within, every recurrence of the model is computed by `attend` from its weights."""
    changed = []
    handles = [
        handle
        for module in model.modules()
        if hasattr(module, "slope_rate")
        for handle in _lightning(module, attend)
    ]
    for file in {type(module).__module__ for module in model.modules()}:
        names = vars(sys.modules[file])
        for name in STEP_BY_STEP.keys() & names.keys():
            changed.append((names, name, names[name]))
            names[name] = _weighted(names[name], name, names[STEP_BY_STEP[name]], attend)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for names, name, own in changed:
            names[name] = own


def _lightning(module: Any, attend: Attend) -> Iterator[Any]:
    """MiniMax's, which has no function of its own: the norm behind it reads its output."""
    made: list[Tensor] = []

    def change(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        heads = module.act_fn(made.pop()).unflatten(-1, (-1, 3, module.head_dim))[0]
        q, k, v = heads.permute(2, 1, 0, 3)[:, None]  # [1, H, T, d]
        t = torch.arange(x.shape[1])

        def weights() -> Tensor:
            decay = torch.exp(-module.slope_rate * (t[:, None] - t)).tril()
            return (q @ k.transpose(-1, -2)) * decay

        out = x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        return (attend(weights, v, out).transpose(1, 2).reshape(x.shape),)

    yield module.qkv_proj.register_forward_hook(lambda _, __, out: made.append(out))
    yield module.norm.register_forward_pre_hook(change)


def _weighted(own: Callable[..., Any], name: str, steps: Any, attend: Attend) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(own).bind(*args, **kwargs).arguments
        given = {**bound, **bound.pop("kwargs", {})}
        returned = own(*args, **kwargs)
        output = returned if isinstance(returned, Tensor) else returned[0]
        weights, v = _WEIGHTS[name]
        out = attend(
            lambda: weights(steps, given), given[v].transpose(1, 2), output.transpose(1, 2)
        )
        out = out.transpose(1, 2)
        return out if isinstance(returned, Tensor) else (out, None)

    return called
