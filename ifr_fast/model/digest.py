"""A running digest of values of any kind, from numbers to functions with all that they read."""

from __future__ import annotations

import dataclasses
import functools
import sys
from argparse import Namespace
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from ..storage.tensors import bytes_of

_CHUNK = 1 << 24  # numbers that are copied to the host at once
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, np.generic)
_NAMED = (BuiltinFunctionType, FunctionType, type)  # those whose name tells what they do
_LIBRARIES = {"accelerate", "ifr_fast", "peft", "torch", "transformers", *sys.stdlib_module_names}


def of_library(module: str) -> bool:
    """True for a Python module whose code follows from the versions of what is installed."""
    return module.partition(".")[0] in _LIBRARIES


def is_foreign(x: Any) -> bool:
    """True for a function that was written outside of the libraries. `functools.wraps` gives it
    another's name, but not another's globals.
    """
    return isinstance(x, FunctionType) and not of_library(x.__globals__.get("__name__", ""))


def is_plain(x: Any) -> bool:
    """True for numbers, strings, and containers of them."""
    return _holds(x, lambda item: isinstance(item, _PLAIN))


def is_value(x: Any) -> bool:
    """True for what a forward pass computes with: plain values, arrays, whatever can be called,
    data classes, namespaces, and containers of these. Other objects could be of any size and hold
    addresses.
    """
    return _holds(
        x,
        lambda item: (
            isinstance(item, (*_PLAIN, Tensor, np.ndarray, SimpleNamespace, Namespace))
            or callable(item)
            or dataclasses.is_dataclass(item)
        ),
    )


def _holds(x: Any, wanted: Callable[[Any], bool]) -> bool:
    """True if `wanted` is true of x, or of everything that a container holds."""
    if isinstance(x, dict):
        return all(_holds(item, wanted) for pair in x.items() for item in pair)
    if isinstance(x, list | tuple | set | frozenset):
        return all(_holds(item, wanted) for item in x)
    return wanted(x)


def name_of(x: Any) -> str:
    return f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', '')}"


class Digest:
    """A running digest of values of any kind. It depends on no address and no order of a set."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []  # those met among the values, whose contents are left
        self._hash = xxhash.xxh3_128()
        self._seen: dict[int, int] = {}  # numbers of objects, by id
        self._tensors: dict[int, bytes] = {}  # digests of tensors, by id
        self._held: list[Any] = []  # keeps ids unique

    def hex(self) -> str:
        return self._hash.hexdigest()

    def add(self, *values: Any) -> None:
        for x in values:
            self._add(x)

    def add_tensor(self, name: str, x: Tensor, *, held: bool) -> None:
        """Adds a parameter or buffer. held: it lives on, so that tied weights are read once."""
        self._text(name)
        self._add_tensor(x, held)

    def _text(self, *parts: Any) -> None:
        text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
        self._hash.update(len(text).to_bytes(8, "little") + text)

    def _add(self, x: Any) -> None:
        if isinstance(x, _PLAIN):
            self._text(type(x).__name__, repr(x))
        elif isinstance(x, dict):
            self._text("dict", len(x))
            for key in sorted(x, key=repr):
                self.add(key, x[key])
        elif isinstance(x, list | tuple):
            self._text("list", len(x))
            self.add(*x)
        elif isinstance(x, set | frozenset):
            self._text("set", *sorted(map(repr, x)))
        elif isinstance(x, Tensor):
            self._add_tensor(x, held=True)
        elif isinstance(x, np.ndarray):
            self._text("array", x.shape, x.dtype)
            self.add(x.tolist() if x.dtype.hasobject else x.tobytes())
        elif isinstance(x, nn.Module):
            self._text("module", name_of(type(x)))
            self.modules.append(x)
        elif isinstance(x, CodeType):
            self._text("code", x.co_code.hex(), *x.co_names)
            self.add(*x.co_consts)
        elif id(x) in self._seen:
            self._text("seen", self._seen[id(x)])
        else:
            self._seen[id(x)] = len(self._seen)
            self._held.append(x)
            self._add_object(x)

    def _add_object(self, x: Any) -> None:
        if isinstance(x, functools.partial):
            self.add("partial", x.func, x.args, x.keywords)
        elif isinstance(x, MethodType):
            self.add("method", x.__func__, x.__self__)
        elif isinstance(x, FunctionType):
            self._add_function(x)
        elif isinstance(x, _NAMED):
            self._text("built-in", name_of(x))
        else:
            self._text("object", name_of(type(x)))
            self.add(_attributes(x))
            self.add_class(type(x))

    def add_class(self, kind: type) -> None:
        """The methods of a class and its bases that are not the libraries' own, and the settings
        that a class of others keeps.
        """
        for base in kind.__mro__:
            ours = of_library(base.__module__)
            for name, x in sorted(vars(base).items()):
                x = x.fget if isinstance(x, property) else getattr(x, "__func__", x)
                if is_foreign(x) or not (ours or name.startswith("__") or not is_plain(x)):
                    self.add(name, x)

    def _add_function(self, x: FunctionType) -> None:
        """A function's code, and the values that it reads: defaults, closure, globals."""
        self._text("function", name_of(x))
        if not is_foreign(x):
            self.add(getattr(x, "__wrapped__", None))
            return
        self.add(x.__code__, x.__defaults__, x.__kwdefaults__)
        for cell in x.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # it is not set yet
                self._text("empty")
        for name in sorted(_names(x.__code__) & x.__globals__.keys()):
            read = x.__globals__[name]
            if is_foreign(read) or (is_value(read) and not isinstance(read, _NAMED)):
                self.add(name, read)

    def _add_tensor(self, x: Tensor, held: bool) -> None:
        self._text("tensor", type(x).__name__, tuple(x.shape), x.dtype)
        if hasattr(x, "__tensor_flatten__"):
            names, context = x.__tensor_flatten__()
            self.add(*(getattr(x, name) for name in names))
            self._text(context)
            return
        if type(x) not in (Tensor, nn.Parameter):
            self.add(getattr(x, "__dict__", None))  # scales of quantized weights
        if x.is_meta:
            return
        if x.layout != torch.strided:
            sparse = x.detach().to_sparse().coalesce()
            self.add(str(x.layout), sparse.indices(), sparse.values())
            return
        known = self._tensors.get(id(x))
        if known is None:
            known = _digest(x)
        if held:
            self._tensors[id(x)] = known
            self._held.append(x)
        self._hash.update(known)


def _digest(x: Tensor) -> bytes:
    found = xxhash.xxh3_128()
    for part in x.detach().resolve_conj().resolve_neg().contiguous().flatten().split(_CHUNK):
        found.update(bytes_of(part.cpu()))
    return found.digest()


def _names(code: CodeType) -> set[str]:
    """The names that code reads, and the functions and comprehensions in it."""
    inner = [_names(x) for x in code.co_consts if isinstance(x, CodeType)]
    return set(code.co_names).union(*inner)


def _attributes(x: Any) -> dict[str, Any]:
    """An object's attributes, those in slots too."""
    found = dict(getattr(x, "__dict__", {}))
    for base in type(x).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(x, name) and not name.startswith("__"):
                found[name] = getattr(x, name)
    return found
