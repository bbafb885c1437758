"""The page's interactions in a browser: what it shows is what the graph says."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hostile import HOSTILE, N_TOKENS, trace
from page import Edge, Opened, edges_of, key, weights_of

from ifr_fast.routes.route_graph import RouteGraph

pytestmark = pytest.mark.usefixtures("browser")


@pytest.fixture(scope="module")
def graph() -> RouteGraph:
    return trace(False)


@pytest.fixture
def opened(tmp_path: Path, graph: RouteGraph) -> Opened:
    return Opened.of(graph.to_html(), tmp_path)


def ends(graph: RouteGraph, edge: Edge) -> tuple[int, int]:
    """The nodes that an edge leads from and to, numbered as in the page."""
    layer, kind, target, source = edge
    T, parallel = len(graph.tokens), bool(graph.parallel[layer])
    into_post = parallel or kind in ("ffn", "residual_post")
    below = 2 * layer + (1 if into_post and not parallel else 0)
    if kind == "attention":
        below = 2 * graph.source_layers[layer]
    return below * T + source, (2 * layer + (2 if into_post else 1)) * T + target


def through(graph: RouteGraph, node: int) -> list[Edge]:
    """The edges on paths from the prediction to the embeddings that pass a node."""
    edges = [(edge, *ends(graph, edge)) for edge in edges_of(graph)]
    found: set[Edge] = set()
    for here, there in ((1, 2), (2, 1)):
        seen, front = {node}, {node}
        while front:
            next_front: set[int] = set()
            for edge in edges:
                if edge[here] in front:
                    found.add(edge[0])
                    next_front.add(edge[there])
            front = next_front - seen
            seen |= front
    return sorted(found)


def node_of(graph: RouteGraph, layer: int, kind: str, position: int) -> int:
    level = 0 if kind == "embed" else 2 * layer + (2 if kind == "post" else 1)
    return level * len(graph.tokens) + position


def reached(graph: RouteGraph) -> list[int]:
    return sorted({end for edge in edges_of(graph) for end in ends(graph, edge)})


def test_hover_lights_all_paths_through_a_node(opened: Opened, graph: RouteGraph) -> None:
    assert opened.highlighted() is None
    nodes = reached(graph)
    for node in (nodes[0], nodes[len(nodes) // 2], nodes[-1], nodes[3 * len(nodes) // 4]):
        opened.point({"node": node})
        assert opened.highlighted() == through(graph, node)
    opened.page.mouse.move(2, 2)
    opened.page.wait_for_timeout(50)
    assert opened.highlighted() is None
    opened.check()


def test_a_click_keeps_the_highlight_and_its_tables(opened: Opened, graph: RouteGraph) -> None:
    middle = sorted(reached(graph))[len(reached(graph)) // 2]
    opened.click({"node": middle})
    opened.page.mouse.move(2, 2)
    opened.page.wait_for_timeout(50)
    assert opened.highlighted() == through(graph, middle)
    weights = weights_of(graph)
    into = [weights[edge] for edge in weights if ends(graph, edge)[1] == middle]
    shown = [float(row[2]) for row in opened.table("Reads from")]
    expected = sorted(into, reverse=True)[: len(shown)]
    assert len(shown) == min(12, len(into)) > 0
    assert shown == pytest.approx(expected, abs=6e-4)
    opened.page.keyboard.press("Escape")
    opened.press(".details >> nth=0")
    opened.check()


def test_an_edge_is_picked_from_a_node_s_table(opened: Opened, graph: RouteGraph) -> None:
    weights = weights_of(graph)
    attention = {e: w for e, w in weights.items() if e[1] == "attention" and e[2] != e[3]}
    heaviest = max(attention, key=lambda edge: attention[edge])
    opened.click({"node": ends(graph, heaviest)[1]})
    rows = opened.page.locator("section[aria-label='Reads from'] tbody tr")
    named = f"#{heaviest[3]}"
    rows.filter(has_text="attention").filter(has_text=named).first.locator("button").click()
    opened.settle()
    assert opened.explorer("e.state().selected") == {"edge": key(heaviest)}
    heads = graph.head_edges
    mine = (heads.layer == heaviest[0]) & (heads.target == heaviest[2])
    mine &= heads.source == heaviest[3]
    shown = {int(row[0]): float(row[1]) for row in opened.table("Heads")}
    expected = dict(zip(heads.head[mine].tolist(), heads.weight[mine].tolist(), strict=True))
    assert shown == pytest.approx(expected, abs=6e-4)
    below, above = ends(graph, heaviest)
    lit = opened.highlighted()
    assert lit is not None
    assert set(lit) <= set(through(graph, below)) & {*through(graph, above)} | {heaviest}
    assert heaviest in lit
    opened.check()


def test_tables_sort_search_and_copy(tmp_path: Path, graph: RouteGraph) -> None:
    opened = Opened.of(graph.to_html(), tmp_path, permissions=["clipboard-read", "clipboard-write"])
    opened.press(".modes >> text=Table")
    rows = opened.table("Edges")
    flows = [row[4] for row in rows]
    expected = sorted((row[5] for row in opened.shown()["edges"]), reverse=True)[: len(flows)]
    assert [float(flow) for flow in flows] == pytest.approx(expected, abs=6e-4)
    opened.press("section[aria-label=Edges] th >> text=weight")
    weights = sorted(weights_of(graph).values(), reverse=True)
    shown = [float(row[3]) for row in opened.table("Edges")]
    assert shown == pytest.approx(weights[: len(shown)], abs=6e-4)
    opened.press("section[aria-label=Edges] th >> text=weight")
    shown = [float(row[3]) for row in opened.table("Edges")]
    assert shown == pytest.approx(weights[::-1][: len(shown)], abs=6e-4)
    sort = opened.page.locator("section[aria-label=Edges] th[aria-sort]")
    assert sort.get_attribute("aria-sort") == "ascending"
    opened.page.fill("section[aria-label=Edges] input[type=search]", "FFN 2")
    opened.page.wait_for_timeout(50)
    found = {edge: w for edge, w in weights_of(graph).items() if edge[:2] == (2, "ffn")}
    assert len(opened.table("Edges")) == len(found) > 1
    opened.press("section[aria-label=Edges] button:text-is('CSV')")
    opened.page.wait_for_timeout(100)
    copied = opened.page.evaluate("navigator.clipboard.readText()")
    read = list(csv.DictReader(io.StringIO(copied)))
    assert [row["kind"] for row in read] == ["FFN 2"] * len(found)
    assert sorted(float(row["weight"]) for row in read) == pytest.approx(sorted(found.values()))
    opened.check()


def test_copied_text_is_no_formula(tmp_path: Path, graph: RouteGraph) -> None:
    import dataclasses

    tokens = ["=1+1", "+2", "@SUM(A1)", '"quoted",', "-x", *graph.tokens[5:]]
    page = dataclasses.replace(graph, tokens=tokens).to_html()
    opened = Opened.of(page, tmp_path, permissions=["clipboard-read", "clipboard-write"])
    opened.press(".modes >> text=Table")
    opened.press("section[aria-label=Tokens] button:text-is('CSV')")
    opened.page.wait_for_timeout(100)
    read = csv.DictReader(io.StringIO(opened.page.evaluate("navigator.clipboard.readText()")))
    by_position = {int(row["position"]): row["token"] for row in read}
    cells = [by_position[i] for i in range(5)]
    assert cells == ["'=1+1", "+2", "'@SUM(A1)", '"quoted",', "'-x"]
    opened.check()


def test_text_view_shows_importance_and_follows_a_word(opened: Opened, graph: RouteGraph) -> None:
    opened.press(".modes >> text=Text")
    words = opened.page.locator(".word")
    assert words.count() == N_TOKENS
    shares = words.evaluate_all(
        "all => all.map((w) => Number(w.style.getPropertyValue('--share')))"
    )
    importance = graph.token_importance()
    assert shares == pytest.approx((importance / importance.max()).sqrt().tolist(), abs=1e-3)
    chosen = int(importance.argmax())
    words.nth(chosen).click()
    opened.settle()
    assert opened.highlighted() == through(graph, chosen)
    assert words.nth(chosen).get_attribute("aria-pressed") == "true"
    assert opened.page.locator(".word.explained").count() == 1
    opened.check()


def test_undo_redo_and_the_address(tmp_path: Path, graph: RouteGraph) -> None:
    opened = Opened.of(graph.to_html(), tmp_path)
    page = opened.page
    undo = page.locator("button[aria-label=Undo]")
    assert undo.is_disabled()
    threshold = opened.slide(400)
    opened.press("[data-shows=ffn]")
    node = reached(graph.prune(threshold))[0]
    opened.click({"node": node})
    opened.press(".picked-bar >> text=Pin")
    page.fill(".pins input[placeholder=name]", "the <b>source</b>")
    page.keyboard.press("Tab")
    page.wait_for_timeout(250)
    state = opened.explorer("e.state()")
    assert (state["threshold"], state["hidden"]) == (threshold, ["ffn"])
    assert state["pins"] == [{"node": node, "name": "the <b>source</b>", "group": ""}]
    assert page.locator(".pin-name").text_content() == "the <b>source</b>"
    again = Opened(page.url)
    again.settle()
    assert again.explorer("e.state()") == state
    assert again.edges() == edges_of(graph.prune(threshold))
    again.page.close()
    for _ in range(4):
        undo.click()
    opened.settle()
    assert opened.explorer("e.state().hidden") == []
    assert opened.shown()["threshold"] == threshold
    page.keyboard.press("Control+z")
    page.wait_for_timeout(50)
    assert undo.is_disabled()
    assert opened.edges() == edges_of(graph)
    page.keyboard.press("Control+Shift+z")
    page.wait_for_timeout(50)
    opened.settle()
    assert opened.shown()["threshold"] == threshold
    opened.check()


@pytest.mark.parametrize(
    "fragment", ["threshold=7&node=99999999", "pins=[[1", "edge=9.x.1.2&open=a,b"]
)
def test_a_wrong_address_is_harmless(tmp_path: Path, graph: RouteGraph, fragment: str) -> None:
    opened = Opened.of(graph.to_html(), tmp_path, hash=f"#{fragment}")
    assert opened.edges() == edges_of(graph)
    opened.check()


def test_pins_are_grouped(opened: Opened, graph: RouteGraph) -> None:
    page = opened.page
    nodes = reached(graph)[:2]
    for node in nodes:
        opened.click({"node": node})
        opened.press(".picked-bar >> text=Pin")
    for _ in range(2):  # those without a group come first
        page.locator(".pins input[placeholder=group]").first.fill("names")
        page.keyboard.press("Tab")
        page.wait_for_timeout(60)
    flow = sum(float(opened.explorer("e.scene.pruned.flow[x]", node)) for node in nodes)
    said = page.locator("[role=group][aria-label='Group names'] h3").text_content()
    assert float(said.rpartition(" ")[2]) == pytest.approx(flow, abs=6e-4)
    assert page.locator(".pin").count() == 2
    opened.check()


def test_zoom_pan_and_minimap(opened: Opened) -> None:
    page = opened.page
    before = opened.shown()["view"]
    opened.press("button[aria-label='Zoom in']")
    opened.press("button[aria-label='Zoom in']")
    near = opened.shown()["view"]
    assert near["sx"] == pytest.approx(min(120, before["sx"] * 1.96))
    assert near["sx"] > before["sx"]
    assert page.locator(".minimap").is_visible()
    box = page.locator(".plot").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + 25
    opened.explorer("e.setView({ tx: e.grid.view().tx - 200 })")
    opened.settle()
    near = opened.shown()["view"]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 10, y + 5)
    page.mouse.move(x + 40, y + 30)
    page.mouse.up()
    page.wait_for_timeout(60)
    opened.settle()
    moved = opened.shown()["view"]
    assert (moved["sx"], moved["sy"]) == (near["sx"], near["sy"])
    assert moved["tx"] - near["tx"] == pytest.approx(40, abs=1)
    small = page.locator(".minimap").bounding_box()
    page.mouse.click(small["x"] + small["width"] - 2, small["y"] + small["height"] / 2)
    page.wait_for_timeout(60)
    opened.settle()
    assert opened.shown()["view"]["tx"] < moved["tx"]
    page.mouse.move(x, y)
    page.keyboard.down("Control")
    page.mouse.wheel(0, 600)
    page.keyboard.up("Control")
    page.wait_for_timeout(60)
    opened.settle()
    assert opened.shown()["view"]["sx"] < moved["sx"]
    opened.press("button[aria-label='Show the whole graph']")
    assert not page.locator(".minimap").is_visible()
    opened.check()


def test_the_graph_is_reached_by_keyboard(opened: Opened, graph: RouteGraph) -> None:
    page = opened.page
    page.focus(".plot")
    for pressed in ("ArrowDown", "ArrowDown", "ArrowLeft", "Enter"):
        page.keyboard.press(pressed)
        page.wait_for_timeout(40)
    opened.settle()
    top = node_of(graph, graph.n_layers - 1, "post", graph.position)
    T = len(graph.tokens)
    assert opened.explorer("e.state().selected") == {"node": top - T - 1}
    said = page.locator(".plot [role=status]").text_content()
    assert said == f"{graph.tokens[-2]} #{T - 2}, after the attention of layer 3: not reached"
    page.keyboard.press("Escape")
    page.focus(f".tokens li[data-first='{graph.position}']")
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(40)
    page.keyboard.press("Enter")
    page.wait_for_timeout(40)
    assert opened.explorer("e.state().selected") == {"node": graph.position - 1}
    opened.check()


def test_fullscreen_or_the_whole_page(opened: Opened) -> None:
    fills = """(root) => document.fullscreenElement !== null || root.hasAttribute("data-wide")"""
    root = opened.page.locator(".root").element_handle()
    assert not opened.page.evaluate(fills, root)
    opened.press("button[aria-label=Fullscreen]")
    opened.page.wait_for_timeout(100)
    assert opened.page.evaluate(fills, root)
    opened.press("button[aria-label=Fullscreen]")
    opened.page.wait_for_timeout(100)
    assert not opened.page.evaluate(fills, root)
    opened.check()


def test_every_control_has_a_name(opened: Opened, graph: RouteGraph) -> None:
    opened.click({"node": reached(graph)[0]})
    nameless = opened.page.locator("button, input, select, textarea, summary").evaluate_all(
        """all => all.filter((e) => !(e.textContent.trim() || e.getAttribute("aria-label") ||
            e.labels?.length || e.title)).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    opened.check()


