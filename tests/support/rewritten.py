"""Safetensors files written again with something changed, and with checksums that agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ifr_fast.storage.tensors import _header_sum, checksum


def rewrite(
    path: Path,
    drop: str | None = None,
    fields: Any = ...,
    version: int | None = None,
    **tensors: Any,
) -> None:
    """Writes the file again without one tensor, with other fields, or with tensors changed.

    fields: in place of all, or a function of them that gives those to change; ... drops one.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        kept = {k: file.get_tensor(k) for k in file.keys() if k != drop}  # noqa: SIM118
    if callable(fields):
        of_file = json.loads(metadata["fields"])
        changed = of_file | fields(of_file)
        fields = {name: value for name, value in changed.items() if value is not ...}
    if fields is not ...:
        metadata["fields"] = json.dumps(fields)
    for name, change in tensors.items():
        kept[name] = change(kept[name]).contiguous()
    sums = {name: checksum(x) for name, x in kept.items()}
    metadata["checksums"] = json.dumps(sums)
    metadata["checksum"] = _header_sum(metadata, kept)
    if version is not None:  # an older one, without checksums
        metadata = {"format": metadata["format"], "version": str(version)} | {
            "fields": metadata["fields"]
        }
    save_file(kept, path, metadata)


def put(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change that replaces one value of a tensor's copy."""

    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.view(-1)[index] = value
        return x

    return change


def tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
