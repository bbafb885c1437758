"""Files: safetensors with a format name, a version and checksums, written whole or not at all.

Every tensor has a checksum, and the rest of the header has one. A file whose values were changed
after it was written is refused. Files of the versions before checksums are read with a warning.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FormatError
from .checksums import checksum_of_json, damaged, warn_unchecked
from .files import whole_file


class Format(NamedTuple):
    """A kind of file, and the versions of it that are read."""

    name: str
    version: int  # the one that is written
    oldest: int
    checked_from: int  # the first one with checksums

    @property
    def readable(self) -> str:
        """The versions that are read, in words."""
        if self.oldest == self.version:
            return f"version {self.version}"
        return f"versions {self.oldest} to {self.version}"


def bytes_of(x: Tensor) -> Any:
    """A tensor's bytes as a flat array; x: on the CPU, copied if it is not contiguous."""
    flat = x.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy() if len(flat) else b""


def checksum(x: Tensor) -> str:
    """xxh3's 64 bits of a tensor's bytes, in hexadecimal."""
    return str(xxhash.xxh3_64_hexdigest(bytes_of(x.cpu())))


def save_tensors(
    path: str | os.PathLike[str],
    kind: Format,
    tensors: dict[str, Tensor],
    fields: dict[str, Any],
) -> None:
    """Saves tensors and JSON-able fields as a file of a kind, with checksums."""
    tensors = {name: x.contiguous().cpu() for name, x in tensors.items()}
    sums = {name: checksum(x) for name, x in tensors.items()}
    metadata = {"format": kind.name, "version": str(kind.version), "fields": json.dumps(fields)}
    metadata["checksums"] = json.dumps(sums)
    metadata["checksum"] = _header_sum(metadata, tensors)
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata)


def _header_sum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    shapes = {name: [str(x.dtype), list(x.shape)] for name, x in tensors.items()}
    return checksum_of_json([{**metadata, "checksum": None}, shapes])


def load_tensors(
    path: str | os.PathLike[str], kind: Format
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Loads what `save_tensors` saved. A warning says where a file's version has no checksums.

    Raises FormatError for a truncated, foreign or damaged file.
    """
    check_is_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            version = version_of(path, metadata, kind)
            fields = json.loads(metadata["fields"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if version >= kind.checked_from:
            _check(path, metadata, tensors)
        return tensors, fields
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise FormatError(f"{path}: not a whole {kind.name} file ({error})") from error


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Raises FormatError for a directory."""
    if os.path.isdir(path):
        raise FormatError(f"{path}: is a directory; expected a file")


def version_of(path: str | os.PathLike[str], metadata: Mapping[str, str], kind: Format) -> int:
    """A file's version. A warning says where it has no checksums.

    Raises FormatError for a file of another kind, or of a version that is not read.
    """
    if metadata.get("format") != kind.name:
        raise FormatError(
            f"{path}: expected a file of format {kind.name!r}, got {metadata.get('format')!r}"
        )
    found = metadata.get("version")
    versions = {str(v): v for v in range(kind.oldest, kind.version + 1)}
    if found not in versions:
        raise FormatError(
            f"{path}: {kind.name} has version {found}, this ifr_fast reads {kind.readable}"
        )
    if versions[found] < kind.checked_from:
        if metadata.keys() - {"format", "version", "fields"}:
            raise damaged(path, "its version")
        warn_unchecked(path, found)
    return versions[found]


def _check(
    path: str | os.PathLike[str], metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Raises FormatError for values that do not match their checksums."""
    if metadata["checksum"] != _header_sum(metadata, tensors):
        raise damaged(path, "its header")
    sums = json.loads(metadata["checksums"])
    for name, x in tensors.items():
        if sums[name] != checksum(x):
            raise damaged(path, f"tensor {name!r}")
