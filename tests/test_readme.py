"""Everything that the README shows is run."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ifr_fast.cli import app

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text()

pytestmark = pytest.mark.default_model


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    graph = names["ifr_fast"].RouteGraph.load("mary.safetensors")
    assert graph.predictions[0].token == " Mary"


def test_console_blocks_print_what_is_shown():
    blocks = re.findall(r"```console\n\$ ifr-fast (.*?)\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 2
    for command, shown in blocks:
        arguments = re.findall(r'"[^"]*"|\S+', command)
        result = CliRunner().invoke(app, [a.strip('"') for a in arguments])
        assert result.exit_code == 0, result.output
        expected = [line for line in shown.splitlines() if line.strip() not in ("", "...")]
        printed = result.output.splitlines()
        for line in expected:
            assert line in printed


def test_every_option_named_exists():
    result = CliRunner().invoke(app, ["trace", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    for option in set(re.findall(r"`(--\w[\w-]*)", TEXT)):
        assert option in result.output


def test_files_linked_exist():
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", TEXT):
        assert (README.parent / target).is_file(), target
