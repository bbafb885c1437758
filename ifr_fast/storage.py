"""Files: safetensors with a format name and version, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import FormatError, IfrError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and moves it there if the block succeeds.

    Raises IfrError, naming the path, where the system refuses; `path` is then as it was.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise IfrError(f"{target}: cannot be written ({error.strerror})") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise IfrError(f"{target}: cannot be written ({reason})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all; lone surrogates become replacement marks."""
    with whole_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="replace"))


def save_tensors(
    path: str | os.PathLike[str],
    format_name: str,
    version: int,
    tensors: dict[str, Tensor],
    fields: dict[str, Any],
) -> None:
    """Saves tensors and JSON-able fields under a format name and version."""
    metadata = {"format": format_name, "version": str(version), "fields": json.dumps(fields)}
    with whole_file(path) as temporary:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, metadata)


def load_tensors(
    path: str | os.PathLike[str], format_name: str, version: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` saved. Raises FormatError for a truncated or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format_name:
                raise FormatError(
                    f"{path}: expected a file of format {format_name!r}, "
                    f"got {metadata.get('format')!r}"
                )
            if metadata.get("version") != str(version):
                raise FormatError(
                    f"{path}: {format_name} has version {metadata.get('version')}, "
                    f"this ifr_fast reads version {version}"
                )
            fields = json.loads(metadata["fields"])
            return {key: file.get_tensor(key) for key in file.keys()}, fields  # noqa: SIM118
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise FormatError(f"{path}: not a whole {format_name} file ({error})") from error
