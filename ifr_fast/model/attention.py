"""Attention as a model asks for it: one call, all rows or some of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from ..errors import UnsupportedArchitectureError
from ..kernels.contract import Pattern
from .masks import LazyMask

_BLOCK_ELEMENTS = 1 << 21  # limit on [H, R, S] when attention is computed in row blocks


class Recurrence(NamedTuple):
    """Linear attention, for B texts: what its weights are made of, and the model's own output."""

    parts: tuple[Tensor, ...]  # [B, T, ...], the fields of a kernel's recurrence
    kind: Callable[..., Pattern]  # makes the weights of the parts of one text
    z: Tensor  # [B, T, H, V]

    def of_text(self, b: int, n: int) -> Recurrence:
        """That of the first `n` positions of text `b` alone."""
        parts = tuple(x[b : b + 1, :n] for x in self.parts)
        return self._replace(parts=parts, z=self.z[b : b + 1, :n])

    def on(self, device: torch.device) -> Recurrence:
        """The same on a device."""
        return self._replace(parts=tuple(x.to(device) for x in self.parts), z=self.z.to(device))

    def pattern(self) -> Pattern:
        """The weights of the one text."""
        return self.kind(*(x[0] for x in self.parts))


class AttentionCall(NamedTuple):
    """The arguments with which an attention module calls its attention function."""

    module: nn.Module
    q: Tensor  # [B, H, T, K]
    k: Tensor  # [B, H_kv, S, K]
    v: Tensor  # [B, H_kv, S, V]
    mask: LazyMask
    scale: float
    softcap: float | None
    sinks: Tensor | None  # [H]
    alibi_slopes: Tensor | None = None  # [H]; slope * (j - t) is added to scores
    recurrence: Recurrence | None = None  # linear attention: K is 0, there is no softmax


AttentionHandler = Callable[[AttentionCall], Tensor]  # -> [B, T, H, V]


def attend(call: AttentionCall, window: int | None) -> Tensor:
    """The attention output [B, T, H, V], by torch's fused kernel wherever it applies.

    Raises UnsupportedArchitectureError where the mask is a tensor that is not causal or sliding.
    """
    if call.recurrence is not None:
        return call.recurrence.z
    if call.mask.given and not bool(call.mask.is_causal(call.q.shape[2], window)):
        raise UnsupportedArchitectureError(
            f"model: {type(call.module).__name__} chooses the keys that a row reads: at "
            f"{call.q.shape[2]} tokens, neither all past ones nor those of one sliding window"
        )
    plain = call.softcap is None and call.sinks is None and call.alibi_slopes is None
    if window is None and plain:
        return fused(call.q, call.k, call.v, call.scale, is_causal=True).transpose(1, 2)
    return attend_rows(call, call.q, torch.arange(call.q.shape[2]), window)


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, **options: Any) -> Tensor:
    """Attention [B, H, R, V] by torch's fused kernels; options: `attn_mask` or `is_causal`."""
    H, H_kv = q.shape[1], k.shape[1]
    attention = functools.partial(nn.functional.scaled_dot_product_attention, scale=scale)
    if H_kv != H and _by_group(q):
        group = H // H_kv
        of_group = []
        for i in range(H_kv):
            shared_k, shared_v = (x[:, i : i + 1].expand(-1, group, -1, -1) for x in (k, v))
            own = q[:, i * group : (i + 1) * group]
            of_group.append(attention(own, shared_k, shared_v, **options))
        return torch.cat(of_group, 1)
    return attention(q, k, v, enable_gqa=H_kv != H, **options)


def _by_group(q: Tensor) -> bool:
    """True if torch's one fused kernel for this dtype takes no grouped queries, so that it would
    hold all scores [B, H, R, S] instead.
    """
    return q.is_cuda and q.dtype == torch.float32


def may_sum(d_key: int, d_value: int) -> bool:
    """True if `attend_and_sum` may return sums at these widths. On GPUs
    scaled_dot_product_attention pads other widths before it calls the kernel.
    """
    return d_key == d_value and d_key % 8 == 0


