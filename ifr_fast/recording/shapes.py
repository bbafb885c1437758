"""The shapes, dtypes and ranges of a recording that was read from a file."""

from __future__ import annotations

import torch
from torch import Tensor

from .recording import Recording


def check_shapes(recording: Recording) -> None:
    """Raises ValueError, which names the tensor, where one has not the shape or the dtype that the
    model gives it, or names rows that the text lacks.
    """
    decoder, T = recording.decoder, len(recording.token_ids)
    D, C = decoder.d_model, len(recording.checked_rows)
    if len(recording.tokens) != T or not all(isinstance(x, str) for x in recording.tokens):
        raise ValueError(f"tokens: expected {T} strings")
    if type(recording.position) is not int or not 0 <= recording.position < T:
        raise ValueError(f"position: expected 0 to {T - 1}, got {recording.position!r}")
    _check("token_ids", recording.token_ids, torch.int64, T)
    _check("checked_rows", recording.checked_rows, torch.int64, C)
    rows = recording.checked_rows
    if C and not 0 <= int(rows.min()) <= int(rows.max()) < T:
        raise ValueError(f"checked_rows: expected 0 to {T - 1}, got up to {int(rows.max())}")
    _check("logits", recording.logits, None, decoder.vocab_size)
    _check("states", recording.states, None, T, recording.states.shape[-1])
    _check(f"resid.{decoder.n_layers}", recording.resid_final, None, T, D)
    for i, (layer, block) in enumerate(zip(recording.layers, decoder.blocks, strict=True)):
        H, V, _ = block.W_O.shape
        H_kv, K = layer.k.shape[-2:]
        if H % H_kv:
            raise ValueError(f"k.{i}: expected a number of heads that divides {H}, got {H_kv}")
        expected = {
            "resid": (layer.resid_pre, (T, D)),
            "k": (layer.k, (T, H_kv, K)),
            "v": (layer.v, (T, H_kv, V)),
            "q": (layer.q, (T, H, K)),
            "mid": (layer.resid_mid, (T, D)),
            "z": (layer.z, (T, H, V)),
            "log_sum_exp": (layer.log_sum_exp, (T, H)),
            "checked_mid": (layer.checked_mid, (C, D)),
            "alibi_slopes": (layer.alibi_slopes, (H,)),
        }
        for name, (x, shape) in expected.items():
            if x is not None:
                _check(f"{name}.{i}", x, None, *shape)
        if layer.window is not None and (type(layer.window) is not int or layer.window < 1):
            raise ValueError(f"windows: expected at least 1 or none, got {layer.window!r}")


def _check(name: str, x: Tensor, dtype: torch.dtype | None, *shape: int) -> None:
    """dtype: None is any floating one."""
    if tuple(x.shape) != shape or (x.dtype != dtype if dtype else not x.is_floating_point()):
        kind = str(dtype or "floats").removeprefix("torch.")
        got = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected {kind} {list(shape)}, got {got} {list(x.shape)}")
