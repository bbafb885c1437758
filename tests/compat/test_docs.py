"""The examples of the pages on other tools run, and files that the pages name exist."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from paths import DOCS


def run_page(name: str) -> dict[str, object]:
    """Runs a page's blocks one after the other, and returns their names."""
    text = (DOCS / name).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return names


@pytest.mark.default_model
def test_flashtrace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("compat-flashtrace.md")
    result = names["result"]
    assert "".join(result.generation_tokens[6:10]) == " The answer is Paris"
    assert result.topk_inputs(1)[0].score > 0
    assert json.loads((tmp_path / "trace.json").read_text())["scores"] == result.scores
    assert (tmp_path / "trace.html").read_text().startswith("<!doctype html>")


def test_transformer_lens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("transformer_lens") is None:
        pytest.skip("transformer-lens is not installed")
    monkeypatch.chdir(tmp_path)
    names = run_page("compat-transformer-lens.md")
    assert len(names["graph"].edges.layer) > 3
    assert names["graph"].predictions == names["routes"][-1].predictions


@pytest.mark.parametrize("page", ["compat-flashtrace.md", "compat-transformer-lens.md"])
def test_files_that_are_named_exist(page: str) -> None:
    text = (DOCS / page).read_text()
    named = re.findall(r"`((?:bench|ifr_fast|tests)/[\w/]+\.\w+)`", text)
    linked = re.findall(r"\]\((?!http|#)([^)]+)\)", text)
    for path in [DOCS.parent / x for x in named] + [DOCS / x for x in linked]:
        assert path.is_file(), path
