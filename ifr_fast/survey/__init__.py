"""Surveys: what a model's components do, over whole corpora (docs/survey.md).

Reading one needs neither torch nor transformers; names come on demand.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inputs import Source
    from .run import State, survey
    from .schema import Problem, Survey, Table

_HOME = {
    "Problem": "schema",
    "Source": "inputs",
    "State": "run",
    "Survey": "schema",
    "Table": "schema",
    "survey": "run",
}

__all__ = ["Problem", "Source", "State", "Survey", "Table", "survey"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
