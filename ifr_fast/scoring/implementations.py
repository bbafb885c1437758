"""The implementations of the kernels: which one can run here, and which one runs."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version
from typing import Protocol

import torch
from torch import Tensor

from ..arguments import check_choice
from ..kernels.contract import AttentionScores, FFNScores, LayerInputs

IMPLEMENTATIONS = ("auto", "reference", "eager", "cpu", "triton")


class Kernel(Protocol):
    """The functions of every implementation (kernels/contract.py)."""

    def score_attention(self, inputs: LayerInputs, keep: float) -> AttentionScores: ...

    def score_ffn(self, resid_mid: Tensor, resid_post: Tensor) -> FFNScores: ...


def choose_impl(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation for a model on `device`; "auto" is $IFR_FAST_IMPL, else the best one.

    An explicit choice never falls back: it raises `ValueError`, which states what is missing.
    """
    if check_choice("impl", impl, IMPLEMENTATIONS) == "auto":
        impl = check_choice("impl", os.environ.get("IFR_FAST_IMPL") or "auto", IMPLEMENTATIONS)
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
            from ..kernels.cpu.kernel import unavailable

            return unavailable()
        case "triton" if dtype == torch.float64:
            return "it computes in float32, and the model is in float64"
        case "triton" if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        case "triton" if os.environ.get("TRITON_INTERPRET") == "1":
            return _interpreter_lacks()  # it takes tensors on any device
        case "triton" if device.type != "cuda":
            return f"the model is on {device}, and TRITON_INTERPRET=1 is not set"
        case "triton" if torch.version.hip is None and (
            capability := torch.cuda.get_device_capability(device)
        ) < (8, 0):
            major, minor = capability
            return f"it needs compute capability 8.0 or newer, and {device} has {major}.{minor}"
        case _:
            return None


def _interpreter_lacks() -> str | None:
    """The reason why Triton's interpreter cannot run; None if it can."""
    triton, numpy = (
        tuple(int(n) for n in version(name).split(".")[:2]) for name in ("triton", "numpy")
    )
    if triton < (3, 7) and numpy >= (2, 4):
        return (
            f"the interpreter of triton {version('triton')} does not run with numpy "
            f"{version('numpy')}; it takes numpy<2.4, or triton>=3.7"
        )
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


def kernel_of(kernel: Kernel, inputs: LayerInputs) -> Kernel:
    """The kernel itself, or eager where it computes no weights but those of softmax attention."""
    if inputs.pattern is None or getattr(kernel, "TAKES_PATTERNS", False):
        return kernel
    from ..kernels import eager

    return eager


def check_recurrences(impl: str, asked: str, has_recurrences: bool) -> None:
    """Raises ValueError where linear attention is to be scored by an implementation that was asked
    for and has no kernel for it. Chosen by "auto", it scores the other layers.
    """
    explicit = asked != "auto" or (os.environ.get("IFR_FAST_IMPL") or "auto") != "auto"
    if has_recurrences and explicit and impl not in ("eager", "reference"):
        raise ValueError(
            f"impl: {impl!r} has no kernel for this model's linear attention; expected auto, eager "
            "or reference"
        )


def load_kernel(impl: str, *, bounded: bool = False) -> Kernel:
    """The kernel module of an implementation, imported on demand. bounded: the one whose work takes
    no more memory where more is free, as `Tracer.plan` counts it.
    """
    match impl:
        case "reference":
            from ..kernels import reference

            return reference
        case "eager":
            from ..kernels import eager

            return eager
        case "cpu":
            from ..kernels.cpu import kernel as cpu

            return cpu
        case "triton":
            from ..kernels.triton import kernel as triton

            return triton.Bounded() if bounded else triton
        case _:
            raise ValueError(f"impl: no kernel {impl!r}")
