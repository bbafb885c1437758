"""Exact products of float32 matrices, where TF32 or bfloat16 may have been allowed for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import torch

_lock = Lock()
_within = 0  # contexts that are open, of all threads: the setting is the process's
_restore: Callable[[], None] = lambda: None  # noqa: E731


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside the context, torch multiplies float32 matrices in float32: with factors rounded to
    TF32, the parts of a node do not add up to it. The process's own setting is restored after.
    """
    global _within, _restore
    with _lock:
        if _within == 0:
            _restore = _forbid()
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if _within == 0:
                _restore()


def _forbid() -> Callable[[], None]:
    """Forbids it; returns what allows it again. Torch has two interfaces, of which reading the
    older one raises an error where the newer one was used.
    """
    backends = (torch.backends.cuda, torch.backends.mkldnn)
    newer = [x.matmul for x in backends if hasattr(getattr(x, "matmul", None), "fp32_precision")]
    before = [x.fp32_precision for x in newer]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    if older in (None, "highest") and set(before) <= {"none", "ieee"}:
        return lambda: None

    def put(precision: str | None, values: list[str]) -> None:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for x, value in zip(newer, values, strict=True):
            x.fp32_precision = value

    put(None if older is None else "highest", ["ieee"] * len(newer))
    return lambda: put(older, before)
