"""Stand-ins for the tensors of a softmax attention that a model computes by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .masks import HIDDEN


class _Meaning(NamedTuple):
    """Scores scale * q kᵀ + biases, except where hidden; their softmax if `softmaxed`."""

    q: Tensor  # [..., T, K]
    k: Tensor  # [..., S, K]
    scale: float = 1.0
    biases: tuple[tuple[float, Tensor], ...] = ()  # factor; tensor that broadcasts to [..., T, S]
    visible: tuple[Tensor, ...] = ()  # bool; each broadcasts to [..., T, S]
    hidden: tuple[Tensor, ...] = ()  # bool; each broadcasts to [..., T, S]
    zeroed: tuple[Tensor, ...] = ()  # bool; where scores are 0 until a bias hides them
    softmaxed: bool = False

    def times(self, factor: float) -> _Meaning:
        biases = tuple((factor * c, bias) for c, bias in self.biases)
        return self._replace(scale=factor * self.scale, biases=biases)


class _Scores(Tensor):
    """A stand-in for a product of batched matrices and the changes made to it since."""

    meaning: _Meaning
    compute: Callable[[], Tensor]

    @staticmethod
    def of(like: Tensor, meaning: _Meaning, compute: Callable[[], Tensor]) -> _Scores:
        """A stand-in with the shape and dtype of `like`."""
        scores: _Scores = Tensor._make_wrapper_subclass(
            _Scores, like.shape, dtype=like.dtype, device=meaning.q.device
        )
        scores.meaning, scores.compute = meaning, compute
        return scores

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} reached a stand-in outside the forward that made it")


def _times(x: _Scores, factor: Any) -> _Meaning | None:
    if x.meaning.softmaxed:
        return None
    if not isinstance(factor, Tensor):
        return x.meaning.times(float(factor))
    zero = factor == 0
    if factor.shape[-2:] != x.shape[-2:] or not bool((zero | (factor == 1)).all()):
        return None
    return x.meaning._replace(zeroed=(*x.meaning.zeroed, zero))


def _at_least(x: _Scores, least: Any = 0.0, **dim: Any) -> _Meaning | None:
    return None if dim or x.meaning.softmaxed or not _hides(least) else x.meaning


def _over(x: _Scores, divisor: Any) -> _Meaning | None:
    return None if isinstance(divisor, Tensor) else _times(x, 1 / float(divisor))


def _plus(x: _Scores, bias: Any) -> _Meaning | None:
    if not isinstance(bias, Tensor) or x.meaning.softmaxed:
        return None
    return x.meaning._replace(biases=(*x.meaning.biases, (1.0, bias)))


def _filled(x: _Scores, hidden: Tensor, value: Any) -> _Meaning | None:
    if not _hides(value) or x.meaning.softmaxed:
        return None
    return x.meaning._replace(hidden=(*x.meaning.hidden, hidden))


def _where(visible: Any, x: Any, value: Any) -> _Meaning | None:
    if not isinstance(x, _Scores) or not _hides(value) or x.meaning.softmaxed:
        return None
    return x.meaning._replace(visible=(*x.meaning.visible, visible))


def _softmax(x: _Scores, dim: int, **_: Any) -> _Meaning | None:
    if dim not in (-1, x.ndim - 1) or x.meaning.softmaxed:
        return None
    return x.meaning._replace(softmaxed=True)


def _dropout(
    x: _Scores, p: float = 0.5, training: bool = True, inplace: bool = False
) -> _Meaning | None:
    return None if training and p > 0 else x.meaning


def _cast(x: _Scores, *dtype: torch.dtype) -> _Meaning | None:
    return x.meaning if all(isinstance(item, torch.dtype) for item in dtype) else None


def _reshaped(x: _Scores, *shape: Any) -> _Meaning | None:
    if not isinstance(shape[0], int):
        (shape,) = shape
    if len(shape) < 3:
        return None
    kept = all(size in (-1, n) for size, n in zip(shape[-2:], x.shape[-2:], strict=True))
    return x.meaning if kept else None


def _hides(value: Any) -> bool:
    """True if a score filled with `value` gets no weight."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and float(value) <= HIDDEN
    return float(value) <= HIDDEN


_CHANGES: dict[str, Callable[..., _Meaning | None]] = {
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "__imul__", "mul_"), _times),
    **dict.fromkeys(("div", "__truediv__", "__itruediv__", "div_"), _over),
    **dict.fromkeys(("add", "__add__", "__radd__", "__iadd__", "add_"), _plus),
    **dict.fromkeys(("masked_fill", "masked_fill_"), _filled),
    **dict.fromkeys(("max", "maximum"), _at_least),
    **dict.fromkeys(("to", "float", "type"), _cast),
    **dict.fromkeys(("view", "reshape"), _reshaped),
    "where": _where,
    "softmax": _softmax,
    "dropout": _dropout,
}
_COMMUTE = {"mul", "__mul__", "__rmul__", "add", "__add__", "__radd__"}
_RESHAPES = {"to", "float", "type", "view", "reshape"}
