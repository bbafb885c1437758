"""Recordings as files: safetensors mapped into memory, complete or to be resumed.

A file is laid out and its space reserved before anything is computed; its tensors are then written
through the mapping. `progress` holds the number of steps done and the total. A step counts once its
data are on the disk, so the file of an interrupted run never claims data that it lacks. Numbers of
8 bytes come first, so that all tensors are aligned.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FormatError
from ..storage import whole_file

FORMAT = "ifr_fast.recording"
VERSION = 1
_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNMENT = 64


class Spec(NamedTuple):
    """A tensor's dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @staticmethod
    def of(x: Tensor) -> Spec:
        return Spec(x.dtype, tuple(x.shape))

    @property
    def nbytes(self) -> int:
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


class MappedFile(NamedTuple):
    """A recording's file, mapped into memory."""

    path: Path | None  # None: a file without a name, deleted with its last tensor
    tensors: dict[str, Tensor]
    fields: dict[str, Any]

    @property
    def done(self) -> int:
        """The number of steps whose data the file holds."""
        return int(self.tensors["progress"][0])

    @property
    def total(self) -> int:
        """The number of steps of a complete recording."""
        return int(self.tensors["progress"][1])

    def commit(self, done: int) -> None:
        """Writes the data to the disk, and then the number of steps done."""
        self._sync()
        self.tensors["progress"][0] = done
        self._sync()

    def _sync(self) -> None:
        if self.path is None:
            return
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def create(
    path: str | os.PathLike[str], specs: Mapping[str, Spec], fields: dict[str, Any], n_steps: int
) -> MappedFile:
    """A new file with room for `specs`; none of its `n_steps` is done.

    Raises IfrError if the system refuses, for example on a full disk.
    """
    with whole_file(path) as temporary:
        _lay_out(temporary, specs, fields)
        made = _mapped(temporary, writable=True)
        made.tensors["progress"].copy_(torch.tensor([0, n_steps]))
    return _mapped(Path(os.path.realpath(path)), writable=True)


def create_nameless(specs: Mapping[str, Spec], fields: dict[str, Any], n_steps: int) -> MappedFile:
    """`create` for a file without a name, in the folder for temporary files ($TMPDIR)."""
    with tempfile.TemporaryDirectory(prefix="ifr_fast.") as folder:
        made = create(Path(folder, "recording"), specs, fields, n_steps)
    return made._replace(path=None)


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], fields: dict[str, Any]
) -> None:
    """Writes a complete file of `tensors`, which are copied one by one."""
    specs = {name: Spec.of(x) for name, x in tensors.items()}
    with whole_file(path) as temporary:
        _lay_out(temporary, specs, fields)
        made = _mapped(temporary, writable=True)
        for name, x in tensors.items():
            made.tensors[name].copy_(x)
        made.tensors["progress"].copy_(torch.tensor([0, 1]))
        made.commit(1)


def open_file(path: str | os.PathLike[str], *, writable: bool = False) -> MappedFile:
    """The file of a recording, complete or not.

    Raises FormatError for a truncated or foreign file.
    """
    try:
        return _mapped(Path(os.path.realpath(path)), writable)
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise FormatError(f"{path}: not a whole {FORMAT} file ({error})") from error


def _lay_out(path: Path, specs: Mapping[str, Spec], fields: dict[str, Any]) -> None:
    specs = {"progress": Spec(torch.int64, (2,)), **specs}
    metadata = {"format": FORMAT, "version": str(VERSION), "fields": json.dumps(fields)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        begin, end = end, end + spec.nbytes
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        # Writing to a mapped block that a full disk cannot provide would kill the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        else:
            file.truncate(8 + len(text) + end)


def _mapped(path: Path, writable: bool) -> MappedFile:
    with safe_open(path, framework="pt") as file:  # raises if the file is truncated
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise FormatError(
            f"{path}: expected a file of format {FORMAT!r}, got {metadata.get('format')!r}"
        )
    if metadata.get("version") != str(VERSION):
        raise FormatError(
            f"{path}: {FORMAT} has version {metadata.get('version')}, this ifr_fast reads "
            f"version {VERSION}"
        )
    with path.open("rb") as file:
        start = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start))
        start += 8
    # A private mapping that is only read shares its pages with the system's cache too.
    content = torch.from_file(
        str(path), shared=writable, size=path.stat().st_size, dtype=torch.uint8
    )
    del header["__metadata__"]
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found = content[start + begin : start + end].view(_DTYPES[entry["dtype"]])
        tensors[name] = found.view(entry["shape"])
    if tensors["progress"].dtype != torch.int64 or tensors["progress"].shape != (2,):
        raise KeyError("progress")
    return MappedFile(path, tensors, json.loads(metadata["fields"]))
