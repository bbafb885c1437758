"""Everything that the pages under docs/ show is run."""

import re

import pytest
from paths import DOCS

RUN = {"drilling-down.md": 3, "usage.md": 3, "explorer.md": 1}  # blocks at least
LINKED = [*RUN, "models.md", "performance.md", "design.md", "gpu.md"]


@pytest.mark.default_model
@pytest.mark.parametrize("page", RUN)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(blocks) >= RUN[page]
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", LINKED)
def test_files_linked_exist(page):
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", (DOCS / page).read_text()):
        assert (DOCS / target).is_file(), target
