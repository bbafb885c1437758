"""Everything that the README shows is run, and the commands of docs/usage.md."""

import re

import pytest
from paths import DOCS, README
from typer.testing import CliRunner

from ifr_fast.cli import app

TEXT = README.read_text()
USAGE = (DOCS / "usage.md").read_text()

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


@pytest.mark.parametrize("text", [TEXT, USAGE], ids=["README", "usage"])
def test_console_blocks_print_what_is_shown(text):
    blocks = re.findall(r"```console\n\$ ifr-fast (.*?)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    for command, shown in blocks:
        arguments = re.findall(r'"[^"]*"|\S+', command)
        result = CliRunner().invoke(app, [a.strip('"') for a in arguments])
        assert result.exit_code == 0, result.output
        expected = [line for line in shown.splitlines() if line.strip() not in ("", "...")]
        printed = result.output.splitlines()
        for line in expected:
            assert line in printed


@pytest.mark.parametrize("text", [TEXT, USAGE], ids=["README", "usage"])
def test_every_option_named_exists(text):
    shown = ""
    for command in ("trace", "generate", "bench", "plan", "survey", "circuits"):
        help_ = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert help_.exit_code == 0
        shown += help_.output
    existing = set(re.findall(r"--\w[\w-]*", re.sub(r"\x1b\[[\d;]*m", "", shown)))
    named = set(re.findall(r"`(--\w[\w-]*)", text))
    for line in re.findall(r"ifr-fast .*", text):
        named |= set(re.findall(r" (--\w[\w-]*)", line))
    assert len(named) >= 4
    assert named <= existing


def test_every_section_says_something():
    """No placeholders: a section is more than its heading and a comment."""
    text = re.sub(r"```.*?```", "code", TEXT, flags=re.DOTALL)
    sections = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    for title, body in zip(sections[1::2], sections[2::2], strict=True):
        assert "<!--" not in body, title
        assert body.strip(), title


def test_files_linked_exist():
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", TEXT):
        assert (README.parent / target).is_file(), target
