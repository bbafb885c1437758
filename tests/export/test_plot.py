"""Pictures of graphs, and the labels of their tokens."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import pytest
from hostile import trace

from ifr_fast.export.labels import SHOW_ALL, columns, visible
from ifr_fast.routes.route_graph import RouteGraph


def test_visible_shows_what_would_not_show() -> None:
    assert visible(" to") == "·to"
    assert visible("a\n\tb") == "a↵⇥b"
    assert visible("") == "∅"
    assert visible("\u202e\u200b\ud800\u2028") == "‹202E›‹200B›‹D800›‹2028›"
    assert visible("\u0301e\u0301 \u0301") == "◌\u0301e\u0301·◌\u0301"
    assert visible("\ufffd日本語") == "\ufffd日本語"


def test_long_texts_collapse_tokens_that_are_not_reached() -> None:
    graph = trace(False, n_layers=2, n_tokens=90, threshold=0.15)
    reached = {graph.position, *graph.edges.source.tolist(), *graph.edges.target.tolist()}
    found = columns(graph)
    assert {c.first for c in found if not c.gap} == reached
    covered = [i for c in found for i in range(c.first, c.last + 1)]
    assert covered == list(range(90))
    assert not any(a.gap and b.gap for a, b in pairwise(found))
    assert any(c.gap for c in found)
    short = trace(False, n_layers=2, n_tokens=SHOW_ALL, threshold=0.15)
    assert len(columns(short)) == SHOW_ALL


@pytest.mark.parametrize("n_tokens", [1, 14, 90])
def test_plot_saves_a_picture(tmp_path: Path, parallel: bool, n_tokens: int) -> None:
    pytest.importorskip("matplotlib")
    graph = trace(parallel, n_layers=2, n_tokens=n_tokens, threshold=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = graph.plot()
        figure.savefig(tmp_path / "graph.png", dpi=60)
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    drawn = [len(c.get_paths()) for c in figure.axes[0].collections[:3]]
    assert sum(drawn) == len(graph.edges.layer)


@pytest.mark.parametrize("n_tokens", [1, 2, 14, 90])
def test_columns_of_a_plot_are_never_wide(n_tokens: int) -> None:
    """A single token's loops do not fill the page."""
    pytest.importorskip("matplotlib")
    figure = trace(False, n_layers=2, n_tokens=n_tokens, threshold=0.1).plot()
    axes = figure.axes[0]
    left, right = axes.get_xlim()
    inches = axes.get_position().width * figure.get_figwidth() / (right - left)
    assert 0.2 < inches <= 1.0 + 1e-9
    assert left <= -0.7


def test_a_character_that_no_font_has_is_named_where_tokens_are_its_pieces() -> None:
    labels = pytest.importorskip("ifr_fast.export.plot")._Labels()
    assert labels.of("\U0010fffd 2/4") == "‹10FFFD› 2/4"
    labels._has = lambda char: ord(char) < 0x300
    assert labels.of(" 猫 1/3") == "·‹732B› 1/3"
    assert labels.of("猫") == "□"


@pytest.mark.filterwarnings("error")
def test_plot_of_hostile_tokens(tmp_path: Path, hostile: RouteGraph) -> None:
    pytest.importorskip("matplotlib")
    figure = hostile.plot()
    for name in ("graph.png", "graph.svg"):
        figure.savefig(tmp_path / name, dpi=80)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "·$x^2$·\\frac{$" in texts
    assert "line↵feed⇥tab‹000D›" in texts
