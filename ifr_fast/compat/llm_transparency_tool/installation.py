"""Replaces the computation of an installed llm_transparency_tool by this engine."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from ...errors import IfrError, needing
from . import contributions, graph
from .model import TransparentLlm

_TOOL = "llm_transparency_tool"
_REMEDY = (
    "expected a checkout of the tool on the Python path, in an environment of its own with "
    "typeguard 2.13.3, streamlit 1.67, pandas 2.3.3 and networkx 3.4.2 "
    "(docs/compat-llm-transparency-tool.md)"
)
_CONTRIBUTIONS = (
    "get_contributions",
    "get_contributions_with_one_off_part",
    "get_attention_contributions",
    "get_mlp_contributions",
    "get_decomposed_mlp_contributions",
    "apply_threshold_and_renormalize",
)
_GRAPH = ("build_full_graph", "build_paths_to_predictions")


def install(*, parity: bool = False) -> Callable[[], None]:
    """Makes an importable llm_transparency_tool, including its app, compute with this engine.

    Its contributions, graphs and `TransformerLensTransparentLlm` are replaced in all of its modules
    that are loaded now or later. parity: use the tool's own arithmetic. Returns a function that
    undoes the replacement.

    Raises IfrError if the tool cannot be imported, or lacks one of these.
    """
    with needing("install", _TOOL, _REMEDY):
        theirs = {
            name: importlib.import_module(f"{_TOOL}.{name}")
            for name in ("routes.contributions", "routes.graph", "models.tlens_model")
        }
        base = importlib.import_module(f"{_TOOL}.models.transparent_llm").TransparentLlm

    class TransformerLensTransparentLlm(TransparentLlm):
        """A model that `Tracer` opens, in place of TransformerLens."""

    TransformerLensTransparentLlm.parity = parity
    base.register(TransformerLensTransparentLlm)
    own: dict[str, dict[str, Any]] = {
        "routes.contributions": {
            name: _bound(getattr(contributions, name), parity) for name in _CONTRIBUTIONS
        },
        "routes.graph": {name: getattr(graph, name) for name in _GRAPH},
        "models.tlens_model": {"TransformerLensTransparentLlm": TransformerLensTransparentLlm},
    }
    lacking = [
        f"{where}.{name}"
        for where, module in theirs.items()
        for name in own[where]
        if not hasattr(module, name)
    ]
    if lacking:
        raise IfrError(f"install: this {_TOOL} has no {', '.join(lacking)}: {_REMEDY}")
    exchanged = {
        id(getattr(module, name)): (getattr(module, name), ours)
        for where, module in theirs.items()
        for name, ours in own[where].items()
    }
    put: list[tuple[Any, str, Any]] = []
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.split(".")[0] != _TOOL:
            continue
        for name, x in list(vars(module).items()):
            if id(x) in exchanged:
                put.append((module, name, x))
                setattr(module, name, exchanged[id(x)][1])

    def restore() -> None:
        for module, name, x in put:
            setattr(module, name, x)

    return restore


def _bound(function: Callable[..., Any], parity: bool) -> Callable[..., Any]:
    return functools.update_wrapper(functools.partial(function, parity=parity), function)
