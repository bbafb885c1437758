"""Packages that cannot be imported, in the words of one error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ifr_fast import IfrError
from ifr_fast.compat.eap_ig import Graph
from ifr_fast.compat.llm_transparency_tool import build_full_graph
from ifr_fast.errors import needing

BROKEN = {
    "not installed": (None, "which is not installed"),
    "syntax": ("def", "which cannot be imported (SyntaxError: "),
    "another version's dependency": ("import a_missing_one", "(ModuleNotFoundError: No module "),
    "dependency": ("raise ImportError", "which cannot be imported (ImportError)"),
    "anything": ("{}['x']", "which cannot be imported (KeyError: 'x')"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_whatever_an_import_raises_is_one_error(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, said = BROKEN[how]
    if source is not None:
        (tmp_path / "a_package.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(IfrError) as caught, needing("this", "a_package", "the remedy"):
        import a_package  # type: ignore[import-not-found]  # noqa: F401
    message = str(caught.value)
    assert message.startswith("this needs a_package, which ")
    assert said in message
    assert message.endswith(": the remedy")


def test_an_interruption_is_none() -> None:
    with pytest.raises(KeyboardInterrupt), needing("this", "a_package", "the remedy"):
        raise KeyboardInterrupt


def test_a_broken_networkx_is_named_by_the_faces_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "networkx.py").write_text("def")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "networkx", raising=False)
    with pytest.raises(IfrError, match=r"networkx, which cannot be imported \(SyntaxError"):
        build_full_graph(object())  # type: ignore[arg-type]
    sizes = {"n_layers": 1, "n_heads": 1, "d_model": 1}
    graph = Graph.from_model({**sizes, "parallel_attn_mlp": False})
    with pytest.raises(IfrError, match=r"networkx, which cannot be imported \(SyntaxError"):
        graph.to_networkx()
