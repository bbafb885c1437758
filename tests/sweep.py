"""Opens and checks a tiny model of every causal language model that transformers knows.

python tests/sweep.py                   prints what becomes of each
python tests/sweep.py --write           writes the table of docs/models.md
python tests/sweep.py --triton          by Triton too, a layer each; minutes where it is interpreted
python tests/sweep.py Gemma3 GPT2 ...   only classes whose names contain one of these
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent / "support"))

import transformers
from every_model import CLASSES
from sweeping import BREAKS, WRONG, outcome, page_with
from tiny import MODELS_PAGE


def main() -> int:
    """Sweeps; 1 if a class breaks or is wrong."""
    names = [x for x in sys.argv[1:] if not x.startswith("--")]
    write = "--write" in sys.argv
    implementations = ("reference", "eager", "cpu")
    if "--triton" in sys.argv:
        implementations += ("triton",)
    transformers.logging.set_verbosity_error()
    outcomes = {}
    for name in CLASSES:
        if not names or any(part in name for part in names):
            outcomes[name] = outcome(name, implementations)
            print(name, outcomes[name].row(), flush=True)
    if write:
        assert not names, "the table is of every class"
        MODELS_PAGE.write_text(page_with(outcomes))
    return int(any(of.kind in (BREAKS, WRONG) for of in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
