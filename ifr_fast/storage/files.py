"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import IfrError


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
