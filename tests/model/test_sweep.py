"""Every causal language model that the installed transformers knows: none breaks, none is wrong,
and docs/models.md says what becomes of it. `python tests/sweep.py --write` writes its table anew.
"""

from __future__ import annotations

import pytest
import transformers
from every_model import CLASSES
from sweeping import OPENS, REFUSED, UNBUILT, listed, outcome


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_is_right_or_refused(name: str) -> None:
    found = outcome(name, ("eager", "cpu"))
    assert found.kind in (OPENS, REFUSED, UNBUILT), found.row()
    version, rows = listed()
    if version == transformers.__version__:
        row = rows[name]
        assert row.startswith(found.kind), found.row()
        if found.kind == REFUSED:
            assert row == found.row()


def test_the_page_lists_every_class() -> None:
    version, rows = listed()
    if version == transformers.__version__:
        assert set(rows) == set(CLASSES)
    assert sum(row.startswith(OPENS) for row in rows.values()) >= 104
