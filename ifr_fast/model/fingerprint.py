"""A digest of everything that a model's forward pass reads, by which results of different models
are told apart.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .digest import Digest, is_foreign, is_value, name_of, of_library
from .hooks import user_hooks

# Entries of a configuration that say where a model came from or what its outputs are called, not
# what it computes. Weights have a dtype of their own, and no pass that is watched uses a cache.
_UNREAD = {
    *("_name_or_path", "architectures", "transformers_version"),
    *("dtype", "torch_dtype", "id2label", "label2id", "use_cache"),
}
# Attributes that a module sets for itself or that do not change what it computes. `forward` and
# `config` are looked at by themselves; `to`, `cuda` and the map of devices are accelerate's.
_IGNORED = {
    *vars(nn.Module()),
    *("forward", "config", "to", "cuda", "hf_device_map"),
    *("all_tied_weights_keys", "generation_config", "kernel_config", "loss_type"),
    *("gradient_checkpointing", "max_seq_len_cached", "name_or_path"),
}


@torch.inference_mode()
def fingerprint(model: PreTrainedModel) -> str:
    """A digest of a model's configuration, of all bytes of its parameters and buffers, of its
    modules' classes and settings (such as active adapters), of methods and functions that stand in
    place of the libraries' own, and of the hooks of users.

    It is the same wherever the weights lie. Rotary tables that follow the length of the last text
    are left out.
    """
    digest = Digest()
    configs: dict[int, str] = {}
    for place, _, hook in user_hooks(model):
        digest.add(place, hook)
    walked: set[nn.Module] = set()
    roots: list[nn.Module] = [model]
    for root in roots:  # it grows
        for name, module in root.named_modules(walked):
            digest.add(name, name_of(type(module)), _config(module, configs))
            _add_module(digest, module)
        roots += digest.modules  # those in a list or a closure, which torch does not list
        digest.modules.clear()
    _add_code(digest, {type(module) for module in walked})
    return digest.hex()


def _config(module: nn.Module, known: dict[int, str]) -> str:
    """The digest of a module's configuration. known: those that were made, by id."""
    config = getattr(module, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return ""
    if id(config) not in known:
        digest = Digest()
        digest.add(_read(config.to_diff_dict()))
        known[id(config)] = digest.hex()
    return known[id(config)]


def _read(entries: dict[str, Any]) -> dict[str, Any]:
    """Entries of a configuration without those that no forward pass reads."""
    return {
        key: _read(x) if isinstance(x, dict) else x
        for key, x in entries.items()
        if key not in _UNREAD
    }


def _add_module(digest: Digest, module: nn.Module) -> None:
    """A module's own tensors and settings. Private settings of torch's and transformers' modules
    say how a model was loaded.
    """
    offloaded = any(x is not None and x.is_meta for x in module._parameters.values())
    with _loaded(module) if offloaded else nullcontext():
        for key, x in sorted({**module._parameters, **module._buffers}.items()):
            if x is not None and not _follows_text(module, key):
                digest.add_tensor(key, x, held=not offloaded)
    settings = vars(module)
    of_torch = type(module).__module__.startswith(("torch.", "transformers."))
    for key in sorted(settings.keys() - _IGNORED):
        if not (of_torch and key.startswith("_")) and is_value(settings[key]):
            digest.add(key, settings[key])
    hook = settings.get("_hf_hook")  # accelerate's own move weights
    if hook is not None and not of_library(type(hook).__module__):
        digest.add(hook)
    forward = settings.get("_old_forward" if "_hf_hook" in settings else "forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        digest.add("forward", forward)


def _add_code(digest: Digest, kinds: set[type]) -> None:
    """Methods of modules, and functions beside a library's modules, that are not the library's."""
    for kind in sorted(kinds, key=name_of):
        digest.add_class(kind)
    for name in sorted({kind.__module__ for kind in kinds if of_library(kind.__module__)}):
        for key, x in sorted(vars(sys.modules.get(name, object)).items()):
            if is_foreign(x):
                digest.add(key, x)


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
