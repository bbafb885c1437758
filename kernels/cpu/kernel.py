"""The native CPU kernel: one fused pass over row blocks, or over one row, in C++ (blocks.h,
row.h).

Same face and values as eager.py, sums in float32: bfloat16 and float16 inputs are upcast, float64
is refused. Runs on as many threads as torch is set to, those of torch's own OpenMP pool where it
has one (IFR_FAST_CPU_POOL=none: on new ones); bits do not depend on which or how many.

The instruction set is AVX2 with FMA where the processor has it, else the baseline; the environment
variable IFR_FAST_CPU_ISA=baseline|avx2|avx512, read when this module is imported, forces one.

Without a C++ compiler at installation there is no `_native`: importing this module still works,
`unavailable()` says what is missing, and scoring raises ImportError.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import AttentionScores, EdgeList, FFNScores, LayerInputs

_native: ModuleType | None = None
_import_error: ImportError | None = None
try:
    _native = import_module("._native", __package__)
except ImportError as error:
    _import_error = error

ISA: str | None = os.environ.get("IFR_FAST_CPU_ISA")
STAGES = ("prepare", "scores", "softmax", "linear", "correct", "finish")


class Counters(NamedTuple):
    """What one call did."""

    pairs: int  # (row, head, visible key)
    listed: int  # pairs with lin > 0 and a coordinate that can flip
    visited: int  # coordinates, of all pairs together
    seconds: dict[str, float]  # by stage, all threads together


def unavailable() -> str | None:
    """Why this kernel cannot run here, or None if it can."""
    if _import_error is None:
        return None
    return (
        "impl='cpu' needs the compiled extension ifr_fast.kernels.cpu._native "
        f"({_import_error}); reinstall ifr-fast with a C++17 compiler (GCC or Clang) at hand, "
        "or use impl='eager'"
    )


def isas() -> list[str]:
    """The instruction sets that this processor has, the default first."""
    return _load().isas()


def pool() -> str:
    """The OpenMP library whose threads are used; empty where each call starts its own."""
    return str(_load().pool())


def score_attention(inputs: LayerInputs, keep: float) -> AttentionScores:
    """Importances of all parts of the rows' nodes (contract.py); edges with weight > `keep`."""
    return score_attention_counted(inputs, keep)[0]


def score_attention_counted(inputs: LayerInputs, keep: float) -> tuple[AttentionScores, Counters]:
    """`score_attention`, and what it took."""
    native = _load()
    prepared: dict[str, Any] = {
        name: _prepared(name, x) for name, x in inputs._asdict().items() if isinstance(x, Tensor)
    }
    x = inputs._replace(**prepared)
    R, H, _ = x.q.shape
    residual = _empty(R)
    ffn = None if x.ffn is None else _empty(R)
    head_total = _empty(R, H)
    unattributed = _empty(R, dtype=torch.bool)
    linear = _empty(R)
    *edges, (pairs, listed, visited, seconds) = native.score_attention(
        **x._asdict(),
        keep=keep,
        residual=residual,
        ffn_out=ffn,
        head_total=head_total,
        unattributed=unattributed,
        linear=linear,
        isa=ISA or native.isas()[0],
        n_threads=torch.get_num_threads(),
    )
    scores = AttentionScores(
        residual, ffn, head_total, EdgeList(*map(torch.from_numpy, edges)), unattributed, linear
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
        **scores._asdict(),
        isa=ISA or native.isas()[0],
        n_threads=torch.get_num_threads(),
    )
    return scores


def _load() -> ModuleType:
    message = unavailable()
    if message is not None:
        raise ImportError(message) from _import_error
    assert _native is not None
    return _native


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cpu")


def _prepared(name: str, x: Tensor) -> Tensor:
    """As the extension takes it: on the CPU, float32, no gradient, last dimension contiguous."""
    if x.device.type != "cpu":
        raise ValueError(f"{name}: impl='cpu' takes CPU tensors, got one on {x.device}")
    if name == "rows":
        return x.to(torch.int64).contiguous()
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name}: impl='cpu' takes float32, bfloat16 or float16 and sums in float32, got "
            f"{x.dtype}; impl='eager' and 'reference' compute in float64"
        )
    x = x.detach().to(torch.float32)
    if name == "W_O" or (x.dim() > 1 and name != "log_sum_exp" and x.stride(-1) == 1):
        return x
    return x.contiguous()
