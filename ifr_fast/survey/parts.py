"""Parts of a survey as files: where they lie, and the record that completes one.

A part's record, `checksums/part-NNNNNN.json`, is written when its tables are on the disk. It holds
the part's number, the positions in the sources at which it begins and ends, and a checksum (xxh3,
128 bits) of each table's file. A part without a record does not count. Surveys of version 1 had no
records: there a part is complete with its predictions.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import xxhash

from ..errors import FormatError
from ..storage.checksums import checksum_of_json

TABLES = ("heads", "predictions")
FOLDER = "checksums"


class Cursor(NamedTuple):
    """Position in the sources at which a window begins or ends."""

    items: int  # items read so far, problems included
    left: int  # documents and problems of the last item that belong to the next window
    documents: int  # documents numbered so far
    sha256: str  # digest of the items


class PartRecord(NamedTuple):
    """A part's record."""

    part: int
    begin: Cursor
    end: Cursor
    sums: dict[str, str]  # checksums of the files, by table


def part_path(directory: Path, table: str, part: int) -> Path:
    """Path of a part of the table "predictions" or "heads"."""
    return directory / table / f"part-{part:06}.parquet"


def record_path(directory: Path, part: int) -> Path:
    """Path of a part's record."""
    return directory / FOLDER / f"part-{part:06}.json"


def whole_parts(directory: Path, *, recorded: bool = True) -> list[int]:
    """Numbers of a survey's complete parts, ascending. recorded: False in version 1."""

    def numbers(folder: str, kind: str) -> set[int]:
        paths = (directory / folder).glob(f"part-*.{kind}")
        return {int(path.stem.removeprefix("part-")) for path in paths}

    if not recorded:
        return sorted(numbers("predictions", "parquet"))
    of_tables = [numbers(table, "parquet") for table in TABLES]
    return sorted(numbers(FOLDER, "json").intersection(*of_tables))


def file_sum(path: Path) -> str:
    """The checksum of a file's bytes. Raises FormatError for one that cannot be read."""
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return str(xxhash.xxh3_128_hexdigest(b""))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return str(xxhash.xxh3_128_hexdigest(content))
    except OSError as error:
        raise FormatError(f"{path}: is broken or missing ({error.strerror})") from error


def read_record(directory: Path, part: int) -> PartRecord:
    """A part's record. Raises FormatError for one that is damaged, or another part's."""
    path = record_path(directory, part)
    try:
        document = json.loads(path.read_bytes())
        found = document.pop("checksum")
        if found != checksum_of_json(document):
            raise _damaged(path, "its content does not match its checksum")
        record = PartRecord(
            document["part"],
            Cursor(**document["begin"]),
            Cursor(**document["end"]),
            document["sums"],
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path, f"it is not the record of a part ({error!r})") from error
    if record.part != part:
        raise _damaged(path, f"it is the record of part {record.part}")
    return record


def check_file(directory: Path, table: str, part: int, record: PartRecord) -> None:
    """Raises FormatError for a part's file that is not the one that was written."""
    path = part_path(directory, table, part)
    if file_sum(path) != record.sums[table]:
        raise _damaged(path, f"its content does not match {FOLDER}/{record_path(path, part).name}")


def _damaged(path: Path, why: str) -> FormatError:
    return FormatError(f"{path}: is damaged: {why}; delete it and resume, to survey the part again")


class Checked:
    """The files of a survey that were compared with their checksums."""

    def __init__(self, directory: Path, sums: Mapping[Path, str] | None) -> None:
        """sums: the checksums of files that are not parts; None: nothing has one (version 1)."""
        self._directory, self._sums = directory, sums
        self._done: set[Path] = set()

    def check(self, path: Path) -> None:
        """Raises FormatError for a file that is damaged; reads it once."""
        if self._sums is None or path in self._done:
            return
        if path in self._sums:
            if file_sum(path) != self._sums[path]:
                raise FormatError(
                    f"{path}: is damaged: its content does not match survey.json; resume the "
                    "survey to write it again"
                )
        else:
            part = int(path.stem.removeprefix("part-"))
            record = read_record(self._directory, part)
            check_file(self._directory, path.parent.name, part, record)
        self._done.add(path)
