"""The page with a backend: every interaction asks for what it should, and shows the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from explorer_backend import HOST, Backend, Served
from hostile import HOSTILE, tracer
from page import Edge, edges_of, key, weights_of

from ifr_fast.export.labels import visible
from ifr_fast.routes.route_graph import RouteGraph

pytestmark = pytest.mark.usefixtures("browser")

TEXT = "a quick fox"


@pytest.fixture
def backend() -> Backend:
    return Backend(tracer(False, 4), {"input": {"text": TEXT}})


@pytest.fixture
def served(backend: Backend) -> Served:
    return Served(backend)


def traced(backend: Backend, text: str = TEXT, **options: Any) -> RouteGraph:
    return backend.tracer.trace(backend.ids(text), **{"threshold": 0.01, **options})


def heaviest(graph: RouteGraph, kind: str) -> Edge:
    weights = {e: w for e, w in weights_of(graph).items() if e[1] == kind and e[2] == 9}
    if kind == "attention":
        weights = {e: w for e, w in weights.items() if e[2] != e[3]}
    return max(weights, key=lambda edge: weights[edge])


def open_edge(served: Served, edge: Edge) -> None:
    served.page.goto(f"{HOST}/?token=secret#edge={'.'.join(map(str, edge))}&text=a+quick+fox")
    served.page.reload()
    served.settle()
    served.page.wait_for_timeout(60)
    served.settle()


def open_node(served: Served, node: int) -> None:
    served.page.goto(f"{HOST}/?token=secret#node={node}&text=a+quick+fox")
    served.page.reload()
    served.settle()
    served.page.wait_for_timeout(60)
    served.settle()


def open_part(served: Served, name: str) -> None:
    served.page.locator(".part > summary", has_text=name).click()


def test_first_picture_is_the_trace_of_the_text(served: Served, backend: Backend) -> None:
    assert served.weights() == pytest.approx(weights_of(traced(backend)), rel=1e-6)
    (params,) = backend.of("trace")
    assert params["input"] == {"text": TEXT, "model": "tiny"}
    assert params["threshold"] == 0.01
    assert "token" not in served.page.url  # the token leaves the address
    assert served.page.locator(".text[aria-pressed=true]").text_content() == TEXT
    served.check()


def test_a_triangle_switches_the_prediction(served: Served, backend: Backend) -> None:
    served.press("button.triangle[data-position='6']")
    assert served.weights() == pytest.approx(weights_of(traced(backend, position=6)), rel=1e-6)
    assert backend.of("trace")[-1]["position"] == 6
    assert served.page.locator(".triangle.on").get_attribute("data-position") == "6"
    served.page.wait_for_timeout(200)
    assert "at=6" in served.page.url
    served.press("button[aria-label=Undo]")
    assert served.edges() == edges_of(traced(backend))
    served.press("button[aria-label=Redo]")
    assert served.edges() == edges_of(traced(backend, position=6))
    assert len(backend.of("trace")) == 2  # what is known is not asked for again
    served.check()


def test_dragging_over_tokens_explains_a_span(served: Served, backend: Backend) -> None:
    page = served.page
    boxes = [page.locator(f".tokens li[data-first='{i}']").bounding_box() for i in (7, 8, 9)]
    for i, box in enumerate(boxes):
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 8, steps=3)
        if i == 0:
            page.mouse.down()
    page.mouse.up()
    served.press(".span-bar button.primary")
    graph = traced(backend, position=[7, 8, 9])
    assert backend.of("trace")[-1]["positions"] == [7, 8, 9]
    assert served.weights() == pytest.approx(weights_of(graph), rel=1e-6)
    importance = served.shown()["importance"]
    assert importance == pytest.approx(graph.token_importance().tolist(), abs=1e-7)
    served.check()


def test_a_span_is_marked_by_keyboard(served: Served, backend: Backend) -> None:
    served.page.focus(".tokens li[data-first='10']")
    for pressed in ("ArrowLeft", "Shift+ArrowLeft", "Shift+ArrowLeft"):
        served.page.keyboard.press(pressed)
        served.page.wait_for_timeout(40)
    served.press(".span-bar button.primary")
    assert backend.of("trace")[-1]["positions"] == [7, 8, 9]
    assert served.edges() == edges_of(traced(backend, position=[7, 8, 9]))
    served.press(".modes >> text=Text")
    assert served.page.locator(".word.explained").count() == 3
    served.page.locator(".word").nth(4).dblclick()
    served.page.wait_for_timeout(60)
    served.settle()
    assert backend.of("trace")[-1]["position"] == 4
    served.check()


def test_an_edge_s_heads_maps_and_tokens(served: Served, backend: Backend) -> None:
    edge = heaviest(traced(backend), "attention")
    layer, _, target, source = edge
    open_edge(served, edge)
    about = {"layer": layer, "kind": "attention", "target": target, "source": source}
    answer = backend.edge({"text": TEXT}, **about)
    assert {k: v for k, v in backend.of("edge")[-1].items() if k != "input"} == about
    rows = served.table("All heads")
    expected = {h["head"]: h["weight"] for h in answer["heads"]}
    assert {int(r[0]): float(r[1]) for r in rows} == pytest.approx(expected, abs=6e-4)
    attention = backend.promoted(
        {"text": TEXT}, layer, "attention", target, 10, True
    )  # of the whole block
    shown = [row[0] for row in served.table("Promoted by the attention")]
    assert shown == [visible(t["token"]) for t in attention["promoted"]]

    head = int(rows[0][0])
    served.press("section[aria-label='All heads'] tbody tr:first-child button")
    alpha = backend.attention_map({"text": TEXT}, layer, head)
    largest = max(alpha["weight"])
    assert [float(row[2]) for row in served.table("Attention map")] == [largest] * 8
    served.press(".sub >> text=Contribution")
    contributions = backend.tracer.contribution_map(backend.ids(TEXT), layer=layer, head=head)
    top = contributions.flatten().sort(descending=True).values[:8].tolist()
    shown_top = [float(row[2]) for row in served.table("Contribution map")]
    assert shown_top == pytest.approx(top, abs=6e-4)
    value = served.page.locator(".heat-map .value").text_content()
    assert float(value) == pytest.approx(float(contributions[target, source]), abs=6e-4)
    asked = backend.of("promoted")[-1]
    assert (asked["part"], asked["head"], asked["position"], asked["source"]) == (
        "head", head, target, source
    )  # fmt: skip
    of_head = backend.promoted(
        {"text": TEXT}, layer, "head", target, 10, True, head=head, source=source
    )
    suppressed = served.table(f"Suppressed by head {head}")
    assert [row[0] for row in suppressed] == [visible(t["token"]) for t in of_head["suppressed"]]
    logits = [t["logit"] for t in of_head["suppressed"]]
    assert [float(row[1]) for row in suppressed] == pytest.approx(logits, abs=6e-3)
    served.check()


def test_a_map_is_read_under_the_pointer(served: Served, backend: Backend) -> None:
    edge = heaviest(traced(backend), "attention")
    open_edge(served, edge)
    served.press("section[aria-label='All heads'] tbody tr:first-child button")
    served.press(".sub >> text=Contribution")
    head = int(served.table("All heads")[0][0])
    found = backend.tracer.contribution_map(backend.ids(TEXT), layer=edge[0], head=head)
    canvas = served.page.locator(".heat-map canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    T = len(TEXT)
    for row, column in ((T - 1, 0), (4, 4), (6, 2), (2, 6)):
        served.page.mouse.move(
            box["x"] + (column + 0.5) * box["width"] / T, box["y"] + (row + 0.5) * box["height"] / T
        )
        served.page.wait_for_timeout(40)
        value = float(served.page.locator(".heat-map .value").text_content())
        assert value == pytest.approx(float(found[row, column]), abs=6e-4)
    served.check()


def test_an_ffn_s_neurons_and_tokens(served: Served, backend: Backend) -> None:
    edge = heaviest(traced(backend), "ffn")
    layer, _, position, _ = edge
    open_edge(served, edge)
    (neurons,) = backend.tracer.neurons(backend.ids(TEXT), layer=layer, position=position).top(12)
    rows = served.table("Neurons")
    assert [int(row[0]) for row in rows] == [n.neuron for n in neurons]
    assert [float(row[2]) for row in rows] == pytest.approx(
        [n.importance for n in neurons], abs=6e-4
    )
    ffn = backend.tracer.promoted_tokens(backend.ids(TEXT), layer=layer, position=position)
    shown = [row[0] for row in served.table("Promoted by the FFN")]
    assert shown == [visible(t.token) for t in ffn.promoted]
    served.press("section[aria-label=Neurons] tbody tr:first-child button")
    one = backend.tracer.promoted_tokens(
        backend.ids(TEXT), layer=layer, position=position, neuron=neurons[0].neuron
    )
    label = f"Suppressed by neuron {neurons[0].neuron}"
    assert [row[0] for row in served.table(label)] == [visible(t.token) for t in one.suppressed]
    served.check()


def test_a_node_off_the_graph_has_its_lens(served: Served, backend: Backend) -> None:
    graph = traced(backend)
    T = len(TEXT)
    layer, position = 3, 2  # of the last layer only the prediction's node is on it
    assert (layer, position) not in {(edge[0], edge[2]) for edge in edges_of(graph)}
    open_node(served, (2 * layer + 2) * T + position)
    assert "not reached at this threshold" in served.page.inner_text(".picked-facts")
    lens = backend.tracer.logit_lens(backend.ids(TEXT), (layer, "post", position))
    rows = served.table("Logit lens")
    assert [row[0] for row in rows] == [visible(p.token) for p in lens.predictions]
    assert [int(row[2]) for row in rows] == [lens.rank(p.token_id) for p in lens.predictions]
    assert [row[3] for row in rows] == ["▲3"] * len(rows)  # of the stand-in: three ranks up
    served.check()


def test_a_click_off_the_graph_finds_the_node(served: Served) -> None:
    served.slide(900)
    served.click({"node": 3 * len(TEXT) + 1})
    assert served.explorer("e.state().selected") == {"node": 3 * len(TEXT) + 1}
    assert served.page.locator("section[aria-label='Logit lens']").is_visible()
    served.check()


def test_options_are_asked_for(served: Served, backend: Backend) -> None:
    open_part(served, "Options")
    served.press("label:has-text('Compare each head')")
    assert backend.of("trace")[-1]["granularity"] == "head"
    assert served.weights() == pytest.approx(
        weights_of(traced(backend, granularity="head")), rel=1e-6
    )
    served.press("label:has-text('Renormalize')")
    assert backend.of("trace")[-1]["renormalize"] is True
    served.page.fill("label:has-text('Lowest threshold') input", "0.05")
    served.page.keyboard.press("Tab")
    served.page.wait_for_timeout(40)
    served.settle()
    assert backend.of("trace")[-1]["threshold"] == 0.05
    served.press("label:has-text('Normalize before')")
    served.click({"node": 9})
    assert backend.of("lens")[-1]["normalize"] is False
    served.check()


def test_texts_are_added_loaded_and_removed(served: Served, backend: Backend) -> None:
    page = served.page
    page.fill("textarea[aria-label='New text']", "another one")
    served.press(".form button:text-is('Explain')")
    assert backend.of("trace")[-1]["input"]["text"] == "another one"
    assert served.edges() == edges_of(traced(backend, "another one"))

    def load(name: str, data: bytes) -> None:
        page.set_input_files(
            "input[type=file]", {"name": name, "mimeType": "text/plain", "buffer": data}
        )
        page.wait_for_timeout(60)
        served.settle()

    load("lines.txt", b"from a file\r\n\r\nand more\n")
    load("lines.jsonl", b'{"text": "of json"}\n{"text": "<b>bold</b>"}\n')
    load("list.json", json.dumps(["in a list"]).encode())
    texts = page.locator(".texts .text").all_text_contents()
    expected = ["from a file", "and more", "of json", "<b>bold</b>", "in a list"]
    assert texts == [TEXT, "another one", *expected]
    assert served.edges() == edges_of(traced(backend, "in a list"))
    load("wrong.json", b"[1, 2]")
    assert "wrong.json cannot be read" in page.inner_text("[role=alert]")
    load("<img src=x>.txt", b"x" * 2001)
    assert (
        page.inner_text("[role=alert] .grow")
        == "<img src=x>.txt has 2,001 bytes; at most 2,000 are read"
    )
    page.locator("button[aria-label='Remove and more']").click()
    assert page.locator(".texts .text").count() == 6
    served.press(".texts .text >> nth=0")
    assert served.edges() == edges_of(traced(backend))
    served.check()


def test_chats_show_roles(served: Served, backend: Backend) -> None:
    page = served.page
    page.click(".chat > summary")
    page.fill("textarea[aria-label='Message 1']", "hi you")
    page.click("text=Add a message")
    page.fill("textarea[aria-label='Message 2']", "hello")
    served.press("text=Explain chat")
    messages = [{"role": "user", "content": "hi you"}, {"role": "assistant", "content": "hello"}]
    assert backend.of("trace")[-1]["input"]["messages"] == messages
    assert served.edges() == edges_of(
        backend.tracer.trace(backend.text({"messages": messages}), threshold=0.01)
    )
    page.wait_for_timeout(60)
    roles = page.locator(".role").evaluate_all(
        "all => all.map((r) => [r.textContent, Number(r.dataset.first), Number(r.dataset.last)])"
    )
    assert roles == [["user", 1, 6], ["assistant", 8, 12]]
    served.press(".modes >> text=Text")
    assert page.locator(".role-start").all_text_contents() == ["user", "assistant"]
    served.check()


def test_prompts_are_compared(served: Served, backend: Backend) -> None:
    other = "a quiet box"
    open_part(served, "Compare")
    served.page.fill("textarea[aria-label='Text to compare with']", other)
    served.press(".panel button:text-is('Compare')")
    first, second = traced(backend), traced(backend, other)
    shown = served.explorer("e.compared()")
    assert sorted(tuple(row[:4]) for row in shown["first"]) == edges_of(first)
    assert sorted(tuple(row[:4]) for row in shown["second"]) == edges_of(second)
    difference = first.compare(second)
    change = (difference.edges.second - difference.edges.first).tolist()
    edges = zip(*(column.tolist() for column in difference.edges[:4]), strict=True)
    names = ["attention", "residual_mid", "ffn", "residual_post"]
    expected = {
        (layer, names[kind], target, source): x
        for (layer, kind, target, source), x in zip(edges, change, strict=True)
        if abs(x) > 0.01
    }
    signs = [1 if sign == 2 else -1 for sign in shown["signs"]]
    drawn = {
        tuple(row[:4]): sign * row[4] for row, sign in zip(shown["difference"], signs, strict=True)
    }
    assert drawn == pytest.approx(expected, rel=1e-6)
    assert len({abs(x) / x for x in expected.values()}) == 2
    served.press("text=Close the comparison")
    assert served.edges() == edges_of(first)
    served.check()


def test_a_generation_is_stepped_through(served: Served, backend: Backend) -> None:
    def generate(params: dict[str, Any]) -> list[dict[str, Any]]:
        lines = []
        for i, step in enumerate(
            backend.tracer.generate(
                backend.text(params["input"]), max_new_tokens=params["max_new_tokens"],
                threshold=params["threshold"], eos_token_id=[],
            )
        ):  # fmt: skip
            graph = json.loads(step.graph.to_json())
            said = {"token": f"<i>{i}", "id": i, "graph": graph}
            lines.append(
                {"progress": {"done": i + 1, "total": 3, "what": "generating", "step": said}}
            )
        return [*lines, {"result": {}}]

    backend.instead["generate"] = generate
    open_part(served, "Generate")
    served.page.fill("label:has-text('New tokens') input", "3")
    served.press(".panel button:text-is('Generate')")
    graphs = [
        step.graph
        for step in backend.tracer.generate(
            backend.ids(TEXT), max_new_tokens=3, threshold=0.01, eos_token_id=[]
        )
    ]
    assert served.page.locator(".steps li").all_text_contents() == ["<i>0", "<i>1", "<i>2"]
    assert served.edges() == edges_of(graphs[2])
    served.press("button[aria-label='Step before']")
    assert served.weights() == pytest.approx(weights_of(graphs[1]), rel=1e-6)
    served.click({"node": 3})
    ids = torch.cat([torch.tensor(backend.ids(TEXT)), graphs[1].token_ids[len(TEXT) :]])
    assert backend.of("lens")[-1]["input"]["token_ids"] == ids.tolist()
    served.press("button[aria-label='Close the generation']")
    assert served.edges() == edges_of(graphs[0]) == edges_of(traced(backend))
    served.check()


def test_models_are_opened_with_their_sizes(served: Served, backend: Backend) -> None:
    page = served.page
    page.fill("input[aria-label^='Model']", "other")
    page.select_option("select[aria-label='Number type']", "bfloat16")
    served.press(".panel button:text-is('Open')")
    assert backend.of("open_model")[-1] == {"name": "other", "dtype": "bfloat16"}
    page.click(".sizes summary")
    assert served.table("Sizes") == [["layers", "4"], ["heads", "4"], ["parameters", "123,456"]]
    assert page.inner_text(".model-name") == "other"
    assert backend.of("trace")[-1]["input"]["model"] == "other"
    page.fill("input[aria-label^='Model']", "missing")
    served.press(".panel button:text-is('Open')")
    assert page.inner_text("[role=alert] .grow") == "name: there is no model `missing`"
    assert page.inner_text(".model-name") == "other"
    served.press("text=Dismiss")
    assert page.locator("[role=alert]").count() == 0
    served.check()


def test_long_work_is_cancelled(served: Served, backend: Backend) -> None:
    page = served.page
    before = served.edges()
    served.hold.add("trace")
    page.click("button.triangle[data-position='4']")
    page.locator(".status progress").wait_for()
    assert page.inner_text(".status").startswith("Tracing")
    page.click(".status >> text=Cancel")
    page.wait_for_timeout(50)
    assert page.locator(".status progress").count() == 0
    assert page.inner_text("[role=alert] .grow") == "Cancelled."
    assert served.edges() == before
    served.hold.clear()
    served.press("button.triangle[data-position='5']")
    assert served.edges() == edges_of(traced(backend, position=5))
    assert page.locator("[role=alert]").count() == 0
    served.page.close()


def test_a_server_that_is_gone_is_said_in_words(served: Served) -> None:
    page = served.page
    page.unroute(f"{HOST}/**")
    page.route(f"{HOST}/**", lambda route: route.abort())
    page.click("button.triangle[data-position='4']")
    page.locator("[role=alert]").wait_for()
    assert "The server does not answer" in page.inner_text("[role=alert]")
    page.unroute(f"{HOST}/**")
    page.route(f"{HOST}/**", lambda route: route.fulfill(status=403, body="no"))
    page.click("button.triangle[data-position='5']")
    page.locator("text=refused: 403").wait_for()
    page.close()


def test_what_a_backend_says_is_text(served: Served, backend: Backend) -> None:
    for words in HOSTILE[:6]:
        backend.instead["trace"] = lambda params, words=words: [{"error": {"message": words}}]
        served.page.fill("textarea[aria-label='New text']", f"{words} ")
        served.press(".form button:text-is('Explain')")
        assert served.page.locator("[role=alert] .grow").text_content() == words
    shadow = "document.getElementById('explorer').shadowRoot"
    found = served.page.evaluate(f"{shadow}.querySelectorAll('img, b, script, iframe').length")
    assert found == 0
    assert served.page.evaluate("typeof window.__pwned") == "undefined"
    served.check()


def test_hostile_names_are_text(backend: Backend) -> None:
    nasty = HOSTILE[3]
    sizes = [[nasty, nasty]]
    backend.first |= {"known": HOSTILE[:5], "devices": [nasty], "formats": [nasty]}
    backend.instead["open_model"] = lambda params: [
        {"result": {"name": nasty, "sizes": sizes, "n_layers": 4, "n_heads": 4}}
    ]
    backend.instead["tokenize"] = lambda params: [{"result": {"roles": [nasty] * 4}}]
    served = Served(backend)
    page = served.page
    page.fill("input[aria-label^='Model']", nasty)
    served.press(".panel button:text-is('Open')")
    assert page.locator(".model-name").text_content() == nasty
    page.click(".sizes summary")
    assert served.table("Sizes") == [[nasty, nasty]]
    page.click(".chat > summary")
    page.fill("textarea[aria-label='Message 1']", "abc")
    served.press("text=Explain chat")
    page.wait_for_timeout(60)
    assert page.locator(".role").all_text_contents() == [nasty]
    page.click(".menu summary")
    assert page.locator(".menu button").all_text_contents()[-1] == nasty
    shadow = "document.getElementById('explorer').shadowRoot"
    assert page.evaluate(f"{shadow}.querySelectorAll('img, b, script, iframe').length") == 0
    assert page.evaluate("typeof window.__pwned") == "undefined"
    served.check()


def test_formats_of_the_backend_are_downloads(served: Served, backend: Backend) -> None:
    threshold = served.slide(300)
    served.page.click(".menu summary")
    with served.page.expect_download() as waiting:
        served.page.click(".menu button:text-is('graphml')")
    assert waiting.value.suggested_filename == "routes.graphml"
    with open(waiting.value.path(), encoding="utf-8") as file:
        assert file.read() == traced(backend, threshold=threshold).to_graphml()
    served.check()


def test_a_page_s_address_brings_back_the_work(backend: Backend) -> None:
    fragment = "#text=some+text&at=3&threshold=0.1&view=text&model=other"
    served = Served(backend, fragment)
    graph = traced(backend, "some text", position=3).prune(0.1)
    assert served.edges() == edges_of(graph)
    assert [params["name"] for params in backend.of("open_model")] == ["other"]
    assert served.page.locator(".word").count() == len("some text")
    served.check()


WIDGET = """async (graph) => {
    const sent = [], listeners = new Set();
    const model = {
        graph,
        get: (name) => ({ graph: model.graph, height: 500 })[name],
        send: (content) => { sent.push(content); },
        on: (event, listener) => {
            if (event === "msg:custom") listeners.add(listener);
            else if (event === "change:graph") model.change = listener;
        },
        off: (event, listener) => listeners.delete(listener),
    };
    const el = document.createElement("div");
    el.id = "widget";
    document.body.replaceChildren(el);
    window.widget = { sent, model, say: (content) => listeners.forEach((f) => f(content)),
        end: ifrExplorer.render({ model, el }) };
    await new Promise((r) => setTimeout(r, 100));
    return sent;
}"""


def test_a_widget_speaks_by_messages(served: Served, backend: Backend) -> None:
    page = served.page
    page.wait_for_timeout(200)
    address, short = page.url, traced(backend, "short")
    sent = page.evaluate(WIDGET, traced(backend).to_json())
    assert [message["method"] for message in sent] == ["models"]
    handle = "document.getElementById('widget').explorer"
    assert page.evaluate(f"{handle}.shown().edges.length") == len(traced(backend).edges.layer)
    models = {**backend.models(), "input": {"text": TEXT}}
    say = "(x) => { window.widget.say(x); return new Promise((r) => setTimeout(r, 60)); }"
    page.evaluate(say, {"id": sent[0]["id"], "result": models})
    trace = page.evaluate("window.widget.sent.at(-1)")
    assert trace["method"] == "trace"
    progress = {"done": 1, "total": 4, "what": "recording"}
    page.evaluate(say, {"id": trace["id"], "progress": progress})
    assert page.locator("#widget progress").get_attribute("value") == "1"
    page.evaluate(say, {"id": 999, "result": {}})  # of nobody
    page.click("#widget >> text=Cancel")
    assert page.evaluate("window.widget.sent.at(-1)") == {"id": trace["id"], "cancel": True}
    page.click("#widget >> button.triangle[data-position='5']")
    page.wait_for_timeout(60)
    trace = page.evaluate("window.widget.sent.at(-1)")
    result = {"graph": json.loads(traced(backend, position=5).to_json())}
    page.evaluate(say, {"id": trace["id"], "result": result})
    rows = page.evaluate(f"{handle}.shown().edges")
    assert sorted(tuple(row[:4]) for row in rows) == edges_of(traced(backend, position=5))
    page.evaluate("x => { widget.model.graph = x; widget.model.change(); }", short.to_json())
    page.wait_for_timeout(200)
    assert page.evaluate(f"{handle}.shown().importance.length") == len("short")
    assert page.url == address  # a notebook's address is its own
    page.evaluate("window.widget.end()")
    assert page.evaluate("document.getElementById('widget').explorer === undefined")
    served.check()


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_the_live_page_fits(backend: Backend, size: tuple[int, int]) -> None:
    served = Served(backend, viewport=dict(zip(("width", "height"), size, strict=True)))
    assert served.page.evaluate("document.documentElement.scrollWidth") <= size[0]
    closed = served.page.locator(".panel.closed").count()
    assert closed == (1 if size[0] < 900 else 0)
    served.press(".panel .fold")
    assert served.page.locator(".panel.closed").count() == 1 - closed
    edge = heaviest(traced(backend), "residual_post")
    served.click(key(edge))
    served.check()
