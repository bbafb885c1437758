"""Counts of loads, stores and products of Triton kernels, while Triton's interpreter runs them.

    with counting() as work:
        launch(...)
    work["kernel_name"].products

Elements are counted under their mask, one program after the other: what each program asks for,
whatever a cache would make of it. Needs TRITON_INTERPRET=1 before triton is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter

SPECIAL = (np.exp, np.exp2, np.log, np.log2, np.sqrt, np.divide)


@dataclass
class KernelWork:
    """One kernel's work, all of its launches together."""

    launches: int = 0
    programs: int = 0
    loads: int = 0  # elements
    loaded: int = 0  # bytes
    stores: int = 0
    stored: int = 0
    atomics: int = 0
    atomic: int = 0  # bytes
    products: Counter[str] = field(default_factory=Counter)  # multiply-adds, by operand dtype
    operands: int = 0  # elements of the products' operands
    special: int = 0  # elements of exp2, log2, square roots and quotients, of blocks
    vector: int = 0  # elements of all other operations on blocks, as written; of sums, the terms
    distinct_loaded: int = 0  # bytes, an address counted once a launch
    distinct_stored: int = 0  # the same of stores and atomics


class _Launch:
    """The kernel that runs, and the addresses it has touched."""

    def __init__(self, work: KernelWork) -> None:
        self.work = work
        self.touched: dict[str, dict[int, list[np.ndarray]]] = {"loaded": {}, "stored": {}}

    def touch(self, kind: str, addresses: np.ndarray, size: int) -> None:
        of_size = self.touched[kind].setdefault(size, [])
        of_size.append(np.unique(addresses))
        if len(of_size) > 256:
            of_size[:] = [np.unique(np.concatenate(of_size))]

    def distinct(self, kind: str) -> int:
        return sum(
            size * len(np.unique(np.concatenate(addresses)))
            for size, addresses in self.touched[kind].items()
        )


@contextmanager
def counting() -> Iterator[dict[str, KernelWork]]:
    """Counts the launches within, by kernel name."""
    work: dict[str, KernelWork] = {}
    running: list[_Launch] = []
    builder = interpreter.InterpreterBuilder

    def accessed(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
        addresses = np.asarray(pointers.data)
        chosen = addresses[np.broadcast_to(mask.data, addresses.shape)]
        return chosen, max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def load(
        original: Callable[..., Any], self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        launch = running[-1]
        addresses, size = accessed(pointers, mask)
        launch.work.loads += addresses.size
        launch.work.loaded += addresses.size * size
        launch.touch("loaded", addresses, size)
        return original(self, pointers, mask, *rest, **named)

    def store(
        original: Callable[..., Any], self: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        launch = running[-1]
        addresses, size = accessed(pointers, mask)
        launch.work.stores += addresses.size
        launch.work.stored += addresses.size * size
        launch.touch("stored", addresses, size)
        return original(self, pointers, value, mask, *rest)

    def atomic(
        original: Callable[..., Any], self: Any, op: Any, pointers: Any, value: Any, mask: Any,
        *rest: Any,
    ) -> Any:  # fmt: skip
        launch = running[-1]
        addresses, size = accessed(pointers, mask)
        launch.work.atomics += addresses.size
        launch.work.atomic += addresses.size * size
        launch.touch("stored", addresses, size)
        return original(self, op, pointers, value, mask, *rest)

    def dot(original: Callable[..., Any], self: Any, a: Any, b: Any, *rest: Any) -> Any:
        work = running[-1].work
        work.products[str(a.dtype.scalar)] += a.data.size * b.data.shape[-1]
        work.operands += a.data.size + b.data.size
        return original(self, a, b, *rest)

    def elementwise(original: Callable[..., Any], self: Any, *operands: Any) -> Any:
        result = original(self, *operands)
        size = result.data.size
        if size == 1:
            return result  # a scalar: a program has one, not one a lane
        if operands[-1] in SPECIAL:
            running[-1].work.special += size
        else:
            running[-1].work.vector += size
        return result

    def reduction(original: Callable[..., Any], self: Any, values: Any) -> Any:
        running[-1].work.vector += values[0].handle.data.size
        return original(self, values)

    def launch(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.fn.__name__
        running.append(_Launch(work.setdefault(name, KernelWork())))
        try:
            return original(self, *args, **kwargs)
        finally:
            done = running.pop()
            done.work.launches += 1
            done.work.programs += int(np.prod(interpreter.interpreter_builder.grid_dim))
            done.work.distinct_loaded += done.distinct("loaded")
            done.work.distinct_stored += done.distinct("stored")

    options = interpreter.InterpreterOptions(sanitize_overflow=False)  # as compiled code has none
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(interpreter.interpreter_builder, "options", options))
        for owner, name, counted in (
            (builder, "create_masked_load", load),
            (builder, "create_masked_store", store),
            (builder, "create_atomic_rmw", atomic),
            (builder, "create_dot", dot),
            (builder, "unary_op", elementwise),
            (builder, "binary_op", elementwise),
            (builder, "ternary_op", elementwise),
            (builder, "cast_impl", elementwise),
            (interpreter.ReduceOps, "apply_impl", reduction),
            (interpreter.ScanOps, "apply_impl", reduction),
            (interpreter.GridExecutor, "__call__", launch),
        ):
            stack.enter_context(mock.patch.object(owner, name, _around(owner, name, counted)))
        yield work


def _around(owner: type, name: str, counted: Callable[..., Any]) -> Callable[..., Any]:
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return counted(original, self, *args, **kwargs)

    return method
