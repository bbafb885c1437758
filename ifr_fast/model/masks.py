"""Masks that are functions of two positions, and the sliding windows that they hide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..kernels.rows import on_device

HIDDEN = -3e4  # a bias below it hides a key; float16's lowest value is twice that
_COMPARED = 64  # rows of a mask whose every key is looked at
_METADATA = {"size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "__len__"}
_VALUES = {"T", "mT", "H", "mH", "data", "real"}  # properties that are tensors
_COPIES = {"contiguous", "clone", "detach", "__deepcopy__"}
_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


class LazyMask(Tensor):
    """The model's own mask as a function of rows and keys; no [T, T] tensor exists.

    The mask interface passes it to the model, and our attention function reads the function. For
    the model it stands for the tensor [1, 1, T, S], whose values are computed when an operation
    needs them. n_rows: the number of rows and keys that the function covers, if it reads a tensor;
    else None.
    """

    n_rows: int | None
    given: bool  # true if a tensor of the model says which keys are visible
    _whole: LazyMask | None  # the mask of all rows, if this one shows some
    _function: Callable[..., Tensor]
    _reads_from: torch.device
    _positions: Tensor | None  # [R] of the rows and keys that are shown
    _fits: Tensor | None  # 0-d bool: whether the given tensor hides what the function hides

    @staticmethod
    def __new__(
        cls: type[LazyMask],
        mask_function: Callable[..., Tensor],
        device: torch.device,
        n_rows: int | None = None,
        size: tuple[int, ...] = (1, 1),
        dtype: torch.dtype = torch.bool,
    ) -> LazyMask:
        mask: LazyMask = Tensor._make_wrapper_subclass(
            cls, (1, 1, *size), dtype=dtype, device=device
        )
        mask._function, mask._reads_from, mask.n_rows = mask_function, device, n_rows
        mask.given, mask._whole, mask._positions, mask._fits = False, None, None, None
        return mask

    @staticmethod
    def of_tensor(seen: Tensor) -> LazyMask:
        """The causal or sliding mask that `seen` [..., T, S], bool, may be; `is_causal` is false of
        it where any of its values differs. The tensor is not held.
        """
        T, S = seen.shape[-2:]
        rows = torch.arange(T, device=seen.device)
        causal = causal_mask(seen.reshape(-1, T, S)[0, -1].sum(), seen.device)
        fits, reads_later = seen.new_zeros(()), seen.new_zeros(())
        if T == S:
            fits = (seen == causal.visible(rows, rows)).all()
            reads_later = seen.triu(1).any()

        def function(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return causal._function(b, h, q, k) | reads_later

        mask = LazyMask(function, seen.device)
        mask._fits = fits
        mask.n_rows, mask.given = S, True
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, mask = func.__name__, args[0] if args else None
        with torch._C.DisableTorchFunctionSubclass():
            if (name == "__get__" and func.__self__.__name__ not in _VALUES) or name in _METADATA:
                return func(*args, **kwargs)
            if isinstance(mask, LazyMask):
                if name in _COPIES or (name == "__getitem__" and mask._shows_all(args[1])):
                    return mask
                if name in _CASTS and mask.dtype != torch.bool:
                    return mask._like(_CASTS[name], mask.device)
                if name == "to":
                    target = mask._target(*args[1:], **kwargs)
                    if target is not None:
                        return mask._like(*target)

            def read(x: Any) -> Any:
                return x._tensor() if isinstance(x, LazyMask) else x

            return func(*tree_map(read, args), **tree_map(read, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} reached a mask that holds no values")

    def _shows_all(self, index: Any) -> bool:
        """True if indexing by `index` changes nothing."""
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            missing = self.dim() - len(index) + 1
            index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
        return len(index) <= self.dim() and all(
            isinstance(x, slice) and x.indices(n) == (0, n, 1)
            for x, n in zip(index, self.shape, strict=False)
        )

    def _target(self, *args: Any, **kwargs: Any) -> tuple[torch.dtype, torch.device] | None:
        """The dtype and device that `to` asks for; None if booleans would become numbers."""
        if args and isinstance(args[0], Tensor):
            device, dtype = args[0].device, args[0].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        dtype, device = dtype or self.dtype, device or self.device
        kept = dtype == self.dtype or torch.bool not in (dtype, self.dtype)
        return (dtype, device) if kept else None

    def _like(self, dtype: torch.dtype, device: torch.device) -> LazyMask:
        size = tuple(self.shape[2:])
        mask = LazyMask(self._function, device, self.n_rows, size, dtype)
        mask._reads_from, mask._positions = self._reads_from, self._positions
        mask.given, mask._whole, mask._fits = self.given, self._whole, self._fits
        return mask

    @property
    def whole(self) -> LazyMask:
        """The mask of all rows."""
        return self if self._whole is None else self._whole

    def among(self, rows: Tensor) -> LazyMask:
        """The mask that some rows have among themselves, [1, 1, R, R]."""
        mask = LazyMask(self._function, self.device, self.n_rows, (len(rows),) * 2, self.dtype)
        mask._reads_from, mask._whole = self._reads_from, self.whole
        mask._positions = rows if self._positions is None else self._positions[rows.cpu()]
        return mask

    def _tensor(self) -> Tensor:
        """The values [1, 1, T, S]."""
        T, S = self.shape[2:]
        rows = keys = self._positions
        if rows is None or keys is None:
            rows, keys = torch.arange(S - T, S), torch.arange(S)
        seen = self.visible(rows, keys)[None, None].to(self.device)
        if self.dtype == torch.bool:
            return seen
        values = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return values.masked_fill_(~seen, torch.finfo(self.dtype).min)

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Bool [R, S]: true where a row may read a key; rows [R], keys [S]: absolute positions."""
        return self._at(rows[:, None], keys).expand(len(rows), len(keys))

    def _at(self, rows: Tensor, keys: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.long, device=self._reads_from)
        rows, keys = (on_device(x, self._reads_from) for x in (rows, keys))
        if self.n_rows is None:
            return self._function(zero, zero, rows, keys)
        end = self.n_rows - 1  # a tensor has no values behind it
        seen = self._function(zero, zero, rows.clamp(max=end), keys.clamp(max=end))
        return seen & (keys <= end)

    def window(self, n_keys: int) -> int | None:
        """The number of keys that a row sees, itself included, if less than `n_keys`; else None.

        The row at `n_keys - 1` decides; it need not exist unless the mask has an end.
        """
        n_keys = n_keys if self.n_rows is None else min(n_keys, self.n_rows)
        seen = self.visible(torch.tensor([n_keys - 1]), torch.arange(n_keys))
        width = int(seen.sum())
        return None if width >= n_keys else width

    def is_causal(self, n_keys: int, window: int | None) -> Tensor:
        """0-d bool: true if each row t sees exactly itself and the past, at most `window` keys.

        Checked are the edges of each row's visible keys, and every key of some rows; of a mask that
        reads a tensor, every key of every row. The device is not synchronized.
        """
        if self._fits is not None:
            end = torch.tensor([n_keys - 1], device=self._reads_from)
            seen = self._at(end, torch.arange(n_keys, device=self._reads_from)).sum()
            return self._fits & (seen == (n_keys if window is None else min(window, n_keys)))
        rows = torch.arange(n_keys, device=self._reads_from)
        first = torch.zeros_like(rows) if window is None else (rows - window + 1).clamp(min=0)
        fine = self._at(rows, rows) & ~self._at(rows, rows + 1) & self._at(rows, first)
        if window is not None:
            fine &= ~(self._at(rows, (first - 1).clamp(min=0)) & (first > 0))
        # An odd step meets both parities.
        step = 1 if self.n_rows is not None else (n_keys // _COMPARED) | 1
        some = rows[::step]
        expected = causal_mask(window, self._reads_from).visible(some, rows)
        return fine.all() & (self.visible(some, rows) == expected).all()


def causal_mask(window: int | Tensor | None, device: torch.device) -> LazyMask:
    """The mask that shows a row all past keys and its own, or the last `window` of them."""

    def function(_: Any, __: Any, rows: Tensor, keys: Tensor) -> Tensor:
        past = keys <= rows
        return past if window is None else past & (keys > rows - window)

    return LazyMask(function, device)
