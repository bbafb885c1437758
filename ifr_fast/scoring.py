"""Recording + rows -> LayerScores: shape checks, picks the kernel, nothing else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import IfrError
from .kernels.contract import AttentionScores, FFNScores, LayerInputs, visible
from .model import Decoder
from .recording import Recording, layer_inputs

IMPLEMENTATIONS = ("auto", "reference", "eager", "cpu", "triton")
_CHECK_TOLERANCE = 4  # in units of the dtype's eps, of |z|, with 1e-4 as the least


class Kernel(Protocol):
    """What every implementation offers (kernels/contract.py)."""

    def score_attention(self, inputs: LayerInputs, keep: float) -> AttentionScores: ...

    def score_ffn(self, resid_mid: Tensor, resid_post: Tensor) -> FFNScores: ...


def choose_impl(impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation for a model on `device`: `impl`, else $IFR_FAST_IMPL, else the best one.

    An explicit choice never falls back: `ValueError` says what is missing.
    """
    impl = impl or os.environ.get("IFR_FAST_IMPL") or "auto"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "auto":
        return "eager" if what_is_missing("cpu", device, dtype) else "cpu"
    missing = what_is_missing(impl, device, dtype)
    if missing is not None:
        raise ValueError(f"impl: {impl!r} cannot run: {missing}")
    return impl


