"""Everything that docs/survey.md shows is run, and every option that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paths import DOCS
from typer.testing import CliRunner

from ifr_fast.cli import app

PAGE = DOCS / "survey.md"
TEXT = PAGE.read_text()


@pytest.mark.default_model
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "survey.md", "exec"), names)
    assert names["rows"]["head_importance"].shape[1:] == (30, 9)
    assert names["found"].complete
    assert names["found"].problems == []


def test_options_exist() -> None:
    help_ = CliRunner().invoke(app, ["survey", "--help"], env={"COLUMNS": "200"}).output
    existing = set(re.findall(r"--\w[\w-]*", re.sub(r"\x1b\[[\d;]*m", "", help_)))
    named = set(re.findall(r"[ `](--\w[\w-]*)", TEXT))
    assert len(named) > 8
    assert named <= existing


def test_columns_exist() -> None:
    from ifr_fast.survey.schema import predictions_schema

    columns = set(predictions_schema(1, 1, 1, []).names)
    assert {f"{name}_0" for name in re.findall(r"`(\w+)_k`", TEXT)} <= columns


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", TEXT):
        assert (PAGE.parent / target).is_file(), target
