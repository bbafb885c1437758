"""The page that draws a graph, in a browser; hostile tokens are text and no more."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import HOSTILE, N_TOKENS, VOCABULARY, trace, tracer

from ifr_fast.export.labels import columns, visible
from ifr_fast.graph.tables import EdgeKind
from ifr_fast.routes.route_graph import RouteGraph
from ifr_fast.storage.files import write_text


def test_page_text_is_standalone(hostile: RouteGraph) -> None:
    page = hostile.to_html()
    assert page.count("</script>") == 2
    assert "<!--" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert not any(c in page for c in "\u2028\u2029\ud800\u202e")
    title = page.split("<title>")[1].split("</title>")[0]
    assert title.startswith("&lt;script&gt;")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser to open the page in: none of {', '.join(names)} is on the PATH")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """A page in the browser, with what it complained of and asked for."""

    def __init__(self, browser: Any, text: str, folder: Path, **options: Any) -> None:
        path = folder / "page.html"
        write_text(path, text)
        self.page = browser.new_page(viewport={"width": 1200, "height": 800}, **options)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.url = path.as_uri()

    def check(self) -> None:
        """Nothing was complained of, and nothing but the file was asked for."""
        assert self.complaints == []
        assert [url for url in self.requests if url != "about:srcdoc"] == [self.url]
        self.page.close()

    def slide(self, step: int) -> float:
        """Moves the slider; the threshold that it stands for."""
        return self.page.evaluate(
            """(step) => {
                const slider = document.getElementById("threshold");
                slider.value = step;
                slider.dispatchEvent(new Event("input", { bubbles: true }));
                return Number(document.getElementById("graph").dataset.threshold);
            }""",
            step,
        )

    def edges(self) -> list[tuple[int, str, int, int]]:
        found = self.page.evaluate(
            """() => Array.from(document.querySelectorAll("#graph path.edge"), (e) => [
                Number(e.dataset.layer), e.dataset.kind,
                Number(e.dataset.target), Number(e.dataset.source)])"""
        )
        shown = self.page.get_attribute("#graph", "data-edge-count")
        assert int(shown) == len(found)
        return sorted(tuple(edge) for edge in found)


def edges_of(graph: RouteGraph) -> list[tuple[int, str, int, int]]:
    columns = (column.tolist() for column in graph.edges[:4])
    return sorted(
        (layer, EdgeKind(kind).name.lower(), target, source)
        for layer, kind, target, source in zip(*columns, strict=True)
    )


def test_page_prunes_as_the_graph_does(browser: Any, tmp_path: Path, graph: RouteGraph) -> None:
    opened = Opened(browser, graph.to_html(), tmp_path)
    assert opened.edges() == edges_of(graph)
    counts = []
    for step in (40, 200, 350, 500, 650, 800, 1000, 0):
        threshold = opened.slide(step)
        pruned = graph.prune(threshold)
        assert opened.edges() == edges_of(pruned)
        counts.append(len(pruned.edges.layer))
        shown = opened.page.inner_text("#count")
        assert shown.startswith(f"{counts[-1]:,} of {len(graph.edges.layer):,} ")
        text = opened.page.inner_text("#threshold-text")
        assert float(text) == pytest.approx(threshold, rel=1e-2)
        assert opened.page.get_attribute("#threshold", "aria-valuetext") == text
    assert len(set(counts)) > 4
    assert counts[-2] == 0
    assert counts[-1] == len(graph.edges.layer)
    opened.check()


def test_page_of_a_span(browser: Any, tmp_path: Path, parallel: bool) -> None:
    ids = torch.randint(VOCABULARY, (N_TOKENS,), generator=torch.Generator().manual_seed(5))
    graph = tracer(parallel, 4).trace(
        ids, position=[3, 8, N_TOKENS - 1], position_weights=[1, 2, 5], threshold=0.01
    )
    opened = Opened(browser, graph.to_html(), tmp_path)
    assert opened.edges() == edges_of(graph)
    for step in (350, 800):
        pruned = graph.prune(opened.slide(step))
        assert opened.edges() == edges_of(pruned)
    opened.slide(0)
    labels = opened.page.eval_on_selector_all(
        "#tokens li", "items => items.map((item) => item.getAttribute('aria-label'))"
    )
    shown = [float(label.rpartition(" ")[2]) for label in labels]
    assert shown == pytest.approx(graph.token_importance().tolist(), abs=6e-4)
    assert opened.page.locator("line.stub").count() == 3
    assert opened.page.inner_text("#facts").startswith("3 predictions, after ")
    opened.check()


def test_page_compares_as_float32(browser: Any, tmp_path: Path) -> None:
    """A weight that equals the threshold in float32, and exceeds it in float64, is dropped."""
    graph = trace(False, n_layers=1, n_tokens=2, threshold=0.0)
    weight = torch.full_like(graph.edges.weight, 0.1)
    assert float(weight[0]) > 0.1
    equal = dataclasses.replace(graph, edges=graph.edges._replace(weight=weight), threshold=0.1)
    assert edges_of(equal.prune(0.1)) == []
    opened = Opened(browser, equal.to_html(), tmp_path)
    assert opened.edges() == []
    opened.check()


def test_slider_works_by_keyboard_and_kinds_hide(browser: Any, tmp_path: Path) -> None:
    graph = trace(False)
    opened = Opened(browser, graph.to_html(), tmp_path)
    page = opened.page
    page.focus("#threshold")
    page.keyboard.press("PageUp")
    threshold = float(page.get_attribute("#graph", "data-threshold"))
    assert threshold > graph.threshold
    assert opened.edges() == edges_of(graph.prune(threshold))
    for kind in ("residual", "attention", "ffn"):
        display = f"getComputedStyle(document.querySelector('path.edge.{kind}')).display"
        assert page.evaluate(display) != "none"
        page.click(f"[data-shows={kind}]")
        assert page.evaluate(display) == "none"
    opened.check()


def test_hover_shows_shares_of_heads(browser: Any, tmp_path: Path) -> None:
    whole = trace(False)
    far = (whole.edges.kind == EdgeKind.ATTENTION) & (whole.edges.target == whole.position)
    far &= whole.edges.source < whole.position - 3
    chosen = int(far.nonzero()[-1])
    kept = whole.edges.kind != EdgeKind.ATTENTION
    kept[chosen] = True
    # With one attention edge, its middle is nearest to that one.
    graph = dataclasses.replace(whole, edges=type(whole.edges)(*(c[kept] for c in whole.edges)))
    layer, target, source = (int(whole.edges[i][chosen]) for i in (0, 2, 3))
    opened = Opened(browser, graph.to_html(), tmp_path)
    page = opened.page
    x, y = page.evaluate(
        """() => {
            const path = document.querySelector("path.edge.attention");
            path.scrollIntoView({ block: "center" });
            const at = path.getPointAtLength(path.getTotalLength() / 2);
            const box = path.ownerSVGElement.getBoundingClientRect();
            return [box.left + at.x, box.top + at.y];
        }"""
    )
    page.click("[data-shows=residual]")
    drawn = opened.edges()
    page.mouse.move(x, y)
    tip = page.locator("#tip")
    said = tip.inner_text()
    assert f"Attention, layer {layer}" in said
    assert f"{graph.tokens[source]} #{source} → {graph.tokens[target]} #{target}" in said
    assert f"weight {float(whole.edges.weight[chosen]):.3f}" in said
    heads = graph.head_edges
    mine = (heads.layer == layer) & (heads.target == target) & (heads.source == source)
    assert page.locator("#tip .bar").count() == int(mine.sum()) > 1
    for head, weight in zip(heads.head[mine].tolist(), heads.weight[mine].tolist(), strict=True):
        assert f"head {head}\n" in said
        assert f"{weight:.3f}" in said or weight < 5e-4
    assert opened.edges() == drawn  # what a hover highlights counts as no edge
    page.hover(f"#tokens li[data-first='{graph.position}']")
    assert f"#{graph.position}" in tip.inner_text()
    assert "importance " in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    opened.check()


def test_hostile_tokens_are_text(browser: Any, tmp_path: Path, hostile: RouteGraph) -> None:
    opened = Opened(browser, hostile.to_html(), tmp_path)
    page = opened.page
    assert opened.edges() == edges_of(hostile)
    labels = page.locator("#tokens li")
    assert labels.count() == N_TOKENS
    for i, token in enumerate(HOSTILE):
        assert labels.nth(i).text_content() == visible(token)
        page.hover(f"#tokens li[data-first='{i}']")
        assert visible(token) in page.locator("#tip").text_content()
    page.click("#listing summary")
    page.locator("#listing tbody tr").first.wait_for()
    assert page.locator("#predicted").text_content() == visible(HOSTILE[0])
    assert page.title().startswith(visible(HOSTILE[0]))
    assert page.evaluate("document.scripts.length") == 2
    assert page.evaluate("document.images.length + document.querySelectorAll('b').length") == 0
    assert page.evaluate("typeof window.__pwned") == "undefined"
    assert page.locator("#graph .node.unattributed").count() == 2
    assert page.locator(".key.unattributed").is_visible()
    opened.check()


def test_pieces_of_a_character_are_named(browser: Any, tmp_path: Path) -> None:
    tokens = ["猫 1/3", "猫 2/3", "猫 3/3", " 🎉 1/2", " 🎉 2/2", " 1/2", "a 3/2", "a 1/1", "a 0/2"]
    graph = dataclasses.replace(trace(False, n_tokens=len(tokens)), tokens=tokens)
    opened = Opened(browser, graph.to_html(), tmp_path)
    labels = opened.page.locator("#tokens li").all_text_contents()
    assert labels == [visible(token) for token in tokens]
    assert labels[:4] == ["猫 1/3", "猫 2/3", "猫 3/3", "·🎉 1/2"]
    opened.check()


def test_long_text_in_the_page(browser: Any, tmp_path: Path) -> None:
    graph = trace(False, n_layers=2, n_tokens=90, threshold=0.15)
    opened = Opened(browser, graph.to_html(), tmp_path, color_scheme="dark")
    found = opened.page.evaluate(
        """() => Array.from(document.querySelectorAll("#tokens li"),
            (e) => [Number(e.dataset.first), e.classList.contains("gap")])"""
    )
    assert [tuple(item) for item in found] == [(c.first, c.gap) for c in columns(graph)]
    opened.check()


def test_one_token_and_no_predictions(browser: Any, tmp_path: Path) -> None:
    graph = dataclasses.replace(trace(False, n_tokens=1, n_layers=1), predictions=[])
    opened = Opened(browser, graph.to_html(), tmp_path)
    assert opened.edges() == edges_of(graph)
    opened.check()


def test_notebook_shows_the_page_in_a_frame(
    browser: Any, tmp_path: Path, hostile: RouteGraph
) -> None:
    text = f"<!doctype html><meta charset=utf-8><div>{hostile._repr_html_()}</div>"
    opened = Opened(browser, text, tmp_path)
    frame = opened.page.frame_locator("iframe")
    frame.locator("#graph path.edge").first.wait_for(state="attached")
    assert frame.locator("#graph path.edge").count() == len(hostile.edges.layer)
    assert frame.locator("#predicted").text_content() == visible(HOSTILE[0])
    assert opened.page.get_attribute("iframe", "sandbox") == "allow-scripts"
    assert opened.page.evaluate("typeof window.__pwned") == "undefined"
    assert opened.page.evaluate("document.querySelectorAll('script').length") == 0
    opened.check()
