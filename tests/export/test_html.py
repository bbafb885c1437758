"""The page that draws a graph, in a browser; hostile tokens are text and no more."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hostile import HOSTILE, N_TOKENS, VOCABULARY, trace, tracer
from page import Opened, edges_of, key, weights_of

from ifr_fast.export.labels import columns, visible
from ifr_fast.graph.tables import EdgeKind
from ifr_fast.routes.route_graph import RouteGraph

pytestmark = pytest.mark.usefixtures("browser")


def test_page_prunes_as_the_graph_does(tmp_path: Path, graph: RouteGraph) -> None:
    opened = Opened.of(graph.to_html(), tmp_path)
    assert opened.edges() == edges_of(graph)
    counts = []
    for step in (40, 200, 350, 500, 650, 800, 1000, 0):
        threshold = opened.slide(step)
        pruned = graph.prune(threshold)
        assert opened.edges() == edges_of(pruned)
        assert opened.weights() == pytest.approx(weights_of(pruned), rel=1e-6)
        importance = opened.shown()["importance"]
        assert importance == pytest.approx(pruned.token_importance().tolist(), abs=1e-7)
        counts.append(len(pruned.edges.layer))
        shown = opened.page.inner_text("#count")
        assert shown.startswith(f"{counts[-1]:,} of {len(graph.edges.layer):,} ")
        text = opened.page.inner_text("output[for=threshold]")
        assert float(text) == pytest.approx(threshold, rel=1e-2)
        assert opened.page.get_attribute("#threshold", "aria-valuetext") == text
    assert len(set(counts)) > 4
    assert counts[-2] == 0
    assert counts[-1] == len(graph.edges.layer)
    opened.check()


def test_page_of_a_span(tmp_path: Path, parallel: bool) -> None:
    ids = torch.randint(VOCABULARY, (N_TOKENS,), generator=torch.Generator().manual_seed(5))
    graph = tracer(parallel, 4).trace(
        ids, position=[3, 8, N_TOKENS - 1], position_weights=[1, 2, 5], threshold=0.01
    )
    opened = Opened.of(graph.to_html(), tmp_path)
    assert opened.edges() == edges_of(graph)
    for step in (350, 800):
        pruned = graph.prune(opened.slide(step))
        assert opened.edges() == edges_of(pruned)
    opened.slide(0)
    labels = opened.page.eval_on_selector_all(
        ".tokens li", "items => items.map((item) => item.getAttribute('aria-label'))"
    )
    shown = [float(label.rpartition(" ")[2]) for label in labels]
    assert shown == pytest.approx(graph.token_importance().tolist(), abs=6e-4)
    marked = opened.page.locator(".triangle.on").evaluate_all(
        "marks => marks.map((mark) => Number(mark.dataset.position))"
    )
    assert marked == [3, 8, N_TOKENS - 1]
    assert opened.page.inner_text(".facts").startswith("3 predictions, after ")
    opened.check()


def test_page_compares_as_float32(tmp_path: Path) -> None:
    """A weight that equals the threshold in float32, and exceeds it in float64, is dropped."""
    graph = trace(False, n_layers=1, n_tokens=2, threshold=0.0)
    weight = torch.full_like(graph.edges.weight, 0.1)
    assert float(weight[0]) > 0.1
    equal = dataclasses.replace(graph, edges=graph.edges._replace(weight=weight), threshold=0.1)
    assert edges_of(equal.prune(0.1)) == []
    opened = Opened.of(equal.to_html(), tmp_path)
    assert opened.edges() == []
    opened.check()


def test_slider_works_by_keyboard_and_kinds_hide(tmp_path: Path) -> None:
    graph = trace(False)
    opened = Opened.of(graph.to_html(), tmp_path)
    page = opened.page
    page.focus("#threshold")
    page.keyboard.press("PageUp")
    page.wait_for_timeout(30)
    opened.settle()
    threshold = opened.shown()["threshold"]
    assert threshold > graph.threshold
    pruned = graph.prune(threshold)
    assert opened.edges() == edges_of(pruned)
    left = len(pruned.edges.layer)
    families = {"residual": "residual", "attention": "attention", "ffn": "ffn"}
    for kind, begins in families.items():
        opened.press(f"[data-shows={kind}]")
        left -= sum(name.startswith(begins) for _, name, _, _ in edges_of(pruned))
        assert opened.shown()["visible"] == left
    assert left == 0
    opened.check()


def test_hover_shows_shares_of_heads(tmp_path: Path) -> None:
    whole = trace(False)
    far = (whole.edges.kind == EdgeKind.ATTENTION) & (whole.edges.target == whole.position)
    far &= whole.edges.source < whole.position - 3
    chosen = int(far.nonzero()[-1])
    kept = whole.edges.kind != EdgeKind.ATTENTION
    kept[chosen] = True
    layer, target, source = (int(whole.edges[i][chosen]) for i in (0, 2, 3))
    heads = whole.head_edges
    mine = (heads.layer == layer) & (heads.target == target) & (heads.source == source)
    # With one attention edge, its middle is nearest to that one.
    graph = dataclasses.replace(
        whole,
        edges=type(whole.edges)(*(c[kept] for c in whole.edges)),
        head_edges=type(heads)(*(c[mine] for c in heads)),
    )
    opened = Opened.of(graph.to_html(), tmp_path)
    page = opened.page
    opened.press("[data-shows=residual]")
    drawn = opened.edges()
    opened.point(key((layer, "attention", target, source)))
    tip = page.locator(".tip")
    said = tip.inner_text()
    assert f"Attention, layer {layer}" in said
    assert f"{graph.tokens[source]} #{source} → {graph.tokens[target]} #{target}" in said
    assert f"weight {float(whole.edges.weight[chosen]):.3f}" in said
    assert page.locator(".tip .bar").count() == int(mine.sum()) > 1
    for head, weight in zip(heads.head[mine].tolist(), heads.weight[mine].tolist(), strict=True):
        assert f"head {head}\n" in said
        assert f"{weight:.3f}" in said or weight < 5e-4
    assert opened.edges() == drawn  # what a hover highlights counts as no edge
    page.hover(f".tokens li[data-first='{graph.position}']")
    assert f"#{graph.position}" in tip.inner_text()
    assert "importance " in tip.inner_text()
    page.focus(f".tokens li[data-first='{graph.position}']")
    page.keyboard.press("Escape")
    page.wait_for_timeout(30)
    assert tip.count() == 0
    opened.check()


def test_hostile_tokens_are_text(tmp_path: Path, hostile: RouteGraph) -> None:
    opened = Opened.of(hostile.to_html(), tmp_path)
    page = opened.page
    assert opened.edges() == edges_of(hostile)
    labels = page.locator(".tokens li")
    assert labels.count() == N_TOKENS
    for i, token in enumerate(HOSTILE):
        assert labels.nth(i).text_content() == visible(token)
        page.hover(f".tokens li[data-first='{i}']")
        assert visible(token) in page.locator(".tip").text_content()
        opened.click({"node": i})
        assert visible(token) in page.locator(".picked-facts").text_content()
    for view in ("Text", "Table", "Graph"):
        opened.press(f".modes >> text={view}")
    assert page.locator(".predicted").text_content() == visible(HOSTILE[0])
    assert page.title().startswith(visible(HOSTILE[0]))
    assert page.evaluate("document.scripts.length") == 2
    foreign = "document.querySelectorAll('img, b, script:not([id])').length"
    assert page.evaluate(foreign) == 1
    shadow = "document.getElementById('explorer').shadowRoot"
    assert page.evaluate(f"{shadow}.querySelectorAll('img, b, script, style, iframe').length") == 0
    assert page.evaluate("typeof window.__pwned") == "undefined"
    assert opened.shown()["unattributed"] == 2
    assert page.locator(".key.unattributed").is_visible()
    opened.check()


def test_pieces_of_a_character_are_named(tmp_path: Path) -> None:
    tokens = ["猫 1/3", "猫 2/3", "猫 3/3", " 🎉 1/2", " 🎉 2/2", " 1/2", "a 3/2", "a 1/1", "a 0/2"]
    graph = dataclasses.replace(trace(False, n_tokens=len(tokens)), tokens=tokens)
    opened = Opened.of(graph.to_html(), tmp_path)
    labels = opened.page.locator(".tokens li").all_text_contents()
    assert labels == [visible(token) for token in tokens]
    assert labels[:4] == ["猫 1/3", "猫 2/3", "猫 3/3", "·🎉 1/2"]
    opened.check()


def test_long_text_in_the_page(tmp_path: Path) -> None:
    graph = trace(False, n_layers=2, n_tokens=90, threshold=0.15)
    opened = Opened.of(graph.to_html(), tmp_path, color_scheme="dark")
    expected = [[c.first, c.last, c.gap] for c in columns(graph)]
    assert opened.shown()["columns"] == expected
    gap = next(c for c in columns(graph) if c.gap)
    opened.press(f".tokens li.gap[data-first='{gap.first}']")
    unfolded = [[i, i, False] for i in range(gap.first, gap.last + 1)]
    place = expected.index([gap.first, gap.last, True])
    assert opened.shown()["columns"] == [*expected[:place], *unfolded, *expected[place + 1 :]]
    opened.press("text=fold")
    assert opened.shown()["columns"] == [[i, i, False] for i in range(90)]
    opened.check()


def test_one_token_and_no_predictions(tmp_path: Path) -> None:
    graph = dataclasses.replace(trace(False, n_tokens=1, n_layers=1), predictions=[])
    opened = Opened.of(graph.to_html(), tmp_path)
    assert opened.edges() == edges_of(graph)
    opened.check()


def test_notebook_shows_the_page_in_a_frame(tmp_path: Path, hostile: RouteGraph) -> None:
    text = f"<!doctype html><meta charset=utf-8><div>{hostile._repr_html_()}</div>"
    opened = Opened.of(text, tmp_path)
    frame = opened.page.frame_locator("iframe")
    frame.locator(".tokens li").first.wait_for()
    assert frame.locator(".predicted").text_content() == visible(HOSTILE[0])
    inner = opened.page.frames[1]
    edges = "document.getElementById('explorer').explorer.shown().edges.length"
    assert inner.evaluate(edges) == len(hostile.edges.layer)
    frame.locator("[data-shows=ffn]").click()  # what is set has no address to be kept in
    opened.page.wait_for_timeout(300)
    assert opened.page.get_attribute("iframe", "sandbox") == "allow-scripts allow-downloads"
    assert opened.page.evaluate("typeof window.__pwned") == "undefined"
    assert opened.page.evaluate("document.querySelectorAll('script').length") == 0
    opened.check()
