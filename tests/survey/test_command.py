"""`ifr-fast survey`."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from ifr_fast import FormatError
from ifr_fast.cli import app
from ifr_fast.survey import Survey


def test_the_command(tiny_dir: Path, records: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.touch()
    out = tmp_path / "out"
    command = [
        "survey",
        f"r={records}",
        str(bad),
        "--out",
        str(out),
        "-m",
        str(tiny_dir),
        "--label-by",
        "kind",
        "--window-tokens",
        "200",
        "--thresholds",
        "0.02,0.05",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "r: 40 documents" in result.output
    assert "bad.txt: is empty" in result.output
    found = Survey.open(out)
    assert found.thresholds == [0.02, 0.05]
    assert found.labels == ["kind"]
    assert found.model["n_heads"] == 6
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, FormatError)
    assert CliRunner().invoke(app, [*command, "--resume"]).exit_code == 0
    wrong = CliRunner().invoke(app, [*command[:-2], "--thresholds", "a,b"])
    assert "--thresholds" in str(wrong.exception)
