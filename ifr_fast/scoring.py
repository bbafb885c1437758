"""Scores rows of a recording: chooses the kernel, checks shapes and closure, joins row blocks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import IfrError
from .graph import LayerTable
from .kernels.contract import AttentionScores, EdgeList, FFNScores, LayerInputs
from .model import Block
from .recording import Recording, layer_inputs

IMPLEMENTATIONS = ("auto", "reference", "eager", "cpu", "triton")
_BLOCK_ROWS = {"cpu": 512, "cuda": 8192}  # rows that are replayed and scored at once


class Kernel(Protocol):
    """The functions of every implementation (kernels/contract.py)."""

    def score_attention(self, inputs: LayerInputs, keep: float) -> AttentionScores: ...

    def score_ffn(self, resid_mid: Tensor, resid_post: Tensor) -> FFNScores: ...


def block_rows(device: torch.device) -> int:
    """The number of rows that are replayed and scored at once, for a model on `device`."""
    return _BLOCK_ROWS.get(device.type, _BLOCK_ROWS["cpu"])


def choose_impl(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation for a model on `device`; "auto" is $IFR_FAST_IMPL, else the best one.

    An explicit choice never falls back: it raises `ValueError`, which states what is missing.
    """
    if impl == "auto":
        impl = os.environ.get("IFR_FAST_IMPL") or "auto"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "auto":
        best = "cpu" if device.type == "cpu" else "triton"
        return "eager" if what_is_missing(best, device, dtype) else best
    missing = what_is_missing(impl, device, dtype)
    if missing is not None:
        raise ValueError(f"impl: {impl!r} cannot run: {missing}")
    return impl