def _sums_well(x: Tensor) -> bool:
    """False for half precision on CPUs, where torch's flash kernel rounds scores to it."""
    return not x.is_cpu or x.dtype in (torch.float32, torch.float64)


def attend_and_sum(call: AttentionCall, window: int | None) -> tuple[Tensor, Tensor | None]:
    """`attend`, and the scores' log-sum-exp [B, T, H] (natural log) where it costs nothing, else
    None. It comes from torch's flash kernel or cuDNN's, if torch would choose that here. It has no
    gradient.
    """
    q, k, v = call.q, call.k, call.v
    if call.recurrence is not None:
        return call.recurrence.z, None
    plain = call.softcap is None and call.sinks is None and call.alibi_slopes is None
    if window is None and plain and may_sum(q.shape[-1], v.shape[-1]) and _sums_well(q):
        choice = torch._fused_sdp_choice(
            q, k, v, None, 0.0, True, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        if choice == SDPBackend.FLASH_ATTENTION.value:
            if q.device.type == "cpu":
                flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            else:
                flash = torch.ops.aten._scaled_dot_product_flash_attention
            z, log_sum_exp, *_ = flash(q, k, v, 0.0, True, scale=call.scale)
            return z.transpose(1, 2), log_sum_exp.transpose(1, 2)
        if choice == SDPBackend.CUDNN_ATTENTION.value:
            cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
            z, log_sum_exp, *_ = cudnn(q, k, v, None, True, 0.0, True, scale=call.scale)
            # [B, H, T] or, by version, [B, H, T, 1]
            return z.transpose(1, 2), log_sum_exp.view(q.shape[:3]).transpose(1, 2)
    return attend(call, window), None


def attend_rows(call: AttentionCall, q: Tensor, rows: Tensor, window: int | None = None) -> Tensor:
    """The attention output [B, R, H, V] of queries `q` [B, H, R, K] at ascending positions `rows`
    [R], computed in row blocks with the model's own mask.

    window: the number of keys visible to a row, itself included; no others are read.
    """
    if call.recurrence is not None:
        return call.recurrence.z[:, rows.to(q.device)]
    heads, kv_heads = q.shape[1], call.k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    step = max(1, _BLOCK_ELEMENTS // (heads * call.k.shape[2]))
    out = []
    for i in range(0, len(rows), step):
        block = rows[i : i + step]
        begin = 0 if window is None else max(0, int(block[0]) - window + 1)
        keys = torch.arange(begin, int(block[-1]) + 1, device=q.device)
        k, v = (x[:, :, begin : int(block[-1]) + 1] for x in (call.k, call.v))
        block = block.to(q.device)
        if call.softcap is None and call.sinks is None and call.alibi_slopes is None:
            mask = call.mask.visible(block, keys)
            z = fused(q[:, :, i : i + step], k, v, call.scale, attn_mask=mask)
            out.append(z.transpose(1, 2))
            continue
        # Heads that share keys become more rows of one head, so keys are not repeated.
        grouped = q[:, :, i : i + step].reshape(len(q), kv_heads, -1, q.shape[-1])
        scores = (grouped @ k.transpose(-1, -2)).to(wide) * call.scale
        scores = scores.view(len(q), heads, len(block), len(keys))
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if call.alibi_slopes is not None:
            distance = (keys - block[:, None]).to(wide)
            scores = scores.addcmul(call.alibi_slopes.to(wide)[:, None, None], distance)
        scores = scores.masked_fill_(~call.mask.visible(block, keys), float("-inf"))
        if call.sinks is not None:
            sinks = call.sinks.to(wide)[:, None, None].expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        z = weights.reshape(len(q), kv_heads, -1, len(keys)).to(v.dtype) @ v
        out.append(z.view(len(q), heads, len(block), -1).transpose(1, 2))
    return torch.cat(out, dim=1)
