"""Files: safetensors with a format name and version, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
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
    path: str | os.PathLike[str], format_name: str, version: int, *, oldest: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Loads what `save_tensors` saved, in any version from `oldest` to `version`.

    Raises FormatError for a truncated or foreign file.
    """
    oldest = version if oldest is None else oldest
    readable = f"version {version}" if oldest == version else f"versions {oldest} to {version}"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format_name:
                raise FormatError(
                    f"{path}: expected a file of format {format_name!r}, "
                    f"got {metadata.get('format')!r}"
                )
            if metadata.get("version") not in {str(v) for v in range(oldest, version + 1)}:
                raise FormatError(
                    f"{path}: {format_name} has version {metadata.get('version')}, "
                    f"this ifr_fast reads {readable}"
                )
            fields = json.loads(metadata["fields"])
            return {key: file.get_tensor(key) for key in file.keys()}, fields  # noqa: SIM118
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise FormatError(f"{path}: not a whole {format_name} file ({error})") from error
