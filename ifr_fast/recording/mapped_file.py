"""Recordings as files: safetensors mapped into memory, complete or to be resumed.

A file is laid out and its space reserved before anything is computed; its tensors are then written
through the mapping. `commits` holds two records of what is done: the number of steps done, the
total, each tensor's checksum over the leading rows that are done, and a checksum of the record.
They are written in turn, so that one of them is always whole. A step counts once its data are on
the disk, so the file of an interrupted run never claims data that it lacks. Numbers of 8 bytes come
first, so that all tensors are aligned.

Checksums are compared when a tensor is first used (`MappedFile.check`), not when the file is
opened: a long text's recording is larger than the memory.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FormatError, IfrError
from ..storage.checksums import checksum_of_json, damaged
from ..storage.files import whole_file
from ..storage.tensors import Format, check_is_file, checksum, version_of

FORMAT = Format("ifr_fast.recording", version=2, oldest=1, checked_from=2)
_COMMITS = "commits"
_UNCHECKED = "progress"  # in place of `commits` in version 1: steps done and total
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


class MappedFile:
    """A recording's file, mapped into memory."""

    def __init__(
        self,
        path: Path | None,
        tensors: dict[str, Tensor],
        fields: dict[str, Any],
        commits: Tensor | None,
        progress: tuple[int, int],
    ) -> None:
        self.path = path  # None: a file without a name, deleted with its last tensor
        self.tensors = tensors
        self.fields = fields
        self.done, self.total = progress  # steps whose data the file holds, and all steps
        self._commits = commits  # [2, 3 + n] int64; None: the file's version has no checksums
        self._sums: dict[str, int] = {}
        if commits is not None and (last := _last(commits)) is not None:
            self._sums = dict(zip(sorted(tensors), commits[last, 2:-1].tolist(), strict=True))

    @property
    def is_checked(self) -> bool:
        """True if the file has checksums."""
        return self._commits is not None

    def check(self, names: Iterable[str]) -> None:
        """Compares complete tensors with their checksums. Raises FormatError for one that differs,
        and KeyError for one that is not there.
        """
        self.check_rows(dict.fromkeys(names))

    def check_rows(self, rows: Mapping[str, int | None]) -> None:
        """`check` of leading rows of tensors, by name, those that were done at the last commit."""
        for name, n in rows.items():
            x = self.tensors[name]
            if self._commits is not None and self._sums[name] != _sum(x, n):
                raise damaged(self.path or "recording", f"tensor {name!r}")

    def commit(self, done: int, written: Mapping[str, int | None]) -> None:
        """Writes the data to the disk, and then the number of steps done.

        written: the tensors that were written to since the last commit, and the numbers of their
        leading rows that are done; None: all.
        """
        self._sync()
        self.done = done
        if self.path is None or self._commits is None:
            return
        for name, rows in written.items():
            self._sums[name] = _sum(self.tensors[name], rows)
        record = [done, self.total, *(self._sums[name] for name in sorted(self.tensors))]
        last = _last(self._commits)
        self._commits[0 if last is None else 1 - last] = torch.tensor([*record, _digest(record)])
        self._sync()

    def _sync(self) -> None:
        if self.path is None:
            return
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sum(x: Tensor, rows: int | None) -> int:
    """The checksum of a tensor's leading rows, as int64."""
    return _signed(int(checksum(x if rows is None else x[:rows]), 16))


def _digest(record: list[int]) -> int:
    return _signed(xxhash.xxh3_64_intdigest(b"".join(x.to_bytes(8, "little", signed=True)
                                                     for x in record)))  # fmt: skip


def _signed(x: int) -> int:
    return x - (x >> 63 << 64)


def _last(commits: Tensor) -> int | None:
    """The record of the two that is whole and has more steps done; None if there is none."""
    records = [(record, digest) for *record, digest in commits.tolist()]
    whole = [i for i, (record, digest) in enumerate(records) if _digest(record) == digest]
    return max(whole, key=lambda i: records[i][0][0], default=None)


