"""A RouteGraph as an attribution graph, the JSON of Neuronpedia and circuit-tracer.

The published schema requires `metadata`, `qParams`, `nodes` and `links`. In this export,

- an `embed` is an `embedding` node, `E_{token id}_{position}`;
- `mid`, `ffn` and `post` nodes are `{layer}_{feature}_{position}`, with feature 0, 1 and 2; their
  `feature_type` is "attention output", "mlp output" or "residual stream", and `clerp`
  labels them;
- each explained position has a `logit` node, `{L + 1}_{token id}_{position}`, for its likeliest
  next token, linked with the position's weight (1 if it is the only one);
- the weight of a link is an importance, so it is positive. Two edges between the same nodes (the
  residual and self-attention) are one link whose weight is their sum; `kinds` has the parts.

The sliders of these tools prune by `influence`, so it is defined as there: nodes are sorted by the
weight of all paths from the prediction (`flow`), and `influence` is the cumulative share of the
total. It is near 1 for the least important nodes, and null for logits.

A cap keeps links from the logits downwards, each time the one with the largest flow among those
into nodes that are already kept, so that the result is connected. The document is ASCII.
"""

from __future__ import annotations

import heapq
import itertools
import json
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from .._version import __version__
from ..arguments import as_index
from ..characters import joined
from ..graph.tables import Node, NodeKind
from .labels import visible
from .links import flow_of, links_of, tops_of

if TYPE_CHECKING:
    from ..graph.data import GraphData

_FEATURE = {
    NodeKind.MID: (0, "attention output"),
    NodeKind.FFN: (1, "mlp output"),
    NodeKind.POST: (2, "residual stream"),
}
_SLUG = 60  # most characters


class _Link(NamedTuple):
    source: Node
    target: Node | None  # None: the logit at its source's position
    weight: float
    kinds: dict[str, float] | None  # weight of each edge in the link, by kind


def to_neuronpedia(graph: GraphData, slug: str | None, scan: str, max_links: int) -> str:
    """The JSON document. Raises ValueError for `max_links` below 1, or a name that is no string."""
    if as_index("max_links", max_links) < 1:
        raise ValueError(f"max_links: expected at least 1, got {max_links}")
    for argument, name in (("slug", "" if slug is None else slug), ("scan", scan)):
        if not isinstance(name, str):
            raise ValueError(f"{argument}: expected a string, got {name!r}")
    prompt = joined(graph.tokens)
    links, flow = _strongest(graph, max_links)
    nodes = list(dict.fromkeys(link.source for link in links))
    influence = _influence(nodes, flow)
    logits = {
        link.source.position: _logit(graph, link.source.position)
        for link in links
        if link.target is None
    }
    document = {
        "metadata": {
            "slug": _slug(prompt) if slug is None else slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": graph.tokens,
            "prompt": prompt,
            "schema_version": 1,
            "info": {
                "description": f"Information flow routes above {graph.threshold:g}",
                "generator": {"name": "ifr_fast", "version": __version__},
            },
            "generation_settings": {
                "threshold": graph.threshold,
                "granularity": graph.granularity,
                "max_links": max_links,
            },
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [
            *(_node(graph, node, flow[node], influence[node]) for node in nodes),
            *logits.values(),
        ],
        "links": [_link(graph, link, logits) for link in links],
    }
    return json.dumps(document, allow_nan=False, separators=(",", ":"))


def _strongest(graph: GraphData, max_links: int) -> tuple[list[_Link], dict[Node, float]]:
    """Links to keep, each after a link out of its target, and the flow of all nodes."""
    single = links_of(graph)
    flow = flow_of(graph)
    kinds: defaultdict[tuple[Node, Node], dict[str, float]] = defaultdict(dict)
    for one in single:
        kinds[one.source, one.target][one.kind.name.lower()] = one.weight
    into: defaultdict[Node, list[_Link]] = defaultdict(list)
    for (source, target), of in kinds.items():
        into[target].append(_Link(source, target, sum(of.values()), of))

    waiting: list[tuple[float, int, _Link]] = []  # strongest first, then by order of insertion
    count = itertools.count()

    def offer(link: _Link) -> None:
        through = link.weight * (1.0 if link.target is None else flow.get(link.target, 0.0))
        heapq.heappush(waiting, (-through, next(count), link))

    for top, weight in zip(tops_of(graph), graph.starts.values(), strict=True):
        offer(_Link(top, None, weight, None))
    found: list[_Link] = []
    reached: set[Node] = set()
    while waiting and len(found) < max_links:
        link = heapq.heappop(waiting)[2]
        found.append(link)
        if link.source not in reached:
            reached.add(link.source)
            for below in into[link.source]:
                offer(below)
    return found, defaultdict(float, flow)


def _influence(nodes: list[Node], flow: dict[Node, float]) -> dict[Node, float]:
    """Cumulative share of the flow, from the node with the largest flow on."""
    total = sum(flow[node] for node in nodes)
    so_far, found = 0.0, {}
    for node in sorted(nodes, key=lambda node: -flow[node]):
        so_far += flow[node]
        found[node] = so_far / total if total else 1.0
    return found


def _name(graph: GraphData, node: Node) -> str:
    if node.kind == NodeKind.EMBED:
        return f"E_{int(graph.token_ids[node.position])}_{node.position}"
    return f"{node.layer}_{_FEATURE[node.kind][0]}_{node.position}"


def _link(graph: GraphData, link: _Link, logits: dict[int, dict[str, Any]]) -> dict[str, Any]:
    target = (
        logits[link.source.position]["node_id"]
        if link.target is None
        else _name(graph, link.target)
    )
    found = {"source": _name(graph, link.source), "target": target, "weight": link.weight}
    return found if link.kinds is None else {**found, "kinds": link.kinds}


def _node(graph: GraphData, node: Node, flow: float, influence: float) -> dict[str, Any]:
    token = graph.tokens[node.position]
    if node.kind == NodeKind.EMBED:
        layer, feature, kind = "E", node.position, "embedding"
        label = f"Emb: {_quoted(token)}"
    else:
        feature, kind = _FEATURE[node.kind]
        layer, label = str(node.layer), f"{kind} of layer {node.layer} at {_quoted(token)}"
    return _fields(
        _name(graph, node),
        feature=feature,
        layer=layer,
        ctx_idx=node.position,
        feature_type=kind,
        clerp=label,
        influence=influence,
        flow=flow,
    )


def _logit(graph: GraphData, position: int) -> dict[str, Any]:
    """Node of the likeliest token after an explained position."""
    predictions = graph.predictions
    if graph.span is not None:
        predictions = graph.span.predictions[graph.span.positions.index(position)]
    layer = str(graph.n_layers + 1)
    if predictions:
        token, token_id, probability = predictions[0]
        label = f"Output {_quoted(token)} (p={probability:.3f})"
    else:
        token_id, probability, label = -1, 0.0, "Output"
    return _fields(
        f"{layer}_{token_id}_{position}",
        feature=token_id,
        layer=layer,
        ctx_idx=position,
        feature_type="logit",
        clerp=label,
        influence=None,
        token_prob=probability,
        is_target_logit=True,
    )


def _fields(name: str, **own: Any) -> dict[str, Any]:
    """A node with all fields of circuit-tracer's nodes."""
    return {
        "node_id": name,
        "jsNodeId": name,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "activation": None,
        **own,
    }


def _quoted(token: str) -> str:
    return f'"{visible(token)}"'


def _slug(prompt: str) -> str:
    """Words of a text, for a URL."""
    words = re.sub("[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG].rstrip("-")
    return words or "routes"