def what_is_missing(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why an implementation cannot run for a model on `device`; None if it can."""
    match impl:
        case "cpu" if device.type != "cpu":
            return f"the model is on {device}"
        case "cpu" if dtype == torch.float64:
            return "it computes in float32, and the model is in float64"
        case "cpu":
            from .kernels.cpu.kernel import unavailable

            return unavailable()
        case "triton" if dtype == torch.float64:
            return "it computes in float32, and the model is in float64"
        case "triton" if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        case "triton" if os.environ.get("TRITON_INTERPRET") == "1":
            return None  # the interpreter takes tensors on any device
        case "triton" if device.type != "cuda":
            return f"the model is on {device}, and TRITON_INTERPRET=1 is not set"
        case "triton" if torch.version.hip is None and (
            capability := torch.cuda.get_device_capability(device)
        ) < (8, 0):
            major, minor = capability
            return f"it needs compute capability 8.0 or newer, and {device} has {major}.{minor}"
        case _:
            return None


def explain_impl(impl: str, device: torch.device) -> str:
    """The implementation that would run a float32 model on `device`, and the reason, in words."""
    try:
        chosen = choose_impl(impl, device, torch.float32)
    except ValueError as error:
        return str(error)
    requested = os.environ.get("IFR_FAST_IMPL") or impl if impl == "auto" else impl
    why = "asked for" if requested != "auto" else "the fastest that can run here"
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
            from .kernels.cpu import kernel as cpu

            return cpu
        case "triton":
            from .kernels.triton import kernel as triton

            return triton
        case _:
            raise ValueError(f"impl: no kernel {impl!r}")


class TokenEdges(NamedTuple):
    """Sparse token edges, in order of target, source; positions in the text."""

    target: Tensor  # [N] int64
    source: Tensor  # [N] int64
    weight: Tensor  # [N] float32, importance summed over heads


class HeadEdges(NamedTuple):
    """Sparse per-head edges, in order of target, source, head; positions in the text."""

    head: Tensor  # [M] int64
    target: Tensor  # [M] int64
    source: Tensor  # [M] int64
    weight: Tensor  # [M] float32, importance


@dataclass(frozen=True, eq=False)
class LayerScores:
    """Importances of the parts of one layer's nodes at R rows.

    For each row `residual + head_total.sum(-1)` (`+ ffn` in parallel blocks) is 1, and so is
    `ffn + ffn_residual` in sequential ones, within rounding (paper section 2.2).
    """

    layer: int
    rows: Tensor  # [R] int64, on the CPU
    keep: float
    residual: Tensor  # [R] importance of resid_pre in resid_mid (parallel: in resid_post)
    ffn: Tensor  # [R] importance of the FFN in resid_post
    ffn_residual: Tensor | None  # [R] that of resid_mid in resid_post; None in parallel blocks
    head_total: Tensor  # [R, H] importance of each head, summed over all keys
    unattributed: Tensor  # [R] bool: all proximities of `mid` (parallel: `post`) are 0
    ffn_unattributed: Tensor | None  # [R] bool: those of `post` are 0; None in parallel blocks
    attention: AttentionScores  # the kernel's own result; its edges may be padded
    closure: Closure  # rows whose parts must add up to their node

    def table(self, device: torch.device) -> LayerTable:
        """The scores that a graph needs, moved to `device`."""

        def move(x: Tensor | None) -> Any:
            return None if x is None else x.to(device)

        return LayerTable(
            move(self.rows),
            move(self.residual),
            move(self.ffn),
            move(self.ffn_residual),
            EdgeList(*map(move, self.attention.edges)),
            move(self.unattributed),
            move(self.ffn_unattributed),
        )

    @cached_property
    def token_edges(self) -> TokenEdges:
        """The token edges with weight above `keep`."""
        edges = self.attention.edges
        target = self.rows.to(edges.row.device)[edges.row]
        kept = (edges.weight > self.keep).nonzero().squeeze(1)
        order = kept[_lexicographic(target[kept], edges.source[kept])]
        return TokenEdges(target[order], edges.source[order], edges.weight[order].float())

    @cached_property
    def head_edges(self) -> HeadEdges:
        """The edges of single heads with weight above `keep`; all are within `token_edges`."""
        edges = self.attention.edges
        target = self.rows.to(edges.row.device)[edges.row]
        order = _lexicographic(target, edges.source)
        index, head = (edges.head_weight[order] > self.keep).nonzero(as_tuple=True)
        index = order[index]
        weight = edges.head_weight[index, head].float()
        return HeadEdges(head, target[index], edges.source[index], weight)


def _lexicographic(first: Tensor, second: Tensor) -> Tensor:
    """The indices that sort pairs of positions."""
    return ((first << 32) | second).argsort()


def score_layer(
    recording: Recording, layer: int, rows: Tensor, keep: float, impl: str
) -> LayerScores:
    """Scores `rows` [R] (int64, CPU, strictly ascending) of a layer; edges above `keep`.

    Tensors that the recording lacks are replayed; then rows are scored in row blocks.
    """
    block, sample = recording.decoder.blocks[layer], recording.sample(rows)

    def score(some: Tensor, checked: Tensor) -> LayerScores:
        inputs, resid_post = layer_inputs(recording, layer, some)
        return score_rows(block, inputs, resid_post, checked, keep, impl)

    size = block_rows(recording.decoder.device)
    if not recording.is_replayed or len(rows) <= size:
        return score(rows, sample)
    blocks = []
    for start in range(0, len(rows), size):
        among = sample[(sample >= start) & (sample < start + size)] - start
        blocks.append(score(rows[start : start + size], among))
    return joined(blocks, rows)


def score_rows(
    block: Block,
    inputs: LayerInputs,
    resid_post: Tensor | None,
    sample: Tensor,
    keep: float,
    impl: str,
) -> LayerScores:
    """Scores the rows of a block. resid_post: [R, D], None in a parallel block; sample: indices of
    the rows to be checked, on the CPU. Raises ValueError for a wrong shape in `inputs`.
    """
    kernel = load_kernel(impl)
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
        block.layer,
        inputs.rows,
        keep,
        scores.residual.float(),
        ffn.float(),
        ffn_residual,
        scores.head_total.float(),
        scores.unattributed,
        ffn_unattributed,
        scores,
        closure(inputs, scores.linear, block.bias, sample),
    )


def joined(blocks: list[LayerScores], rows: Tensor) -> LayerScores:
    """The scores of consecutive blocks of `rows` as one."""
    edges = [block.attention.edges for block in blocks]
    start, shifted = 0, []
    for block, of_block in zip(blocks, edges, strict=True):
        shifted.append(of_block.row + start)
        start += len(block.rows)

    def cat(of: Callable[[LayerScores], Tensor | None]) -> Any:
        found = [of(block) for block in blocks]
        return None if found[0] is None else torch.cat(found)  # type: ignore[arg-type]

    residual, ffn, head_total = (
        cat(lambda b: b.residual),
        cat(lambda b: b.ffn),
        cat(lambda b: b.head_total),
    )
    unattributed = cat(lambda b: b.unattributed)
    return LayerScores(
        blocks[0].layer,
        rows,
        blocks[0].keep,
        residual,
        ffn,
        cat(lambda b: b.ffn_residual),
        head_total,
        unattributed,
        cat(lambda b: b.ffn_unattributed),
        AttentionScores(
            residual,
            cat(lambda b: b.attention.ffn),
            head_total,
            EdgeList(
                torch.cat(shifted),
                cat(lambda b: b.attention.edges.source),
                cat(lambda b: b.attention.edges.weight),
                cat(lambda b: b.attention.edges.head_weight),
            ),
            unattributed,
            cat(lambda b: b.attention.linear),
            cat(lambda b: b.attention.total),
        ),
        Closure(
            cat(lambda b: b.closure.y),
            cat(lambda b: b.closure.resid_pre),
            cat(lambda b: b.closure.moved),
            cat(lambda b: b.closure.linear),
            cat(lambda b: b.closure.eps),
        ),
    )


class Closure(NamedTuple):
    """Some of a layer's rows, whose parts should add up to their node."""

    y: Tensor  # [C, D]
    resid_pre: Tensor  # [C, D]
    moved: Tensor  # [C, D] the sum of the heads' outputs, taken from the model's own states
    linear: Tensor  # [C] `AttentionScores.linear`
    eps: Tensor  # [C] machine epsilon of the model's dtype


def closure(inputs: LayerInputs, linear: Tensor, bias: Tensor, sample: Tensor) -> Closure:
    """The rows of a layer that are checked. bias: [D]; sample: indices of rows, on the CPU."""

    def take(x: Tensor) -> Tensor:
        return x if len(sample) == len(x) else x[sample.to(x.device)]

    ffn = None if inputs.ffn is None else take(inputs.ffn)
    return closure_rows(take(inputs.y), take(inputs.resid_pre), ffn, bias, take(linear))


def closure_rows(
    y: Tensor, resid_pre: Tensor, ffn: Tensor | None, bias: Tensor, linear: Tensor
) -> Closure:
    """The rows to be checked, from y, resid_pre and (in parallel blocks) ffn [C, D]; bias [D] or
    [C, D]; linear [C].
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    eps = torch.full_like(y[:, 0], torch.finfo(y.dtype).eps, dtype=wide)
    y, resid_pre = y.to(wide), resid_pre.to(wide)
    moved = y - resid_pre - bias
    if ffn is not None:
        moved = moved - ffn
    return Closure(y, resid_pre, moved, linear.to(wide), eps)


def closure_errors(rows: Closure) -> Tensor:
    """[C] errors of the sum of parts and bias against the node, in units of the error that rounding
    explains (docs/design.md, section 3.4).

    The signs s of a node are independent of its parts, so for an error e of their sum, s . e has
    the mean square |e|_2^2: one row may miss an error that a few rows show. The kernel returns
    s . (sum of parts) as `linear`. This check finds errors that a probe cannot: windows, and
    weights that changed after the model was opened.
    """
    from .kernels.breakpoints import signs

    y, resid_pre, moved, linear, eps = rows
    gap = linear - (signs(y) * moved).sum(-1)
    norm = torch.linalg.vector_norm
    granted = 8 * eps * (norm(y, dim=-1) + norm(resid_pre, dim=-1))
    granted += (8 * eps).clamp(min=1e-3) * norm(moved, dim=-1)
    return gap.abs() / granted.clamp(min=1e-30)


def check_closure(of_layer: dict[int, Closure]) -> None:
    """Raises IfrError if a layer's `closure_errors` exceed 1; one device synchronization."""
    device = next(iter(of_layer.values())).y.device
    rows = Closure(*(cat_on(device, parts) for parts in zip(*of_layer.values(), strict=True)))
    check_closed(rows, [layer for layer, of in of_layer.items() for _ in range(len(of.linear))])


def check_closed(rows: Closure, layers: list[int]) -> None:
    """Raises IfrError if `closure_errors` exceed 1; the message names the row's layer."""
    for layer, error in zip(layers, closure_errors(rows).tolist(), strict=True):
        if not error <= 1:
            raise IfrError(
                f"text: at layer {layer} the parts that were scored do not add up to what the "
                f"model computed ({error:.1f} times what rounding explains); were its weights "
                "changed after it was opened, or are they not finite?"
            )


def cat_on(device: torch.device, parts: Iterable[Tensor]) -> Tensor:
    """`parts` from any devices, concatenated along the first dimension on `device`."""
    return torch.cat([x if x.device == device else x.to(device) for x in parts])


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
        "offset": (R,),
    }
    for name, shape in expected.items():
        x = getattr(inputs, name)
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    if H % H_kv:
        raise ValueError(f"q: its {H} heads are not a multiple of the {H_kv} key/value heads")
