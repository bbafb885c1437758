"""The page on the default model's demo sentence, against the API."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from explorer_backend import Backend, Served
from page import Opened, edges_of, key, weights_of

from ifr_fast import Tracer
from ifr_fast.export.labels import visible

pytestmark = [pytest.mark.usefixtures("browser"), pytest.mark.default_model]

TEXT = "When Mary and John went to the store, John gave a drink to"


def test_the_saved_page_prunes_the_demo(smol: Tracer, tmp_path: Path) -> None:
    graph = smol.trace(TEXT, threshold=0.01)
    opened = Opened.of(graph.to_html(), tmp_path)
    for step in (0, 150, 400, 700):
        pruned = graph.prune(opened.slide(step))
        assert opened.weights() == pytest.approx(weights_of(pruned), rel=1e-6)
        importance = opened.shown()["importance"]
        assert importance == pytest.approx(pruned.token_importance().tolist(), abs=1e-7)
    assert opened.page.locator(".predicted").text_content() == "·Mary"
    opened.check()


def test_the_live_page_drills_into_the_demo(smol: Tracer) -> None:
    backend = Backend(smol, {"input": {"text": TEXT}, "threshold": 0.02})
    served = Served(backend)
    graph = smol.trace(TEXT, threshold=0.02)
    weights = weights_of(graph)
    assert served.weights() == pytest.approx(weights, rel=1e-6)

    last = len(graph.tokens) - 1
    far = {e: w for e, w in weights.items() if e[1] == "attention" and e[2:] == (last, 1)}
    edge = max(far, key=lambda e: far[e])  # ` to` reads ` Mary`
    served.page.goto(f"{served.page.url.partition('#')[0]}#edge={'.'.join(map(str, edge))}")
    served.page.wait_for_timeout(100)
    served.settle()
    assert served.explorer("e.state().selected") == {"edge": key(edge)}
    heads = {
        h["head"]: h["weight"] for h in backend.edge({"text": TEXT}, edge[0], *edge[1:])["heads"]
    }
    shown = {int(row[0]): float(row[1]) for row in served.table("All heads")}
    assert shown == pytest.approx(heads, abs=6e-4)
    served.press("section[aria-label='All heads'] tbody tr:first-child button")
    strongest = max(heads, key=lambda head: heads[head])
    tokens = smol.promoted_tokens(
        TEXT, layer=edge[0], position=last, head=strongest, source=1
    ).promoted
    rows = [row[0] for row in served.table(f"Promoted by head {strongest}")]
    assert rows == [visible(t.token) for t in tokens]
    assert "·Mary" in rows

    served.page.goto(f"{served.page.url.partition('#')[0]}#at=4")
    served.page.wait_for_timeout(100)
    served.settle()
    assert served.edges() == edges_of(smol.trace(TEXT, position=4, threshold=0.02))
    served.check()


def test_a_new_threshold_is_quick(smol: Tracer, tmp_path: Path) -> None:
    """From the slider's event to the finished drawing; the bound has room for a busy machine."""
    opened = Opened.of(smol.trace(TEXT, threshold=0.01).to_html(), tmp_path)
    slide = """([slider, step]) => {
        slider.value = step;
        slider.dispatchEvent(new Event("input", { bubbles: true }));
    }"""
    element = opened.page.locator("#threshold").element_handle()
    times = []
    for step in (100, 250, 400, 300, 50):
        began = time.perf_counter()
        opened.page.evaluate(slide, [element, step])
        opened.settle()
        times.append(time.perf_counter() - began)
    assert sorted(times)[2] < 0.25
    opened.check()
