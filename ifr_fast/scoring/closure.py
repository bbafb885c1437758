"""The closure check: the parts that were scored add up to what the model computed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import IfrError
from ..kernels.breakpoints import signs
from ..kernels.contract import LayerInputs


def closure_errors(
    y: Tensor,
    resid_pre: Tensor,
    ffn: Tensor | None,
    bias: Tensor,
    linear: Tensor,
    eps: float | None = None,
) -> Tensor:
    """[R] errors of the sum of parts and bias against the node, in units of the error that rounding
    explains (docs/design.md, section 3.4).

    y, resid_pre and (in parallel blocks) ffn: [R, D]; bias: [D] or [R, D]; linear: [R]
    `AttentionScores.linear`; eps: machine epsilon of the model's dtype, by default that of y.

    The signs s of a node are independent of its parts, so for an error e of their sum, s . e has
    the mean square |e|_2^2: one row may miss an error that a few rows show. The kernel returns
    s . (sum of parts) as `linear`, for every row that it scores. This check finds errors that a
    probe cannot: windows, weights that changed after the model was opened, and maps that are
    others at some rows.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    eps = torch.finfo(y.dtype).eps if eps is None else eps
    y, resid_pre = y.to(wide), resid_pre.to(wide)
    moved = y - resid_pre
    moved -= bias
    if ffn is not None:
        moved -= ffn
    norm = torch.linalg.vector_norm
    granted = 8 * eps * (norm(y, dim=-1) + norm(resid_pre, dim=-1))
    granted += max(8 * eps, 1e-3) * norm(moved, dim=-1)
    gap = linear.to(wide) - torch.linalg.vecdot(signs(y), moved)
    return gap.abs() / granted.clamp(min=1e-30)


def closure_of(
    inputs: LayerInputs, linear: Tensor, bias: Tensor, eps: float | None = None
) -> Tensor:
    """[R] `closure_errors` of a layer's rows."""
    return closure_errors(inputs.y, inputs.resid_pre, inputs.ffn, bias, linear, eps)


def check_closure(errors: dict[int, Tensor]) -> None:
    """Raises IfrError if a layer's `closure_errors` [R] exceed 1; one device synchronization."""
    device = next(iter(errors.values())).device
    largest = torch.stack([of_layer.max().to(device) for of_layer in errors.values()])
    check_closed(largest, list(errors))


def check_closed(errors: Tensor, layers: list[int]) -> None:
    """Raises IfrError if `closure_errors` exceed 1; the message names the row's layer."""
    for layer, error in zip(layers, errors.tolist(), strict=True):
        if not error <= 1:
            raise IfrError(
                f"text: at layer {layer} the parts that were scored do not add up to what the "
                f"model computed ({error:.1f} times what rounding explains); were its weights "
                "changed after it was opened, or are they not finite?"
            )


def cat_on(device: torch.device, parts: Iterable[Tensor]) -> Tensor:
    """`parts` from any devices, concatenated along the first dimension on `device`."""
    return torch.cat([x if x.device == device else x.to(device) for x in parts])
