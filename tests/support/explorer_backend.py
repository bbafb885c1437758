# ruff: noqa: A002 (`input` is the interface's name)
"""A stand-in for the explorer's server: its methods on a tracer, over requests of the page."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import torch
from page import Opened

from ifr_fast import IfrError, Tracer
from ifr_fast.drilldown.lens import TokenScore
from ifr_fast.export.html import explorer_script
from ifr_fast.export.packed import to_packed_json
from ifr_fast.graph.tables import EdgeKind

HOST = "http://explorer.test"
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>explorer</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'">
<link rel="stylesheet" href="/page.css"><div id="explorer" data-ifr-host="server"></div>
<script src="/explorer.js"></script></html>"""  # noqa: E501
Lines = list[dict[str, Any]]


class Backend:
    """The methods; what was called is kept in `calls`."""

    def __init__(self, tracer: Tracer, first: dict[str, Any]) -> None:
        self.tracer = tracer
        self.first = first  # what `models` says beside the usual
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.instead: dict[str, Callable[[dict[str, Any]], Lines]] = {}
        self.model = "tiny"

    def of(self, method: str) -> list[dict[str, Any]]:
        return [params for name, params in self.calls if name == method]

    def answer(self, method: str, params: dict[str, Any]) -> Lines:
        self.calls.append((method, params))
        if method in self.instead:
            return self.instead[method](params)
        try:
            return [{"result": getattr(self, method)(**params)}]
        except (IfrError, ValueError) as error:
            return [{"error": {"message": str(error), "argument": None}}]

    def text(self, input: dict[str, Any]) -> Any:
        if "messages" in input:  # a template of one token for each role
            roles = {"system": 1, "user": 2, "assistant": 3}
            ids = [[roles[m["role"]], *self.ids(m["content"])] for m in input["messages"]]
            return [i for message in ids for i in message]
        return input["token_ids"] if "token_ids" in input else self.ids(input["text"])

    def ids(self, text: str) -> Any:
        if self.tracer.tokenizer is not None:
            return self.tracer.tokenizer(text)["input_ids"]
        return [4 + (ord(char) % 90) for char in text]

    def models(self) -> dict[str, Any]:
        return {
            "current": self.open_model(self.model),
            "known": ["tiny", "other"],
            "devices": ["cpu"],
            "dtypes": ["float32", "bfloat16"],
            "formats": ["neuronpedia", "graphml"],
            "limits": {"max_tokens": 4096, "max_upload": 2000},
            **self.first,
        }

    def open_model(self, name: str, device: str = "", dtype: str = "") -> dict[str, Any]:
        if name == "missing":
            raise ValueError("name: there is no model `missing`")
        self.model = name
        n = self.tracer.decoder.n_layers
        sizes = [["layers", n], ["heads", self.tracer.decoder.n_heads], ["parameters", 123456]]
        return {"name": name, "sizes": sizes, "n_layers": n, "n_heads": 4}

    def tokenize(self, input: dict[str, Any]) -> dict[str, Any]:
        roles: list[str | None] = []
        for message in input.get("messages", []):
            roles += [None] + [message["role"]] * len(self.ids(message["content"]))
        return {"token_ids": self.text(input), "roles": roles}

    def trace(
        self,
        input: dict[str, Any],
        threshold: float,
        granularity: Any,
        renormalize: bool,
        position: int = -1,
        positions: list[int] | None = None,
    ) -> dict[str, Any]:
        graph = self.tracer.trace(
            self.text(input),
            position=positions or position,
            threshold=threshold,
            granularity=granularity,
        )
        return {"graph": json.loads(to_packed_json(graph))}

    def edge(
        self, input: dict[str, Any], layer: int, kind: str, target: int, source: int
    ) -> dict[str, Any]:
        (scores,) = self.tracer.contributions(
            self.text(input), rows=[target], layers=[layer], keep=0.0
        )
        edges = scores.edges
        (place,) = (edges.source == source).nonzero().flatten().tolist()
        weights = edges.head_weight[place].tolist()
        heads = [{"head": head, "weight": weight} for head, weight in enumerate(weights)]
        return {"weight": float(edges.weight[place]), "heads": heads}

    def contribution_map(self, input: dict[str, Any], layer: int, head: int) -> dict[str, Any]:
        found = self.tracer.contribution_map(self.text(input), layer=layer, head=head)
        return {"weights": found.tolist()}

    def attention_map(self, input: dict[str, Any], layer: int, head: int) -> dict[str, Any]:
        T = len(self.text(input))
        row, column = torch.tril_indices(T, T).tolist()
        weight = [(1 + i % 7) / 10 for i in range(len(row))]
        return {"size": T, "row": row, "column": column, "weight": weight}

    def promoted(
        self,
        input: dict[str, Any],
        layer: int,
        part: str,
        position: int,
        k: int,
        normalize: bool,
        **of: Any,
    ) -> dict[str, Any]:
        if part == "attention":
            of = {"head": 0}
        found = self.tracer.promoted_tokens(
            self.text(input), layer=layer, position=position, k=k, **of
        )
        return {"promoted": scored(found.promoted), "suppressed": scored(found.suppressed)}

    def lens(
        self,
        input: dict[str, Any],
        layer: int,
        kind: str,
        position: int,
        k: int,
        normalize: bool,
    ) -> dict[str, Any]:
        found = self.tracer.logit_lens(self.text(input), (layer, kind, position), k=k)
        tokens = [
            {
                "token": top.token,
                "id": top.token_id,
                "logit": float(found.logits[top.token_id]),
                "probability": top.probability,
                "rank": found.rank(top.token_id),
                "rank_before": None if kind == "embed" else found.rank(top.token_id) + 3,
            }
            for top in found.predictions
        ]
        return {"tokens": tokens}

    def neurons(self, input: dict[str, Any], layer: int, position: int, k: int) -> dict[str, Any]:
        (found,) = self.tracer.neurons(self.text(input), layer=layer, position=position).top(k)
        return {"neurons": [neuron._asdict() for neuron in found]}

    def compare(
        self,
        a: dict[str, Any],
        b: dict[str, Any],
        threshold: float,
        granularity: Any,
        renormalize: bool,
    ) -> dict[str, Any]:
        first, second = (
            self.tracer.trace(
                self.text(x["input"]),
                position=x.get("positions") or x.get("position", -1),
                threshold=threshold,
                granularity=granularity,
            )
            for x in (a, b)
        )
        difference = first.compare(second)
        edges = {name: column.tolist() for name, column in difference.edges._asdict().items()}
        edges["kind"] = [EdgeKind(kind).name.lower() for kind in edges["kind"]]
        return {
            "a": json.loads(first.to_json()),
            "b": json.loads(second.to_json()),
            "difference": {"columns": difference.columns, "edges": edges},
        }

    def export(
        self,
        input: dict[str, Any],
        threshold: float,
        format: str,
        granularity: Any,
        renormalize: bool,
        position: int = -1,
        positions: list[int] | None = None,
    ) -> dict[str, Any]:
        graph = self.tracer.trace(
            self.text(input),
            threshold=threshold,
            position=positions or position,
            granularity=granularity,
        )
        data = graph.to_graphml().encode()
        return {
            "name": f"routes.{format}",
            "media_type": "application/xml",
            "base64": base64.b64encode(data).decode(),
        }