@contextmanager
def alone(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within, no other run records into `path`: a lock lies beside the file. Raises IfrError if
    another run does.
    """
    place = f"{os.path.realpath(path)}.lock"
    lock = FileLock(place, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise IfrError(
            f"{path}: another run is recording into it; wait for its end, or expected a new path"
        ) from error
    except OSError:  # a folder that only can be read may hold a complete file
        yield
        return
    try:
        yield
    finally:
        Path(place).unlink(missing_ok=True)
        lock.release()


def create(
    path: str | os.PathLike[str], specs: Mapping[str, Spec], fields: dict[str, Any], n_steps: int
) -> MappedFile:
    """A new file with room for `specs`; none of its `n_steps` is done.

    Raises IfrError if the system refuses, for example on a full disk.
    """
    with whole_file(path) as temporary:
        _lay_out(temporary, specs, fields)
        _begin(temporary, n_steps)
    return _mapped(Path(os.path.realpath(path)), writable=True)


def create_nameless(specs: Mapping[str, Spec], fields: dict[str, Any], n_steps: int) -> MappedFile:
    """`create` for a file without a name, in the folder for temporary files ($TMPDIR)."""
    with tempfile.TemporaryDirectory(prefix="ifr_fast.") as folder:
        made = create(Path(folder, "recording"), specs, fields, n_steps)
    made.path = made._commits = None
    return made


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], fields: dict[str, Any]
) -> None:
    """Writes a complete file of `tensors`, which are copied one by one."""
    specs = {name: Spec.of(x) for name, x in tensors.items()}
    with whole_file(path) as temporary:
        _lay_out(temporary, specs, fields)
        made = _begin(temporary, 1)
        for name, x in tensors.items():
            made.tensors[name].copy_(x)
        made.commit(1, dict.fromkeys(tensors))


def open_file(path: str | os.PathLike[str], *, writable: bool = False) -> MappedFile:
    """The file of a recording, complete or not.

    Raises FormatError for a truncated or foreign file, and for one whose header is damaged.
    """
    check_is_file(path)
    try:
        return _mapped(Path(os.path.realpath(path)), writable)
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except (SafetensorError, OSError, LookupError, ValueError, RuntimeError, TypeError) as error:
        raise FormatError(f"{path}: not a whole {FORMAT.name} file ({error})") from error


def _begin(path: Path, n_steps: int) -> MappedFile:
    """A file that was just laid out; a record that nothing is done is written."""
    made = _mapped(path, writable=True, total=n_steps)
    made.commit(0, {name: 0 if x.ndim else None for name, x in made.tensors.items()})
    return made


def _lay_out(path: Path, specs: Mapping[str, Spec], fields: dict[str, Any]) -> None:
    specs = {_COMMITS: Spec(torch.int64, (2, 3 + len(specs))), **specs}
    metadata = {
        "format": FORMAT.name,
        "version": str(FORMAT.version),
        "fields": json.dumps(fields),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        begin, end = end, end + spec.nbytes
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    metadata["checksum"] = checksum_of_json(header)
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


def _mapped(path: Path, writable: bool, total: int | None = None) -> MappedFile:
    """total: the number of steps of a file without records."""
    with safe_open(path, framework="pt") as file:  # raises if the file is truncated
        metadata = file.metadata() or {}
    version = version_of(path, metadata, FORMAT)
    with path.open("rb") as file:
        start = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start))
        start += 8
    if version >= FORMAT.checked_from:
        found = header["__metadata__"].pop("checksum")
        if found != checksum_of_json(header):
            raise damaged(path, "its header")
    # A private mapping that is only read shares its pages with the system's cache too.
    content = torch.from_file(
        str(path), shared=writable, size=path.stat().st_size, dtype=torch.uint8
    )
    del header["__metadata__"]
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        mapped = content[start + begin : start + end].view(_DTYPES[entry["dtype"]])
        tensors[name] = mapped.view(entry["shape"])
    fields = json.loads(metadata["fields"])
    if version < FORMAT.checked_from:
        done, total = tensors.pop(_UNCHECKED).tolist()
        return MappedFile(path, tensors, fields, None, (done, total))
    commits = tensors.pop(_COMMITS)
    if total is None:
        last = _last(commits)
        if last is None:
            raise damaged(path, "its record of what is done")
        done, total = commits[last, :2].tolist()
    else:
        done = 0
    return MappedFile(path, tensors, fields, commits, (done, total))