def what_is_missing(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot run for a model on `device`; None where it can."""
    match impl:
        case "cpu" if device.type != "cpu":
            return f"the model is on {device}"
        case "cpu" if dtype == torch.float64:
            return "it computes in float32, and the model is in float64"
        case "cpu":
            from .kernels.cpu.kernel import unavailable

            return unavailable()
        case "triton":
            return "it is not part of this version"
        case _:
            return None


def explain_impl(impl: str | None, device: torch.device) -> str:
    """Which implementation would run a float32 model on `device`, and why, in words."""
    try:
        chosen = choose_impl(impl, device, torch.float32)
    except ValueError as error:
        return str(error)
    asked = impl or os.environ.get("IFR_FAST_IMPL") or "auto"
    why = "asked for" if asked != "auto" else "the fastest that can run here"
    others = [
        f"{name}: {missing}"
        for name in ("cpu", "triton")
        if (missing := what_is_missing(name, device, torch.float32)) is not None
    ]
    return f"{chosen}, {why}" + (f" ({'; '.join(others)})" if others else "")


def load_kernel(impl: str) -> Kernel:
    """The kernel module of an implementation, imported on demand."""
    match impl:
        case "reference":
            from .kernels import reference

            return reference
        case "eager":
            from .kernels import eager

            return eager
        case "cpu":
            from .kernels.cpu import kernel

            return kernel
        case _:
            raise ValueError(f"impl: no kernel {impl!r}")


class TokenEdges(NamedTuple):
    """Sparse token edges, by target then source; positions in the text."""

    target: Tensor  # [N] int64
    source: Tensor  # [N] int64
    weight: Tensor  # [N] float32, importance summed over heads


class HeadEdges(NamedTuple):
    """Sparse per-head edges, by target, source, head; positions in the text."""

    head: Tensor  # [M] int64
    target: Tensor  # [M] int64
    source: Tensor  # [M] int64
    weight: Tensor  # [M] float32, importance


@dataclass(frozen=True)
class LayerScores:
    """Importances of the parts of one layer's nodes at R rows.

    For each row `residual + head_total.sum(-1)` (`+ ffn` in parallel blocks) is 1, and so is
    `ffn + ffn_residual` in sequential ones, within rounding (paper section 2.2).
    """

    layer: int
    rows: Tensor  # [R] int64, on the CPU
    keep: float
    residual: Tensor  # [R] of resid_pre in resid_mid (parallel blocks: in resid_post)
    ffn: Tensor  # [R] of the FFN in resid_post
    ffn_residual: Tensor | None  # [R] of resid_mid in resid_post; None in parallel blocks
    head_total: Tensor  # [R, H] summed over all keys
    unattributed: Tensor  # [R] bool: all proximities of `mid` (parallel: `post`) are 0
    ffn_unattributed: Tensor | None  # [R] bool, the same of `post`; None in parallel blocks
    attention: AttentionScores  # the kernel's own, edges perhaps padded

    @cached_property
    def token_edges(self) -> TokenEdges:
        """Token edges with weight above `keep`."""
        edges = self.attention.edges
        target = self.rows.to(edges.row.device)[edges.row]
        kept = (edges.weight > self.keep).nonzero().squeeze(1)
        order = kept[_lexicographic(target[kept], edges.source[kept])]
        return TokenEdges(target[order], edges.source[order], edges.weight[order].float())

    @cached_property
    def head_edges(self) -> HeadEdges:
        """Single heads' edges with weight above `keep`; all lie within `token_edges`."""
        edges = self.attention.edges
        target = self.rows.to(edges.row.device)[edges.row]
        order = _lexicographic(target, edges.source)
        index, head = (edges.head_weight[order] > self.keep).nonzero(as_tuple=True)
        index = order[index]
        weight = edges.head_weight[index, head].float()
        return HeadEdges(head, target[index], edges.source[index], weight)


def _lexicographic(first: Tensor, second: Tensor) -> Tensor:
    """Indices that order pairs of positions."""
    return ((first << 32) | second).argsort()


def score_layer(
    decoder: Decoder, recording: Recording, layer: int, rows: Tensor, keep: float, impl: str
) -> LayerScores:
    """Scores `rows` [R] (int64, CPU, strictly ascending) of a layer; edges above `keep`."""
    kernel = load_kernel(impl)
    inputs, resid_post = layer_inputs(decoder, recording, layer, rows)
    _check_shapes(inputs)
    scores = kernel.score_attention(inputs, keep)
    if resid_post is None:
        assert scores.ffn is not None
        ffn, ffn_residual, ffn_unattributed = scores.ffn, None, None
    else:
        of_ffn = kernel.score_ffn(inputs.y, resid_post)
        ffn, ffn_residual = of_ffn.ffn, of_ffn.residual.float()
        ffn_unattributed = of_ffn.unattributed
    return LayerScores(
        layer,
        rows,
        keep,
        scores.residual.float(),
        ffn.float(),
        ffn_residual,
        scores.head_total.float(),
        scores.unattributed,
        ffn_unattributed,
        scores,
    )


def attention_error(decoder: Decoder, recording: Recording, layer: int, rows: Tensor) -> Tensor:
    """How far the weights that are scored stray from the attention the model computed.

    For the recorded sample of rows among `rows`: the largest |sum_j alpha v - z| over |z|, in
    units of what rounding explains; a 0-d tensor, at most 1 where all is well (design 3.4).
    """
    recorded = recording.layers[layer]
    among = torch.isin(recording.checked_rows, rows).nonzero().squeeze(1)
    sample = recording.checked_rows[among]
    device = recorded.k.device
    if len(sample) == 0:
        return torch.zeros((), device=device)
    inputs, _ = layer_inputs(decoder, recording, layer, sample)
    n_keys = int(sample[-1]) + 1
    k, v = recorded.k[:n_keys].float(), recorded.v[:n_keys].float()
    H_kv = k.shape[1]
    R, H, K = inputs.q.shape
    q = inputs.q.float().reshape(R, H_kv, H // H_kv, K)
    scores = torch.einsum("rngk,snk->rngs", q, k) * recorded.scale
    if recorded.softcap is not None:
        scores = recorded.softcap * torch.tanh(scores / recorded.softcap)
    mask = visible(sample.to(device), n_keys, recorded.window)[:, None, None]
    scores = scores.masked_fill(~mask, float("-inf"))
    log_sum = scores.logsumexp(-1, keepdim=True)
    if recorded.sinks is not None:
        sinks = recorded.sinks.float().view(1, H_kv, -1, 1)
        log_sum = torch.logaddexp(log_sum, sinks)
    z = torch.einsum("rngs,snv->rngv", (scores - log_sum).exp(), v).reshape(R, H, -1)
    expected = recorded.checked_z[among.to(device)].float()
    tolerance = max(1e-4, _CHECK_TOLERANCE * torch.finfo(recorded.k.dtype).eps)
    scale = torch.linalg.vector_norm(expected, dim=-1) + torch.linalg.vector_norm(v, dim=-1).mean()
    return (torch.linalg.vector_norm(z - expected, dim=-1) / scale).max() / tolerance


def check_attention(errors: dict[int, Tensor]) -> None:
    """Raises IfrError where a layer's `attention_error` is above 1; one read by the host."""
    layers = sorted(errors)
    device = errors[layers[0]].device
    worst = torch.stack([errors[layer].to(device) for layer in layers]).cpu()
    if not bool((worst <= 1).all()):
        layer = layers[int((~(worst <= 1)).int().argmax())]
        raise IfrError(
            f"text: at layer {layer} the weights that would be scored do not reproduce the model's "
            f"attention output ({float(errors[layer]):.1f} times what rounding explains)"
        )


def _check_shapes(inputs: LayerInputs) -> None:
    (R, H, K), (S, H_kv, V), D = inputs.q.shape, inputs.v.shape, inputs.y.shape[1]
    expected = {
        "rows": (R,),
        "resid_pre": (R, D),
        "y": (R, D),
        "k": (S, H_kv, K),
        "W_O": (H, V, D),
        "row_scale": (R,),
        "value_gate": (R, H, V),
        "sinks": (H,),
        "alibi_slopes": (H,),
        "log_sum_exp": (R, H),
        "ffn": (R, D),
    }
    for name, shape in expected.items():
        x = getattr(inputs, name)
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    if H % H_kv:
        raise ValueError(f"q: its {H} heads are no multiple of the {H_kv} key/value heads")
