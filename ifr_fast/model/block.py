"""Block: one decoder layer and where its parts are found; the tolerances that rounding explains."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .held import Residual
from .hooks import on_input, on_output

HALF = (torch.bfloat16, torch.float16)
TOLERANCE = 1e-4  # relative error that rounding explains in float32


class Branch(NamedTuple):
    """A submodule whose output, times a constant, a layer adds to the stream after attention."""

    site: nn.Module
    factor: float


class Block(NamedTuple):
    """One decoder layer and the places of its parts."""

    layer: int
    name: str
    module: nn.Module
    attention: nn.Module
    mid_site: nn.Module | None  # reads stream plus attention; None in a parallel block
    W_O: Tensor  # [H, V, D] effective, in the model's dtype if that holds it; contiguous in V
    bias: Tensor  # [D] the constant that attention adds to the stream; it belongs to no part
    window: int | None  # keys visible to a row, itself included
    row_scaled: bool  # a norm after attention scales each row by a number
    gate_site: nn.Module | None  # the module whose input is the attention output times a gate
    kv_heads: int
    d_key: int
    width: int  # numbers per row in the widest tensor that its submodules return
    n_outputs: int | None  # of the tuple or list that it returns; None where it returns a tensor
    branches: tuple[Branch, ...]  # the sum that the FFN adds, in the order of their calls
    stream_scale: float  # the constant that multiplies the stream when the layer is left
    value_layer: int | None = None  # whose keys and values attention reads; None: its own
    residual: Residual | None = None  # how the stream is passed on; None: by plain additions
    head_scaled: bool = False  # a norm before the gate site scales each head's output by a number
    recurrence_size: int = 0  # numbers per row that its weights are made of; 0: softmax
    value_span: int = 1  # positions that a value is made of, its own and those just before
    model_heads: int = 0  # of the layer that has most; set when all layers are known

    @property
    def parallel(self) -> bool:
        """True if attention and FFN both read `resid_pre` and are added at once."""
        return self.mid_site is None

    @property
    def unmixed(self) -> bool:
        """True if the layer mixes no positions (unmixed.py)."""
        return self.attention is self.module

    @property
    def fits_rows(self) -> bool:
        """True if a row's factors are found from its attention output z, which is kept for that."""
        of = self.residual
        held = of is not None and not (of.mid_norm is None and of.post_norm is None)
        return self.row_scaled or self.head_scaled or held

    @property
    def runs_again(self) -> bool:
        """True if scoring runs a layer again for what no recording holds: gates, and the sum that a
        norm of the layer's output reads; or to see that it passes its stream on as before.
        """
        of = self.residual
        held = of is not None and not (of.pre_norm is None and of.post_norm is None)
        return self.gate_site is not None or held or self.weighs_stream

    @property
    def weighs_stream(self) -> bool:
        """True if numbers that may change after opening multiply resid_mid in resid_post."""
        own = [*self.module.parameters(recurse=False), *self.module.buffers(recurse=False)]
        weighted = self.residual is not None and self.residual.mid_weight is not None
        return bool(self.branches) and bool(own or weighted or self.stream_scale != 1)

    def facts(self) -> list[object]:
        """Everything that was found of the layer except W_O, to be compared."""
        found = self._replace(W_O=None, bias=self.bias.tolist(), residual=None)  # type: ignore[arg-type]
        return [*found, None if self.residual is None else self.residual.facts()]

    def crossed_window(self, n_tokens: int) -> int | None:
        """The window if a text of `n_tokens` is longer than it, else None."""
        return None if self.window is None or self.window >= n_tokens else self.window

    def unscaled(self, resid_post: Tensor) -> Tensor:
        """`resid_post` before the layer multiplied it by `stream_scale`: `resid_mid` plus what the
        FFN adds. Importances are those of `resid_post`, since all parts have the same factor.
        """
        return resid_post if self.stream_scale == 1 else resid_post / self.stream_scale

    def on_mid(self, keep: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
        """Passes `resid_mid` to `keep`; in a parallel block, what attention adds to `resid_pre`."""
        if self.residual is not None and self.residual.mid_norm is not None:
            return on_output(self.residual.mid_norm.site, keep)
        if self.mid_site is not None:
            return on_input(self.mid_site, keep)
        return on_output(self.attention, keep)


def rounding_tolerance(dtype: torch.dtype) -> float:
    """Relative error that rounding explains between two runs of the same layer."""
    return max(10 * TOLERANCE, 8 * torch.finfo(dtype).eps)


def relative_error(got: Tensor, expected: Tensor, beside: Tensor | None = None) -> float:
    """Largest relative error of a row, |got - expected|_2 / |expected|_2. If `expected` is a
    difference of larger vectors `beside`, their rounding is allowed for.
    """
    return float(_relative_errors(got, expected, beside).max())


def _relative_errors(got: Tensor, expected: Tensor, beside: Tensor | None = None) -> Tensor:
    """The relative error of each row."""
    wide = torch.promote_types(got.dtype, torch.float32)
    got, expected = got.to(wide), expected.to(wide)
    distance = torch.linalg.vector_norm(got - expected, dim=-1)
    norm = torch.linalg.vector_norm(expected, dim=-1)
    if beside is not None:
        granted = 8 * torch.finfo(beside.dtype).eps
        distance = distance - granted * torch.linalg.vector_norm(beside.to(wide), dim=-1)
    return (distance.clamp(min=0) / norm.clamp(min=1e-30)).nan_to_num(nan=float("inf"))


def error_of_runs(got: Tensor, expected: Tensor) -> float:
    """The difference of two runs [T, D] of a model or layer: the largest relative error of a row;
    in half precision the median, because there rounding can flip a row's choice of experts.
    """
    errors = _relative_errors(got, expected)
    return float(errors.median() if expected.dtype in HALF else errors.max())
