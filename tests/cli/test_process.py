"""The command in a process of its own: pipes, terminals and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from command import COMMAND, Ran, assert_one_error, shell

from ifr_fast import __version__


def test_failing_in_a_process_of_its_own(tmp_path: Path) -> None:
    ran = shell("trace", "--model", tmp_path / "missing", "--save", "out", cwd=tmp_path)
    assert_one_error(ran, "no directory", str(tmp_path / "missing"))
    assert list(tmp_path.iterdir()) == []


def test_version_in_a_process_of_its_own() -> None:
    assert shell("--version") == Ran(0, f"ifr-fast {__version__}\n", "")


def test_a_reader_that_stops_reading(tiny_dir: Path, tmp_path: Path) -> None:
    """`ifr-fast trace ... | head -0`: the files are whole, and nothing is complained about."""
    path = tmp_path / "out.json"
    for args in (["trace", "-m", tiny_dir, "some words", "--json", path], ["--version"]):
        reader, writer = os.pipe()
        os.close(reader)
        process = subprocess.Popen(
            [COMMAND, *map(str, args)], stdout=writer, stderr=subprocess.PIPE, text=True
        )
        os.close(writer)
        _, err = process.communicate()
        assert process.returncode == 1
        assert err == (f"wrote {path}\n" if "--json" in args else "")
    assert json.loads(path.read_text())["tokens"] == list("some words")


def test_a_terminal_that_cannot_show_everything(tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "caf\u00e9.json"
    ran = shell("trace", "-m", tiny_dir, "words", "--json", path, PYTHONIOENCODING="ascii")
    assert ran.code == 0, ran
    assert ran.out.startswith("after ?s?@4 the model predicts ")
    assert ran.err == f"wrote {tmp_path / 'caf?.json'}\n"
    assert json.loads(path.read_text())["tokens"] == list("words")
    ran = shell("trace", "-m", tmp_path / "caf\u00e9", "words", PYTHONIOENCODING="ascii")
    assert_one_error(ran, "caf?")


def test_a_full_standard_output(tiny_dir: Path) -> None:
    for more in ([], ["--json", "-"]):
        with open("/dev/full", "wb") as full:
            ran = subprocess.run(
                [COMMAND, "trace", "-m", tiny_dir, "some words", *more],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert ran.returncode == 2
        assert ran.stderr == "error: [Errno 28] No space left on device\n"
