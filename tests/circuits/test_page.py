"""The examples of docs/circuits.md run."""

import re

import pytest
from paths import DOCS
from typer.testing import CliRunner

from ifr_fast.cli import app

PAGE = DOCS / "circuits.md"
TEXT = PAGE.read_text()

pytestmark = pytest.mark.default_model


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["effects"].heads.shape == (4, 2, 9)
    assert names["effects"].heads.abs().max() > 0.01
    assert names["found"].n_components == 18


def test_options_and_files_named_exist():
    help_ = CliRunner().invoke(app, ["circuits", "--help"], env={"COLUMNS": "200"})
    assert help_.exit_code == 0
    existing = set(re.findall(r"--\w[\w-]*", re.sub(r"\x1b\[[\d;]*m", "", help_.output)))
    named = set(re.findall(r" (--\w[\w-]*)", "\n".join(re.findall(r"ifr-fast circuits.*", TEXT))))
    assert {"--task", "--out", "--patch-prompts"} <= named <= existing | {"--help"}
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", TEXT):
        assert (PAGE.parent / target).is_file(), target
