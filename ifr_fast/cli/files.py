"""Texts that commands read, and files that they write; '-' is standard input or output."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from ..progress import printable
from .options import DEMO_TEXT

STDOUT = Path("-")
_LONGEST_TEXT = 64 << 20  # bytes


def read_text(
    text: str | None,
    file: Path | None,
    chat: Path | None,
    continue_final: bool = False,
    no_special_tokens: bool = False,
) -> Any:
    """A string or a conversation from TEXT, --file or --chat; the demonstration without any."""
    if continue_final and chat is None:
        raise ValueError("--continue-final-message: goes with --chat")
    if no_special_tokens and chat is not None:
        raise ValueError("--no-special-tokens: goes with a text; a chat template has its own")
    if sum(x is not None for x in (text, file, chat)) > 1:
        raise ValueError("text: give one of TEXT, --file and --chat")
    if file is not None:
        return read_file("--file", file)
    if chat is not None:
        raw = _read_stdin() if chat == STDOUT else _read_bytes("--chat", chat)
        try:
            given = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--chat: {chat} is not JSON ({error})") from error
        conversation = given if isinstance(given, dict) else {"messages": given}
        messages = conversation.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise ValueError(
                "--chat: expected a JSON list of {role, content}, or an object with such messages "
                "and tools"
            )
        return conversation | ({"continue_final_message": True} if continue_final else {})
    if text == "-":
        return _decode(_read_stdin(), "standard input")
    return DEMO_TEXT if text is None else text


def read_file(option: str, path: Path) -> str:
    """Text of a UTF-8 file."""
    return _decode(_read_bytes(option, path), str(path))


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise ValueError("text: standard input is closed")
    return _read_all(sys.stdin.buffer, "standard input")


def _read_bytes(option: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return _read_all(file, f"{option}: {path}")
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be read ({error.strerror})") from error


def _read_all(file: IO[bytes], name: str) -> bytes:
    """Reads a file up to the limit: it may be a pipe or a device without an end."""
    raw = file.read(_LONGEST_TEXT + 1) or b""  # None from an empty pipe that does not block
    if len(raw) > _LONGEST_TEXT:
        raise ValueError(
            f"{name} has more than {_LONGEST_TEXT >> 20} MiB; expected a text that a model can read"
        )
    return raw


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {name} is not UTF-8 ({error})") from error


def check_outputs(
    options: Mapping[str, Path | None], folders: Mapping[str, Path | None] | None = None
) -> list[Path]:
    """The paths given. Raises ValueError, before the work, for one that cannot be written.

    folders: options whose path is a folder, which may be there.
    """
    chosen = {option: path for option, path in options.items() if path is not None}
    option_of: dict[str, str] = {}
    for option, path in chosen.items():
        if path == STDOUT:
            other = option_of.setdefault("-", option)
            if other != option:
                raise ValueError(f"{option}: {other} already writes to standard output")
            continue
        if path.is_dir():
            raise ValueError(f"{option}: {path} is a directory; expected a file to write")
        if path.exists() and not path.is_file():  # written to, not replaced (storage.py)
            if not os.access(path, os.W_OK):
                raise ValueError(f"{option}: {path} cannot be written to")
            continue
        check_folder(option, path)
        other = option_of.setdefault(os.path.realpath(path), option)
        if other != option:
            raise ValueError(f"{option}: {other} already writes {path}; expected another file")
    for option, folder in (folders or {}).items():
        if folder is None:
            continue
        if folder == STDOUT or (
            folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK))
        ):
            raise ValueError(f"{option}: {folder} is no folder that can be written to")
        check_folder(option, folder)
        taken = option_of.get(os.path.realpath(folder))
        if taken is not None:
            raise ValueError(f"{option}: {taken} already writes {folder}; expected another folder")
        chosen[option] = folder
    return list(chosen.values())


def check_folder(option: str, path: Path) -> None:
    """Raises ValueError if no file can be created where a path leads."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"{option}: {path}: {folder} is no directory, or is not writable")


@contextmanager
def target(path: Path) -> Iterator[Path]:
    """Gives the path to write; for '-', a temporary file that is copied to standard output."""
    if path != STDOUT:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "output"
        yield whole
        sys.stdout.flush()
        sys.stdout.buffer.write(whole.read_bytes())


def print_written(outputs: Iterable[Path]) -> None:
    """Names the files that were written, on standard error."""
    console = Console(stderr=True)
    for path in outputs:
        if path != STDOUT:
            console.print(Text(f"wrote {printable(str(path))}"), soft_wrap=True)


def quote(token: str) -> str:
    """A token as it is printed."""
    return f"“{printable(token)}”"
