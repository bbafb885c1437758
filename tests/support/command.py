"""The `ifr-fast` command, run in this process or in one of its own, and how it fails."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ifr_fast.cli

COMMAND = Path(sys.executable).with_name("ifr-fast")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def run_here(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *args: Any,
    stdin: bytes = b"",
) -> Ran:
    """Runs the command in this process."""
    monkeypatch.setenv("COLUMNS", "80")  # text in a pipe must not be wrapped
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["ifr-fast", *map(str, args)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    capsys.readouterr()
    code: Any = 0
    try:
        ifr_fast.cli.main()
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return Ran(code or 0, out, err)


def shell(*args: Any, cwd: Path | None = None, stdin: bytes = b"", **variables: str) -> Ran:
    """Runs the command in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    environment |= variables
    run = subprocess.run(
        [COMMAND, *map(str, args)],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env=environment,
        check=False,
    )
    return Ran(run.returncode, run.stdout.decode(), run.stderr.decode())


def assert_one_error(ran: Ran, *words: str) -> None:
    assert ran.code == 2, ran
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in ran.err
    for word in words:
        assert word in lines[0]
