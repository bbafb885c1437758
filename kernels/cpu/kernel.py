"""The native CPU kernel: one fused pass over row blocks, or over one row, in C++ (blocks.h,
row.h), and decode steps that leave a row to it (step.cpp).

Same face and values as eager.py, sums in float32: bfloat16 and float16 inputs are upcast, float64
is refused. Runs on as many threads as torch is set to: those of torch's own OpenMP pool if it
has one, or new ones (IFR_FAST_CPU_POOL=none). No bit depends on the threads or their number.

The instruction set is AVX2 with FMA if the processor has it, else the baseline. The environment
variable IFR_FAST_CPU_ISA=baseline|avx2|avx512, read when this module is imported, forces one.

Without a C++ compiler at installation there is no `_native`: importing this module still works,
`unavailable()` says what is missing, and scoring raises ImportError.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from ..contract import AttentionScores, EdgeList, FFNScores, LayerInputs, check_softmax

_native: ModuleType | None = None
_import_error: ImportError | None = None
try:
    _native = import_module("._native", __package__)
except ImportError as error:
    _import_error = error

ISA: str | None = os.environ.get("IFR_FAST_CPU_ISA")
_PACKED = {"row_scale", "sinks", "alibi_slopes", "log_sum_exp", "offset"}
STAGES = ("prepare", "scores", "softmax", "linear", "correct", "finish")


class Counters(NamedTuple):
    """Work of one call."""

    pairs: int  # (row, head, visible key)
    listed: int  # pairs with lin > 0 and a coordinate that can flip
    visited: int  # coordinates, of all pairs together
    seconds: dict[str, float]  # by stage, all threads together


def unavailable() -> str | None:
    """The reason that this kernel cannot run here, or None if it can."""
    if _import_error is None:
        return None
    return (
        "impl='cpu' needs the compiled extension ifr_fast.kernels.cpu._native "
        f"({_import_error}); reinstall ifr-fast with a C++17 compiler (GCC or Clang) at hand, "
        "or use impl='eager'"
    )


def isas() -> list[str]:
    """The instruction sets of this processor, the default first."""
    return _load().isas()


def pool() -> str:
    """The OpenMP library whose threads are used; empty if each call starts its own."""
    return str(_load().pool())


def score_attention(inputs: LayerInputs, keep: float) -> AttentionScores:
    """Importances of all parts of the rows' nodes (contract.py); edges with weight > `keep`."""
    return score_attention_counted(inputs, keep)[0]


def score_attention_counted(inputs: LayerInputs, keep: float) -> tuple[AttentionScores, Counters]:
    """The scores of `score_attention`, and counts of its work."""
    check_softmax(inputs)
    native = _load()
    R, H, _ = inputs.q.shape
    residual, linear, total, head_total = _empty(R), _empty(R), _empty(R), _empty(R, H)
    ffn = None if inputs.ffn is None else _empty(R)
    unattributed = _empty(R, dtype=torch.bool)
    *edges, (pairs, listed, visited, seconds) = native.score_attention(
        **{name: _prepared(name, x) for name, x in inputs._asdict().items() if name != "pattern"},
        keep=_keep(keep),
        residual=to_dlpack(residual),
        ffn_out=None if ffn is None else to_dlpack(ffn),
        head_total=to_dlpack(head_total),
        unattributed=to_dlpack(unattributed),
        linear=to_dlpack(linear),
        total=to_dlpack(total),
        isa=_isa(native),
        n_threads=torch.get_num_threads(),
    )
    scores = AttentionScores(
        residual,
        ffn,
        head_total.clamp_(max=1),
        _edges(edges),
        unattributed,
        linear,
        total,
    )
    return scores, Counters(pairs, listed, visited, dict(zip(STAGES, seconds, strict=True)))


def score_ffn(resid_mid: Tensor, resid_post: Tensor) -> FFNScores:
    """Importances of `resid_mid` [R, D] and of the FFN's output, the rest, in `resid_post`."""
    native = _load()
    R = resid_post.shape[0]
    scores = FFNScores(_empty(R), _empty(R), _empty(R, dtype=torch.bool))
    native.score_ffn(
        resid_mid=_prepared("resid_mid", resid_mid),
        resid_post=_prepared("resid_post", resid_post),
        **{name: to_dlpack(x) for name, x in zip(scores._fields, scores, strict=True)},
        isa=_isa(native),
        n_threads=torch.get_num_threads(),
    )
    return scores


