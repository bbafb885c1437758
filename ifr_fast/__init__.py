"""Information flow routes at the speed of attention.

Importing this package loads no torch, no Triton and touches no GPU; names come on demand.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .errors import FormatError, IfrError, MemoryBudgetError, UnsupportedArchitectureError
    from .generation import GenerationStep
    from .graph import EdgeKind, NodeKind, RouteGraph, Routes, Span
    from .plan import Plan
    from .recording import Recording
    from .scoring import LayerScores
    from .tracer import Tracer

_HOME = {
    "EdgeKind": "graph",
    "FormatError": "errors",
    "GenerationStep": "generation",
    "IfrError": "errors",
    "LayerScores": "scoring",
    "MemoryBudgetError": "errors",
    "NodeKind": "graph",
    "Plan": "plan",
    "Recording": "recording",
    "RouteGraph": "graph",
    "Routes": "graph",
    "Span": "graph",
    "Tracer": "tracer",
    "UnsupportedArchitectureError": "errors",
}

__all__ = [
    "EdgeKind",
    "FormatError",
    "GenerationStep",
    "IfrError",
    "LayerScores",
    "MemoryBudgetError",
    "NodeKind",
    "Plan",
    "Recording",
    "RouteGraph",
    "Routes",
    "Span",
    "Tracer",
    "UnsupportedArchitectureError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
