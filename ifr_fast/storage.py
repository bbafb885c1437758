"""Files: safetensors with a format name, a version and checksums, written whole or not at all.

Every tensor has a checksum, and the rest of the header has one. A file whose values were changed
after it was written is refused. Files of the versions before checksums are read with a warning.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checksums import checksum_of_json, damaged, warn_unchecked
from .errors import FormatError, IfrError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path, whose file replaces `path` if the block succeeds.

    Links are followed and an existing file's mode is kept. A FIFO or a device such as /dev/null is
    written to, not replaced. Raises IfrError with the path if the system refuses; an existing file
    is then unchanged.
    """
    temporary = None
    try:
        mode = _mode(path)
        replaced = mode is None or stat.S_ISREG(mode)
        target = Path(os.path.realpath(path) if replaced else path)
        folder = target.parent if replaced else Path(tempfile.gettempdir())
        temporary = folder / f".ifr_fast.{secrets.token_hex(8)}"
        # os.open applies the umask to the mode of the new file.
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        os.close(os.open(temporary, flags, 0o666 if replaced else 0o600))
        if mode is None:
            mode = temporary.stat().st_mode
        yield temporary
        if replaced:
            if temporary.stat().st_mode != mode:
                temporary.chmod(stat.S_IMODE(mode))
            temporary.replace(target)
        else:
            with temporary.open("rb") as whole, open(os.open(target, os.O_WRONLY), "wb") as special:
                shutil.copyfileobj(whole, special)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise IfrError(f"{path}: cannot be written ({reason})") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _mode(path: str | os.PathLike[str]) -> int | None:
    """Mode of the file that a path leads to; None if there is none."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all; lone surrogates become replacement marks."""
    with whole_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="replace"))


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
