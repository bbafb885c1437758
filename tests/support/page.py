"""Pages in a real browser: what they draw, what they complain of, and what they ask for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ifr_fast.graph.tables import EdgeKind
from ifr_fast.routes.route_graph import RouteGraph
from ifr_fast.storage.files import write_text

NAMES = ("chromium", "chromium-browser", "google-chrome")
Edge = tuple[int, str, int, int]


_running: list[Any] = []  # the browser of the module that is tested


@contextmanager
def running() -> Iterator[Any]:
    """A browser; the test is skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser to open the page in: none of {', '.join(NAMES)} is on the PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        _running.append(browser)
        yield browser
        _running.remove(browser)
        browser.close()


def edges_of(graph: RouteGraph) -> list[Edge]:
    columns = (column.tolist() for column in graph.edges[:4])
    return sorted(
        (layer, EdgeKind(kind).name.lower(), target, source)
        for layer, kind, target, source in zip(*columns, strict=True)
    )


def weights_of(graph: RouteGraph) -> dict[Edge, float]:
    columns = [column.tolist() for column in graph.edges]
    return {
        (layer, EdgeKind(kind).name.lower(), target, source): weight
        for layer, kind, target, source, weight in zip(*columns, strict=True)
    }


class Opened:
    """A page in the browser; `explorer` is the handle of the component in it."""

    def __init__(self, url: str, **options: Any) -> None:
        viewport = options.pop("viewport", {"width": 1280, "height": 800})
        init = options.pop("init", None)
        self.page = _running[-1].new_page(viewport=viewport, **options)
        if init:
            self.page.add_init_script(init)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = url
        self.before()
        self.page.goto(url)

    def before(self) -> None:
        """What a kind of page prepares before it is opened."""

    @classmethod
    def of(cls, text: str, folder: Path, **options: Any) -> Opened:
        path = folder / "page.html"
        write_text(path, text)
        settle = options.pop("settle", True)
        opened = cls(path.as_uri() + options.pop("hash", ""), **options)
        if settle and "data-ifr-host" in text.partition("srcdoc")[0]:
            opened.settle()
        return opened

    def explorer(self, expression: str, argument: Any = None) -> Any:
        """The value of a JavaScript expression of the handle, `e`, and an argument, `x`."""
        return self.page.evaluate(
            "x => { const e = document.getElementById('explorer').explorer; "
            f"return {expression}; }}",
            argument,
        )

    def settle(self, seconds: float = 60) -> None:
        """Waits until all is drawn and no call is open."""
        for _ in range(int(seconds / 0.02)):
            if self.explorer("!!e && e.settled()"):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"the page did not settle within {seconds} s: {self.complaints}")

    def check(self) -> None:
        """Nothing was complained of, and nothing but the file was asked for."""
        assert self.complaints == []
        inner = ("about:srcdoc", "blob:")
        asked = [url for url in self.requests if not url.startswith(inner)]
        assert [url.partition("#")[0] for url in asked] == [self.url.partition("#")[0]]
        self.page.close()

    def shown(self) -> dict[str, Any]:
        return self.explorer("e.shown()")

    def edges(self) -> list[Edge]:
        return sorted(tuple(row[:4]) for row in self.shown()["edges"])

    def weights(self) -> dict[Edge, float]:
        return {tuple(row[:4]): row[4] for row in self.shown()["edges"]}

    def highlighted(self) -> list[Edge] | None:
        found = self.explorer("e.highlighted()")
        return None if found is None else sorted(tuple(row[:4]) for row in found["edges"])

    def slide(self, step: int) -> float:
        """Moves the slider; the threshold that it stands for."""
        self.page.locator("#threshold").evaluate(
            """(slider, step) => {
                slider.value = step;
                slider.dispatchEvent(new Event("input", { bubbles: true }));
            }""",
            step,
        )
        self.page.wait_for_timeout(30)
        self.settle()
        return self.shown()["threshold"]

    def where(self, what: dict[str, Any]) -> tuple[float, float]:
        """Client coordinates of {"node": number}, or of an edge's middle."""
        self.settle()
        x, y = self.explorer("e.locate(x)", what)
        return x, y

    def point(self, what: dict[str, Any]) -> None:
        self.page.mouse.move(*self.where(what))
        self.page.wait_for_timeout(50)
        self.settle()

    def click(self, what: dict[str, Any]) -> None:
        self.page.mouse.click(*self.where(what))
        self.page.wait_for_timeout(50)
        self.settle()

    def press(self, selector: str, **options: Any) -> None:
        """Clicks an element and waits for what follows."""
        self.page.locator(selector).first.click(**options)
        self.page.wait_for_timeout(30)
        self.settle()

    def table(self, label: str) -> list[list[str]]:
        """The rows that a table of the page shows, as text."""
        rows = self.page.locator(f"section[aria-label='{label}'] tbody tr")
        return rows.evaluate_all(
            "rows => rows.map(row => Array.from(row.cells, cell => cell.textContent))"
        )


def key(edge: Edge) -> dict[str, Any]:
    return dict(zip(("layer", "kind", "target", "source"), edge, strict=True))