def saved(opened: Opened, name: str) -> bytes:
    opened.press(".menu summary")
    with opened.page.expect_download() as waiting:
        opened.page.click(f".menu button:text-is('{name}')")
    return Path(waiting.value.path()).read_bytes()


def test_downloads(tmp_path: Path, hostile: RouteGraph) -> None:
    opened = Opened.of(hostile.to_html(), tmp_path)
    assert json.loads(saved(opened, "JSON")) == json.loads(hostile.to_json())
    png = saved(opened, "PNG")
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 800
    assert height > 600
    svg = ElementTree.fromstring(saved(opened, "SVG"))
    space = "{http://www.w3.org/2000/svg}"
    tags = {element.tag.removeprefix(space) for element in svg.iter()}
    assert tags == {"svg", "title", "rect", "path", "text"}
    texts = [element.text or "" for element in svg.iter(f"{space}text")]
    assert any(text.startswith(HOSTILE[0][:12]) for text in texts)
    drawn = sum(len(re.findall("M", e.attrib["d"])) for e in svg.iter(f"{space}path"))
    assert drawn > len(hostile.edges.layer)
    opened.check()


@pytest.fixture
def hostile(graph: RouteGraph) -> RouteGraph:
    import dataclasses

    return dataclasses.replace(graph, tokens=HOSTILE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_nothing_is_wider_than_the_page(
    tmp_path: Path, graph: RouteGraph, scheme: str, size: tuple[int, int]
) -> None:
    viewport = dict(zip(("width", "height"), size, strict=True))
    opened = Opened.of(graph.to_html(), tmp_path, viewport=viewport, color_scheme=scheme)
    assert opened.explorer("e.scene.theme.dark") == (scheme == "dark")
    for mode in ("Table", "Text", "Graph"):
        opened.press(f".modes >> text={mode}")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= size[0]
    opened.press("button[aria-label$='colours']")
    assert opened.explorer("e.scene.theme.dark") == (scheme == "light")
    opened.check()


def test_kinds_that_the_page_does_not_know_are_drawn(tmp_path: Path, graph: RouteGraph) -> None:
    """QUERY and KEY edges of other versions: dashed, with weight and name."""
    document = json.loads(graph.to_json())
    edges = document["edges"]
    place = edges["kind"].index("residual_mid")
    for name, value in {"layer": edges["layer"][place], "kind": "query", "weight": 0.5,
                        "target": graph.position, "source": 2}.items():  # fmt: skip
        edges[name].insert(place, value)
    page = graph.to_html()
    data = page.partition('id="data">')[2].partition("</script>")[0]
    opened = Opened.of(page.replace(data, json.dumps(document)), tmp_path)
    added = (edges["layer"][place], "query", graph.position, 2)
    assert opened.weights()[added] == 0.5
    assert opened.page.locator("[data-shows=other]").is_checked()
    before = opened.shown()["visible"]
    opened.press("[data-shows=other]")
    assert opened.shown()["visible"] == before - 1
    opened.press("[data-shows=other]")
    opened.point(key(added))
    assert f"Query, layer {added[0]}" in opened.page.locator(".tip").inner_text()
    opened.check()


def test_shared_values_lead_to_the_lower_layer(tmp_path: Path, graph: RouteGraph) -> None:
    import dataclasses

    shared = dataclasses.replace(graph, value_layers=[0, 1, 1, 1])
    opened = Opened.of(shared.to_html(), tmp_path)
    importance = opened.shown()["importance"]
    assert importance == pytest.approx(shared.token_importance().tolist(), abs=1e-7)
    assert not torch.allclose(shared.token_importance(), graph.token_importance(), atol=1e-4)
    opened.check()


def test_a_document_of_another_kind_is_refused_in_words(tmp_path: Path, graph: RouteGraph) -> None:
    page = graph.to_html()
    data = page.partition('id="data">')[2].partition("</script>")[0]
    opened = Opened.of(page.replace(data, '{"format": "other"}'), tmp_path, settle=False)
    said = opened.page.locator("[role=alert]").inner_text()
    assert said.startswith("The graph cannot be drawn: this is no route graph")
    opened.check()


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """2,000 tokens and 130,000 edges: a graph of this size is made up, its weights at random."""
    from ifr_fast.graph.tables import EdgeTable, HeadEdgeTable

    T, L, each = 2000, 30, 1200
    generator = torch.Generator().manual_seed(1)

    def table() -> tuple[EdgeTable, HeadEdgeTable]:
        edges: list[tuple[int, int, int, int, float]] = []
        for layer in range(L):
            targets = torch.randperm(T, generator=generator)[:each].sort().values.tolist()
            for kind in (1, 2, 3):
                edges += [(layer, kind, t, t, 0.6) for t in targets]
            for t in targets:
                sources = torch.randint(0, t + 1, (2,), generator=generator).unique().tolist()
                edges += [(layer, 0, t, s, 0.15) for s in sources]
        edges.sort()
        columns = [torch.tensor(column) for column in zip(*edges, strict=True)]
        whole = EdgeTable(*columns[:4], columns[4].float())
        none = torch.zeros(0, dtype=torch.int64)
        return whole, HeadEdgeTable(none, none, none, none, torch.zeros(0))

    import dataclasses

    small = trace(False)
    edges, heads = table()
    graph = dataclasses.replace(
        small, tokens=[f" t{i}" for i in range(T)], token_ids=torch.arange(T), position=T - 1,
        threshold=0.01, n_layers=L, edges=edges, head_edges=heads, unattributed=[],
        parallel=torch.zeros(L, dtype=torch.bool), value_layers=None,
    )  # fmt: skip
    text = graph.to_html()
    path = tmp_path_factory.mktemp("long") / "page.html"
    path.write_text(text, "utf-8")
    return path, (len(text), len(edges.layer))


PAN = """async (steps) => {
    const e = document.getElementById("explorer").explorer, times = [];
    let last = performance.now();
    for (let i = 0; i < steps; i++) {
        const { tx, ty } = e.grid.view();
        e.setView({ tx: tx + 15, ty: ty + (i % 20 < 10 ? 4 : -4) });
        await new Promise(requestAnimationFrame);
        times.push(performance.now() - last);
        last = performance.now();
    }
    return times;
}"""


def test_what_is_picked_in_a_table_comes_into_sight(long_page: tuple[Path, Any]) -> None:
    opened = Opened(long_page[0].as_uri())
    opened.settle()
    x, _ = opened.where({"node": 100})
    assert x < 0
    opened.page.goto(f"{long_page[0].as_uri()}#node=100&pins=[[1500,%22far%22,%22%22]]")
    opened.page.wait_for_timeout(50)
    opened.settle()
    opened.press(".pins li button.link")
    opened.page.wait_for_timeout(60)
    box = opened.page.locator(".plot").bounding_box()
    x, y = opened.where({"node": 1500})
    assert box["x"] < x < box["x"] + box["width"]
    assert box["y"] < y < box["y"] + box["height"]
    opened.page.close()


def test_a_long_text_is_drawn_and_panned_in_time(long_page: tuple[Path, Any]) -> None:
    """Bounds are those of the issue, with room for a busy machine."""
    path, (size, n_edges) = long_page
    assert n_edges > 130_000
    assert size < 6_000_000
    opened = Opened(path.as_uri())
    opened.settle()
    drawn = opened.page.evaluate(
        "performance.now() - performance.getEntriesByType('navigation')[0].responseEnd"
    )
    assert drawn < 4000
    for view in ("first", "whole"):
        if view == "whole":
            opened.explorer("e.grid.fit()")
            opened.settle()
            opened.explorer("e.grid.zoom(3)")
            opened.settle()
        times = sorted(opened.page.evaluate(PAN, 90))
        assert times[len(times) // 2] < 1000 / 30
    opened.check()
