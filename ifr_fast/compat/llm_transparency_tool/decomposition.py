"""The decomposed attention, as a tensor that is formed only when it is read.

`TransparentLlm.decomposed_attn`, what attention moved from each token through each head, is
[pos, key_pos, head, D]: hundreds of GB at 1,000 tokens of a 7B model. This tensor knows its shape,
and is formed when an operation reads it. Dimensions of size 1 can be put before it, as the
published app does, without reading it. `get_attention_contributions` takes its contributions from
the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Contributions = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


class DecomposedAttention(torch.Tensor):
    """A tensor [..., pos, key_pos, head, D] that is formed on demand.

    form: makes the tensor. score: takes resid_pre and resid_mid [pos, D] and a flag for parity, and
    returns the contributions of the parts [pos, key_pos, head] and of resid_pre [pos].
    """

    _form: Callable[[], Tensor]
    _score: Contributions

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        form: Callable[[], Tensor],
        score: Contributions,
    ) -> DecomposedAttention:
        made: DecomposedAttention = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device
        )
        made._form, made._score = form, score
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def formed(self) -> Tensor:
        """The tensor itself."""
        return self._form().view(self.shape)

    def contributions(
        self, resid_pre: Tensor, resid_mid: Tensor, parity: bool
    ) -> tuple[Tensor, Tensor]:
        """Contributions of the parts [..., pos, key_pos, head] and of resid_pre [..., pos]."""
        shape = self.shape[:-3]
        for name, x in (("resid_pre", resid_pre), ("resid_mid", resid_mid)):
            if x.shape != (*shape, self.shape[-1]):
                raise ValueError(
                    f"{name}: expected shape {[*shape, self.shape[-1]]}, got {list(x.shape)}"
                )
        of_parts, residual = self._score(
            resid_pre.reshape(-1, self.shape[-1]), resid_mid.reshape(-1, self.shape[-1]), parity
        )
        return of_parts.view(self.shape[:-1]), residual.view(shape)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.unsqueeze.default and args[1] == 0:
            x: DecomposedAttention = args[0]
            return cls((1, *x.shape), x.dtype, x.device, x._form, x._score)
        if func is torch.ops.aten.detach.default:
            return args[0]

        def form(x: Any) -> Any:
            return x.formed() if isinstance(x, DecomposedAttention) else x

        return func(*tree_map(form, args), **tree_map(form, kwargs or {}))

    # Torch cannot do the following for a tensor without storage.

    def numpy(self, *, force: bool = False) -> Any:
        return self.formed().numpy(force=force)

    def tolist(self) -> Any:
        return self.formed().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copied = self.formed().clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.formed().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DecomposedAttention({list(self.shape)}, not formed)"
