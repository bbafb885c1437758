"""Standard output that breaks, fills up or lacks characters, and processes that end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command import COMMAND, Ran, assert_one_error, shell

from ifr_fast import __version__

FULL = "error: standard output cannot be written to (No space left on device)"
CLOSED = "error: standard output cannot be written to (Bad file descriptor)"


def test_failing_in_a_process_of_its_own(tmp_path: Path) -> None:
    ran = shell("trace", "--file", tmp_path / "missing", "--save", "out", cwd=tmp_path)
    assert_one_error(ran, "No such file", str(tmp_path / "missing"))
    assert list(tmp_path.iterdir()) == []


def test_version_in_a_process_of_its_own() -> None:
    assert shell("--version") == Ran(0, f"ifr-fast {__version__}\n", "")


def test_a_reader_that_stops_reading(
    trace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ifr-fast trace ... | head -0`: the files are whole, and nothing is complained about."""
    path = tmp_path / "out.json"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert trace("some words", "--json", path) == Ran(141, "", f"wrote {path}\n")
    assert json.loads(path.read_text())["tokens"] == list("some words")


def test_a_process_whose_reader_stops_reading() -> None:
    """The interpreter flushes once more when it exits."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen([COMMAND, "--version"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, err = process.communicate()
    assert (process.returncode, err) == (141, b"")


def test_a_terminal_that_cannot_show_everything(
    ifr: Any, trace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ascii_streams() -> tuple[io.BytesIO, io.BytesIO]:
        out, err = io.BytesIO(), io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, "ascii", write_through=True))
        return out, err

    out, err = ascii_streams()
    path = tmp_path / "caf\u00e9.json"
    assert trace("words", "--json", path).code == 0
    assert out.getvalue().startswith(b"after ?s?@4 the model predicts ")
    assert err.getvalue().decode() == f"wrote {tmp_path / 'caf?.json'}\n"
    assert json.loads(path.read_text())["tokens"] == list("words")
    out, err = ascii_streams()
    code = ifr("trace", "-m", tmp_path / "caf\u00e9", "words").code
    assert_one_error(Ran(code, out.getvalue().decode(), err.getvalue().decode()), "caf?")


def test_a_full_standard_output(trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for more in ([], ["--json", "-"]):
        full = open("/dev/full", "w")  # noqa: SIM115  # closing it fails
        monkeypatch.setattr(sys, "stdout", full)
        ran = trace("some words", *more)
        assert ran == Ran(2, "", f"{FULL}\n")
        with suppress(OSError):
            full.close()


def test_a_process_whose_standard_output_is_full() -> None:
    with open("/dev/full", "wb") as full:
        ran = subprocess.run([COMMAND, "--version"], stdout=full, stderr=-1, check=False)
    assert ran.returncode == 2
    assert ran.stderr == f"{FULL}\n".encode()


def closed(*args: Any, close: str) -> Ran:
    """Runs the command in a shell that closes descriptors, as `ifr-fast trace hi >&-` does."""
    line = ["sh", "-c", f'exec "$0" "$@" {close}', COMMAND, *map(str, args)]
    ran = subprocess.run(line, capture_output=True, check=False)
    return Ran(ran.returncode, ran.stdout.decode(), ran.stderr.decode())


def test_closed_standard_streams(tiny_dir: Path, tmp_path: Path) -> None:
    """What is opened later must not get the descriptor of a stream that is closed."""
    path = tmp_path / "out.json"
    given = ("trace", "-m", tiny_dir, "words", "--json")
    assert closed(*given, path, close=">&-") == Ran(2, "", f"wrote {path}\n{CLOSED}\n")
    assert json.loads(path.read_text())["tokens"] == list("words")
    assert closed(*given, "-", close=">&- <&-") == Ran(2, "", f"{CLOSED}\n")
    assert closed(*given, "-", close=">&- 2>&-") == Ran(2, "", "")
    assert closed("--help", close=">&-") == Ran(2, "", f"{CLOSED}\n")


@pytest.mark.parametrize("args", [["--help"], ["doctor", "--impl", "x"]])
def test_a_reader_of_both_streams_that_stops_reading(args: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run([COMMAND, *args], stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert ran.returncode == 141


# A module that is imported as the command starts, and as it opens the model.
@pytest.mark.parametrize(
    ("module", "becomes"),
    [("typer", "KeyboardInterrupt"), ("numpy", "ImportError"), ("transformers", "SystemError")],
)
def test_an_interrupted_import(module: str, becomes: str) -> None:
    """Ctrl-C within an import ends the command quietly, whatever the import makes of it."""
    code = f"""
import builtins, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
imported = builtins.__import__
def interrupt(name, *args, **kwargs):
    if name == {module!r}:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise {becomes}
    return imported(name, *args, **kwargs)
from ifr_fast.cli import main
builtins.__import__ = interrupt
sys.argv = ["ifr-fast", "doctor"]
main()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, b"", b"")


def test_warnings_are_one_plain_line() -> None:
    """They name no source file. Python itself prints them, so the command runs on its own."""
    code = (
        "import sys, warnings; from ifr_fast.cli import root; "
        "root.app = lambda: warnings.warn('one [thing]\\nand \x1b[31m another', stacklevel=1); "
        "root.run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (found,) = [line for line in done.stderr.splitlines() if "thing" in line]
    assert found.startswith("warning: one [thing] and ")
    assert "\x1b" not in found
    assert ".py" not in found