def scored(tokens: list[TokenScore]) -> list[dict[str, Any]]:
    return [{"token": t.token, "id": t.token_id, "logit": t.logit} for t in tokens]


class Served(Opened):
    """The page of a server, whose answers are those of a `Backend`."""

    def __init__(self, backend: Backend, fragment: str = "", **options: Any) -> None:
        self.backend = backend
        self.held: list[Any] = []  # requests that are not answered yet
        self.hold: set[str] = set()  # methods whose requests are held
        super().__init__(f"{HOST}/?token=secret{fragment}", **options)
        self.settle()

    def before(self) -> None:
        self.page.route(f"{HOST}/**", self._answer)

    def _answer(self, route: Any) -> None:
        path = route.request.url.removeprefix(HOST).partition("?")[0].partition("#")[0]
        if path == "/explorer.js":
            route.fulfill(body=explorer_script(), content_type="text/javascript")
        elif path == "/page.css":
            css = "html,body{height:100%;margin:0}#explorer{height:100%}"
            route.fulfill(body=css, content_type="text/css")
        elif path.startswith("/api/"):
            assert route.request.headers["x-ifr-token"] == "secret"
            method = path.removeprefix("/api/")
            if method in self.hold:
                self.held.append(route)
                return
            lines = self.backend.answer(method, route.request.post_data_json)
            body = "".join(json.dumps(line) + "\n" for line in lines)
            route.fulfill(body=body, content_type="application/x-ndjson")
        else:
            route.fulfill(body=PAGE, content_type="text/html")

    def check(self) -> None:
        assert self.complaints == []
        assert all(url.startswith((HOST, "blob:")) for url in self.requests)
        self.page.close()