class StepScores:
    """Scores of rows that are added one by one, each of a layer of its own."""

    def __init__(self, n_heads: int) -> None:
        self.native = _load().StepScores(n_heads)

    def take(self) -> AttentionScores:
        """Scores of all rows added so far; none are left."""
        residual, ffn, head_total, edges, unattributed, linear, total = self.native.take()
        return AttentionScores(
            torch.from_numpy(residual),
            None if ffn is None else torch.from_numpy(ffn),
            torch.from_numpy(head_total).clamp_(max=1),
            _edges(edges),
            torch.from_numpy(unattributed).view(torch.bool),
            torch.from_numpy(linear),
            torch.from_numpy(total),
        )


class StepLayer:
    """A layer in decode steps: each adds a key and a value, attends to all, and scores its row.

    k, v: stores [room, H_kv, K], [room, H_kv, V] float32 whose first `n_keys` are filled; a step
    fills the next. W_O: [H, V, D] float32. All are read in place, and kept. Scores are added to
    `scores`.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        n_keys: int,
        W_O: Tensor,
        alibi_slopes: Tensor | None,
        scores: StepScores,
    ) -> None:
        native = _load()
        self._scores = scores.native
        self._native = native.StepLayer(
            to_dlpack(k), to_dlpack(v), n_keys, _prepared("W_O", W_O),
            _prepared("alibi_slopes", alibi_slopes), _isa(native),
        )  # fmt: skip
        self._z_shape = 1, 1, W_O.shape[0], v.shape[2]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention output [1, 1, H, V], float32, of a new position: q [1, H, 1, K], k [1, H_kv,
        1, K], v [1, H_kv, 1, V]. Raises ValueError where the store has no room.
        """
        z = _empty(*self._z_shape)
        self._native.attend(
            _prepared("q", q), _prepared("k", k), _prepared("v", v), scale, window, softcap,
            _prepared("sinks", sinks), to_dlpack(z), torch.get_num_threads(),
        )  # fmt: skip
        return z

    def score(
        self,
        resid_pre: Tensor,
        y: Tensor,
        keep: float,
        *,
        row_scale: Tensor | None = None,
        value_gate: Tensor | None = None,
        ffn: Tensor | None = None,
    ) -> None:
        """Adds the scores of the position that attended last, from the same weights; as
        `LayerInputs` describes it with R = 1, edges with weight > `keep`.
        """
        self._native.score(
            _prepared("resid_pre", resid_pre), _prepared("y", y),
            _prepared("row_scale", row_scale), _prepared("value_gate", value_gate),
            _prepared("ffn", ffn), _keep(keep), self._scores, torch.get_num_threads(),
        )  # fmt: skip


def _load() -> ModuleType:
    message = unavailable()
    if message is not None:
        raise ImportError(message) from _import_error
    assert _native is not None
    return _native


@cache
def _best_isa(native: ModuleType) -> str:
    return str(native.isas()[0])


def _isa(native: ModuleType) -> str:
    return ISA or _best_isa(native)


def _keep(keep: float) -> float:
    """The threshold for the extension's weights, which rounding may put above 1."""
    return keep if keep < 1 else 2.0


def _edges(columns: Sequence[Any]) -> EdgeList:
    """The extension's edges, with weights of at most 1."""
    row, source, weight, head_weight = map(torch.from_numpy, columns)
    return EdgeList(row, source, weight.clamp_(max=1), head_weight.clamp_(max=1))


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cpu")


def _prepared(name: str, x: Any) -> Any:
    """An argument as the extension takes it. A tensor becomes float32 with a contiguous last
    dimension, in a DLPack capsule: the extension would take longer to ask for one than for the rest
    of a call.
    """
    if not isinstance(x, Tensor):
        return x
    if not x.is_cpu:
        raise ValueError(f"{name}: impl='cpu' takes CPU tensors, got one on {x.device}")
    if name == "rows":
        return to_dlpack(x.to(torch.int64).contiguous())
    if x.dtype is not torch.float32:
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name}: impl='cpu' takes float32, bfloat16 or float16 and sums in float32, got "
                f"{x.dtype}; impl='eager' and 'reference' compute in float64"
            )
        x = x.to(torch.float32)
    if name != "W_O" and (x.stride(-1) != 1 or name in _PACKED):
        x = x.contiguous()
    return to_dlpack(x.detach() if x.requires_grad else x)
