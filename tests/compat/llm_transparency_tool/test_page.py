"""The blocks of docs/compat-llm-transparency-tool.md run."""

from __future__ import annotations

import re
from typing import Any

import pytest
from paths import DOCS

import ifr_fast

PAGE = DOCS / "compat-llm-transparency-tool.md"


@pytest.mark.default_model
def test_the_page_runs() -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    shown = re.findall(r"^assert (.*)$", text, re.MULTILINE)
    assert len(shown) >= 3
    assert ifr_fast.__name__ in text
