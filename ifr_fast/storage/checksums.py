"""Checksums of what is written to files, and what is said of files that do not match theirs."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import xxhash

from ..errors import FormatError


def checksum_of_json(document: Any) -> str:
    """xxh3's 64 bits of a document that JSON can hold, whatever the order of its keys."""
    text = json.dumps(document, sort_keys=True)
    return str(xxhash.xxh3_64_hexdigest(text.encode()))


def damaged(path: str | os.PathLike[str], what: str) -> FormatError:
    """The error for a file whose content is not what was written."""
    return FormatError(f"{path}: is damaged: {what} does not match its checksum")


def warn_unchecked(path: str | os.PathLike[str], version: object) -> None:
    """Says that a file's version has no checksums."""
    warnings.warn(
        f"{path}: files of version {version} have no checksums, so its values are unchecked; "
        "save it again to have them checked",
        stacklevel=3,
    )
