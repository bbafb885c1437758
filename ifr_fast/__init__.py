"""Information flow routes at the speed of attention.

Importing this package loads no torch, no Triton and touches no GPU; names come on demand.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .errors import FormatError, IfrError, MemoryBudgetError, UnsupportedArchitectureError
    from .generation.steps import GenerationStep
    from .graph.tables import EdgeKind, NodeKind, Span
    from .recording.plan import Plan
    from .recording.recording import Recording
    from .routes.all_positions import Routes
    from .routes.route_graph import RouteGraph
    from .scoring.scores import LayerScores
    from .tracer import Tracer

_HOME = {
    "EdgeKind": "graph.tables",
    "FormatError": "errors",
    "GenerationStep": "generation.steps",
    "IfrError": "errors",
    "LayerScores": "scoring.scores",
    "MemoryBudgetError": "errors",
    "NodeKind": "graph.tables",
    "Plan": "recording.plan",
    "Recording": "recording.recording",
    "RouteGraph": "routes.route_graph",
    "Routes": "routes.all_positions",
    "Span": "graph.tables",
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
