"""The published tool's functions of importance, on tensors.

The score of a part p of a whole y is how much nearer y is to p than to 0, ‖y‖ − ‖y − p‖, clipped
from below. Contributions are scores divided by their sum (paper section 2.2). `parity` chooses the
arithmetic (docs/compat-llm-transparency-tool.md lists the differences):

- False, this project's: scores are clipped at 0, and if all are 0, each of n parts gets 1 / n.
- True, the tool's: EPSILON is subtracted from every coordinate of y before ‖y − p‖ is taken, scores
  are clipped at FLOOR, and thresholding keeps the tool's sums and its 0 / 0.

Scores are summed in float64, from differences in the tensors' own precision, at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decomposition import DecomposedAttention

EPSILON = 1e-6  # the value in torch's pairwise_distance
FLOOR = 1e-5


def offset(y: Tensor) -> Tensor:
    """‖y‖₁ − ‖y − EPSILON‖₁ of y [..., D], in float64.

    Parity adds it to the score of every part of y − EPSILON.
    """
    half = EPSILON / 2
    return 2 * (y - half).clamp_(-half, half).sum(-1).double()


@torch.no_grad()
def get_contributions(
    parts: Tensor, whole: Tensor, distance_norm: int = 1, *, parity: bool = False
) -> Tensor:
    """Contributions of parts to a whole.

    parts [p_1 ... p_k, v_1 ... v_n, D]: the p are the parts of each v; whole [v_1 ... v_n, D].
    Returns [p_1 ... p_k, v_1 ... v_n], in the dtype of `parts`; those of each v sum to 1.

    Raises ValueError if the shapes do not match.
    """
    k = parts.ndim - whole.ndim
    if k < 0 or parts.shape[k:] != whole.shape:
        raise ValueError(
            f"whole: expected the last dimensions of parts {list(parts.shape)}, "
            f"got {list(whole.shape)}"
        )
    scores = _scores(parts, whole, distance_norm, parity)
    return _shares(scores, _sum(scores, 0, k, parity)).to(parts.dtype)


@torch.no_grad()
def get_contributions_with_one_off_part(
    parts: Tensor, one_off: Tensor, whole: Tensor, distance_norm: int = 1, *, parity: bool = False
) -> tuple[Tensor, Tensor]:
    """As `get_contributions`, with one more part [v_1 ... v_n, D].

    Returns the contributions of the parts, [p_1 ... p_k, v_1 ... v_n], and of the additional part,
    [v_1 ... v_n].
    """
    k = parts.ndim - whole.ndim
    if one_off.shape != whole.shape:
        raise ValueError(
            f"one_off: expected the shape of whole {list(whole.shape)}, got {list(one_off.shape)}"
        )
    if k < 1 or parts.shape[k:] != whole.shape:
        raise ValueError(
            f"parts: expected [parts..., {', '.join(map(str, whole.shape))}], "
            f"got {list(parts.shape)}"
        )
    scores = _scores(parts, whole, distance_norm, parity).flatten(0, k - 1)
    scores = torch.cat([scores, _scores(one_off, whole, distance_norm, parity)[None]])
    shares = _shares(scores, scores.sum(0, keepdim=True)).to(parts.dtype)
    return shares[:-1].unflatten(0, parts.shape[:k]), shares[-1]


@torch.no_grad()
def get_attention_contributions(
    resid_pre: Tensor,
    resid_mid: Tensor,
    decomposed_attn: Tensor,
    distance_norm: int = 1,
    *,
    parity: bool = False,
) -> tuple[Tensor, Tensor]:
    """Contributions to the residual stream after attention.

    resid_pre, resid_mid [batch, pos, D]; decomposed_attn [batch, pos, key_pos, head, D]. The
    `decomposed_attn` of a `TransparentLlm` is formed only if something reads it. With
    `distance_norm` 1 this function does not read it, but calls the kernels.

    Returns contributions of each token through each head [batch, pos, key_pos, head], and those of
    the residual stream [batch, pos]. Without parity, keys after their row are not parts.
    """
    if distance_norm == 1 and isinstance(decomposed_attn, DecomposedAttention):
        return decomposed_attn.contributions(resid_pre, resid_mid, parity)
    _, T, S, H, _ = decomposed_attn.shape
    parts = decomposed_attn.permute(2, 3, 0, 1, 4)  # [key_pos, head, batch, pos, D]
    if parity or T != S:
        of_parts, residual = get_contributions_with_one_off_part(
            parts, resid_pre, resid_mid, distance_norm, parity=parity
        )
        return of_parts.permute(2, 3, 0, 1), residual
    # seen [key, 1, 1, row]
    seen = torch.ones(T, T, dtype=torch.bool, device=parts.device).triu()[:, None, None]
    scores = _scores(parts, resid_mid, distance_norm, parity).masked_fill_(~seen, 0)
    own = _scores(resid_pre, resid_mid, distance_norm, parity)
    total = scores.sum((0, 1)) + own  # [batch, pos]
    flat = total == 0
    n_parts = 1 + H * torch.arange(1, T + 1, device=parts.device)
    total = torch.where(flat, n_parts, total)
    of_parts = (scores + (flat & seen)) / total
    dtype = decomposed_attn.dtype
    return of_parts.permute(2, 3, 0, 1).to(dtype), ((own + flat) / total).to(dtype)


@torch.no_grad()
def get_mlp_contributions(
    resid_mid: Tensor,
    resid_post: Tensor,
    mlp_out: Tensor,
    distance_norm: int = 1,
    *,
    parity: bool = False,
) -> tuple[Tensor, Tensor]:
    """Contributions to the residual stream after the FFN, all of shape [batch, pos, D].

    Returns the contributions of the FFN's output and of `resid_mid`, each [batch, pos].
    """
    ffn, residual = get_contributions(
        torch.stack((mlp_out, resid_mid)), resid_post, distance_norm, parity=parity
    )
    return ffn, residual


@torch.no_grad()
def get_decomposed_mlp_contributions(
    resid_mid: Tensor,
    resid_post: Tensor,
    decomposed_mlp_out: Tensor,
    distance_norm: int = 1,
    *,
    parity: bool = False,
) -> tuple[Tensor, float]:
    """Contributions of an FFN's neurons at one position.

    resid_mid, resid_post [D]; decomposed_mlp_out [hidden, D]. Returns the contributions of the
    neurons [hidden], and that of `resid_mid`.
    """
    neurons, residual = get_contributions_with_one_off_part(
        decomposed_mlp_out, resid_mid, resid_post, distance_norm, parity=parity
    )
    return neurons, residual.item()


@torch.no_grad()
def apply_threshold_and_renormalize(
    threshold: float, c_blocks: Tensor, c_residual: Tensor, *, parity: bool = False
) -> tuple[Tensor, Tensor]:
    """Drops contributions of at most `threshold` and rescales the others of each v to sum to 1.

    c_residual [v_1 ... v_n]; c_blocks [v_1 ... v_n, b_1 ... b_k]: the blocks of each v, a single
    one if k is 0. Returns c_blocks and c_residual. If nothing is left of a v, all are 0.

    Parity: if k is 0, the tool divides by the contribution of the residual stream plus the sum of
    the blocks of *all* v; if nothing is left, it divides 0 by 0.
    """
    n = c_residual.ndim
    if c_blocks.shape[:n] != c_residual.shape:
        raise ValueError(
            f"c_residual: expected the first dimensions of c_blocks {list(c_blocks.shape)}, "
            f"got {list(c_residual.shape)}"
        )
    c_blocks = c_blocks * (c_blocks > threshold)
    c_residual = c_residual * (c_residual > threshold)
    of_each = [1] * (c_blocks.ndim - n)
    total = c_residual.view(*c_residual.shape, *of_each) + _sum(c_blocks, n, c_blocks.ndim, parity)
    if not parity:
        total = total + (total == 0)
    return c_blocks / total, c_residual / total.view(c_residual.shape)


def _sum(x: Tensor, first: int, last: int, parity: bool) -> Tensor:
    """The sum over dimensions `first` to `last`, kept with size 1; x itself if they are none.

    Parity: if they are none, the sum over all dimensions, as torch has it.
    """
    return x if first == last and not parity else x.sum(tuple(range(first, last)), keepdim=True)


def _scores(parts: Tensor, whole: Tensor, norm: int, parity: bool) -> Tensor:
    """‖y‖ − ‖y − p‖, clipped, in float64: [..., v, D], [v, D] -> [..., v]."""
    wide = torch.promote_types(parts.dtype, torch.float32)
    parts, y = parts.to(wide), whole.to(wide)
    shifted = y - EPSILON if parity else y
    if norm == 1:  # a difference of norms would lose small coordinates
        scores = (shifted.abs() - (shifted - parts).abs()).sum(-1, dtype=torch.float64)
        if parity:
            scores += offset(y)
    else:
        length = torch.linalg.vector_norm
        scores = length(y, norm, -1, dtype=torch.float64) - length(
            shifted - parts, norm, -1, dtype=torch.float64
        )
    return scores.clamp_(min=FLOOR if parity else 0)


def _shares(scores: Tensor, total: Tensor) -> Tensor:
    """Scores [p..., v...] divided by their sums [1..., v...]; 1 / n each where the sum is 0."""
    n_parts = scores.numel() // max(1, total.numel())
    flat = total == 0
    return (scores + flat) / torch.where(flat, n_parts, total)
