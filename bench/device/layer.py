"""One layer with random inputs, in which as many pairs need a correction as in real models."""

from __future__ import annotations

from typing import NamedTuple

import torch
from gpu_model.shapes import Model
from torch import Tensor

from ifr_fast.kernels.contract import LayerInputs

SCORE_STD = 3.0  # of attention scores, as in ../counts.py
# Attention's share of the residual stream. At this one a row of Llama-3-8B's shape at T = 8,192
# has about 100 heavy pairs (the estimate "mid" of ../roofline.py: 88) and some thousand light ones.
SHARE = 0.2
ELEMENTS = 1 << 27  # of scores held at once


class Attended(NamedTuple):
    """The attention of some rows."""

    z: Tensor  # [R, H, V] float32
    log_sum_exp: Tensor  # [R, H] float32, natural log


def random_layer(
    model: Model,
    n_tokens: int,
    n_rows: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    share: float = SHARE,
    seed: int = 0,
) -> LayerInputs:
    """The last rows of a text, with log-sum-exps. Scores have the deviation SCORE_STD, values and
    the stream 1, and W_O is such that attention has its share of y.
    """
    generator = torch.Generator(device).manual_seed(seed)
    D, H, H_kv, K, V = model.D, model.H, model.H_kv, model.K, model.V

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        x = torch.empty(shape, dtype=torch.float32, device=device).normal_(generator=generator)
        return (std * x).to(dtype)

    rows = torch.arange(n_tokens - n_rows, n_tokens)
    q, k = normal(n_rows, H, K, std=SCORE_STD**0.5), normal(n_tokens, H_kv, K, std=SCORE_STD**0.5)
    v, resid_pre = normal(n_tokens, H_kv, V), normal(n_rows, D)
    attended = attend(q, k, v, rows, K**-0.5)
    W_O = normal(H, V, D)
    z = attended.z.to(dtype).flatten(1)
    moved = (z @ W_O.flatten(0, 1)).float().square().mean().sqrt()
    W_O *= float(share / (1 - share**2) ** 0.5 / moved)
    y = resid_pre + z @ W_O.flatten(0, 1)
    W_O = W_O.transpose(1, 2).contiguous().transpose(1, 2)  # as opened models have it
    sums = attended.log_sum_exp
    return LayerInputs(rows, resid_pre, y, q, k, v, W_O, K**-0.5, log_sum_exp=sums)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float) -> Attended:
    """Plain causal attention in float32, a head and a block of rows at a time."""
    (R, H, _), S, group = q.shape, len(k), q.shape[1] // k.shape[1]
    z = q.new_empty(R, H, v.shape[-1], dtype=torch.float32)
    sums = q.new_empty(R, H, dtype=torch.float32)
    keys = torch.arange(S, device=q.device)
    step = max(1, ELEMENTS // S)
    for h in range(H):
        k_h, v_h = k[:, h // group].float(), v[:, h // group].float()
        for start in range(0, R, step):
            of = slice(start, start + step)
            scores = (q[of, h].float() @ k_h.T).mul_(scale)
            scores.masked_fill_(keys > rows[of].to(q.device)[:, None], -torch.inf)
            sums[of, h] = scores.logsumexp(-1)
            z[of, h] = scores.softmax(-1) @ v_h
    return Attended(z, sums)


def some_rows(inputs: LayerInputs, chosen: Tensor) -> LayerInputs:
    """Some of the rows, by index; all keys stay."""
    at = chosen.to(inputs.q.device)
    cut = {name: getattr(inputs, name)[at] for name in ("resid_pre", "y", "q")}
    sums = None if inputs.log_sum_exp is None else inputs.log_sum_exp[at]
    return inputs._replace(**cut, rows=inputs.rows[chosen], log_sum_exp=sums)
