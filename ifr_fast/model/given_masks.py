"""Masks that a model makes itself, from ours or without: tensors that say which keys a row reads,
and what they add to its scores.

A mask that hides what a causal or sliding mask hides is one; any other is a choice of keys, which
the checks at every text refuse. A bias that depends on the key alone is one more coordinate of the
keys, whose query is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import UnsupportedArchitectureError
from .attention import AttentionCall
from .masks import HIDDEN, LazyMask

_biased: WeakSet[nn.Module] = WeakSet()  # attention modules whose keys have more coordinates


def reads_tensor(function: Callable[..., Any]) -> bool:
    """True if a mask function holds a tensor, of one text, that it looks positions up in."""
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    for x in held:
        if isinstance(x, tuple | list):
            held.extend(x)
    return any(isinstance(x, Tensor) or (callable(x) and reads_tensor(x)) for x in held)


def chosen(mask: Tensor, indices: Tensor) -> Tensor:
    """`mask` [B, 1, T, S] without the keys that are not among the `indices` [B, T, *] of a row."""
    shape, S = indices.shape[:2], mask.shape[-1]
    among = torch.zeros(*shape, S + 1, dtype=torch.bool, device=indices.device)
    of_none = torch.where(indices < 0, S, indices).long()  # a negative index stands for no key
    among = among.scatter_(-1, of_none, True)[:, None, :, :S]
    if mask.dtype == torch.bool:
        return mask & among
    return mask.masked_fill(~among, torch.finfo(mask.dtype).min)


def with_own_mask(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Any
) -> AttentionCall:
    """The call with the mask function that its mask stands for, or that a tensor may be. rest: its
    arguments after the mask.
    """
    if isinstance(mask, LazyMask):
        return AttentionCall(module, q, k, v, mask.whole, *rest)
    T, S = q.shape[2], k.shape[2]
    if mask.ndim != 4 or mask.shape[2] != T or mask.shape[-1] < S:
        raise UnsupportedArchitectureError(
            f"model: {type(module).__name__} passes a mask of shape {tuple(mask.shape)} to its "
            f"attention function; at {T} rows and {S} keys it has to be [B, H, {T}, {S}]"
        )
    mask = mask[..., :S]
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    call = AttentionCall(module, q, k, v, LazyMask.of_tensor(seen), *rest)
    if mask.dtype == torch.bool or mask.is_meta:
        return call
    if module in _biased or bool((seen & (mask != 0)).any()):
        return _with_bias(call, mask, seen)
    return call


def _with_bias(call: AttentionCall, given: Tensor, seen: Tensor) -> AttentionCall:
    """The call with the bias [B, H, T, S] that is added to scores as a coordinate of its keys."""
    of_key = given.masked_fill(~seen, float("-inf")).amax(-2)
    same = ((given == of_key[..., None, :]) | ~seen).all()
    H_kv, groups = call.k.shape[1], of_key.unflatten(1, (-1, 1))
    if of_key.shape[1] > H_kv:
        groups = of_key.unflatten(1, (H_kv, -1))
    same &= (groups == groups[:, :, :1]).all()
    if not bool(same) or call.softcap is not None:
        raise UnsupportedArchitectureError(
            f"model: {type(call.module).__name__} adds to its scores a bias that is not one number "
            "for each key, so its weights are not those of queries and keys"
        )
    _biased.add(call.module)
    wide = torch.promote_types(call.k.dtype, torch.float32)
    added = groups[:, :, 0].nan_to_num(neginf=0.0).to(wide) / call.scale
    added = added.expand(len(call.k), H_kv, -1)
    high = added.to(call.k.dtype)
    # Half precision takes a second coordinate for what rounding leaves of the first.
    columns = torch.stack([high, (added - high.to(wide)).to(call.k.dtype)], dim=-1)
    ones = call.q.new_ones(*call.q.shape[:-1], 2)
    return call._replace(
        q=torch.cat([call.q, ones], dim=-1), k=torch.cat([call.k, columns], dim=-1)
    )
