"""A digest of everything that a model's forward pass reads, by which results of different models
are told apart.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..storage.tensors import bytes_of
from .hooks import user_hooks

_CHUNK = 1 << 24  # numbers that are copied to the host at once
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype)
_LIBRARIES = ("torch.", "transformers.")
# Attributes that a module sets for itself, or that do not change what it computes.
_IGNORED = {*vars(nn.Module()), "gradient_checkpointing", "max_seq_len_cached", "name_or_path"}


@torch.inference_mode()
def fingerprint(model: PreTrainedModel) -> str:
    """A digest of a model's configuration, of all bytes of its parameters and buffers, of its
    modules' classes and settings (such as active adapters), and of the hooks of users.

    Settings of torch's and transformers' own modules follow from the configuration; of these only
    floats count (scales, epsilons), so that a new version with more attributes changes nothing.
    Rotary tables that follow the length of the last text are left out.
    """
    config = model.config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = _Digest()
    digest.add(json.dumps(config, sort_keys=True, default=str))
    for name, module in model.named_modules():
        digest.add(name, _name_of(type(module)))
        offloaded = any(x is not None and x.is_meta for x in module._parameters.values())
        with _loaded(module) if offloaded else nullcontext():
            tensors = {**module._parameters, **module._buffers}
            for key in sorted(tensors):
                if tensors[key] is not None and not _follows_text(module, key):
                    digest.add_tensor(key, tensors[key], held=not offloaded)
        settings = vars(module)
        of_library = type(module).__module__.startswith(_LIBRARIES)
        for key in sorted(settings.keys() - _IGNORED):
            x = settings[key]
            if isinstance(x, float) if of_library else _is_plain(x):
                digest.add(key, x)
        if "forward" in settings:
            digest.add("forward", settings["forward"])
    for place, _, hook in user_hooks(model):
        digest.add(place, hook)
    return digest.hex()


def _follows_text(module: nn.Module, name: str) -> bool:
    """True for the rotary frequencies that transformers computes anew for some lengths of text."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return name.endswith("inv_freq") and any(kind in ("dynamic", "longrope") for kind in kinds)


@contextmanager
def _loaded(module: nn.Module) -> Iterator[None]:
    """Within, the weights of a module that accelerate has offloaded are loaded."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def _is_plain(x: Any) -> bool:
    """True for numbers, strings, and containers of them."""
    if isinstance(x, dict):
        return all(_is_plain(item) for pair in x.items() for item in pair)
    if isinstance(x, list | tuple | set | frozenset):
        return all(map(_is_plain, x))
    return isinstance(x, _PLAIN)


def _name_of(x: Any) -> str:
    return f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', '')}"


class _Digest:
    """A running digest of values of any kind. It depends on no address and no order of a set."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self._seen: dict[int, int] = {}  # numbers of tensors and objects, by id
        self._held: list[Any] = []  # keeps ids unique

    def hex(self) -> str:
        return self._hash.hexdigest()

    def add(self, *values: Any) -> None:
        for x in values:
            self._add(x)

    def add_tensor(self, name: str, x: Tensor, *, held: bool) -> None:
        """Adds a parameter or buffer. held: it lives on, so that tied weights are read once."""
        self._text(name)
        if held:
            self.add(x)
        else:
            self._add_tensor(x)

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
        elif isinstance(x, nn.Module) and not isinstance(x, nn.Parameter):
            self._text("module", _name_of(type(x)))  # its contents count where it is used
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
        if isinstance(x, Tensor):
            self._add_tensor(x)
        elif isinstance(x, functools.partial):
            self.add("partial", x.func, x.args, x.keywords)
        elif isinstance(x, MethodType):
            self.add("method", x.__func__, x.__self__)
        elif isinstance(x, FunctionType):
            self._add_function(x)
        elif callable(x) and not hasattr(x, "__dict__"):
            self._text("built-in", _name_of(x))
        else:
            self._text("object", _name_of(type(x)))
            if not isinstance(x, type):
                self.add(getattr(x, "__dict__", None))

    def _add_function(self, x: FunctionType) -> None:
        """A function's code, and the values that it reads: defaults, closure, globals."""
        self._text("function", _name_of(x))
        if x.__module__.startswith(_LIBRARIES):
            return
        self.add(x.__code__, x.__defaults__, x.__kwdefaults__)
        for cell in x.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # it is not set yet
                self._text("empty")
        for name in x.__code__.co_names:
            read = x.__globals__.get(name)
            of_same_file = isinstance(read, FunctionType) and read.__globals__ is x.__globals__
            if of_same_file or isinstance(read, Tensor) or (read is not None and _is_plain(read)):
                self.add(name, read)

    def _add_tensor(self, x: Tensor) -> None:
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
        for part in x.detach().contiguous().flatten().split(_CHUNK):
            self._hash.update(bytes_of(part.cpu()))
