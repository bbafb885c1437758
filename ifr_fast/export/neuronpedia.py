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
total. It is near 1 for the least important nodes, and null for logits. `node_threshold` is 1: the
document holds all nodes up to that influence. Where it is missing, circuit-tracer's viewer has no
slider.

A cap keeps links from the logits downwards, each time the one with the largest flow among those
into nodes that are already kept, so that the result is connected. The document is ASCII.

A folder that circuit-tracer's viewer serves holds `<slug>.json` for each graph, and
`graph-metadata.json`, a list of their metadata.
"""

from __future__ import annotations

import heapq
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._version import __version__
from ..arguments import check_count, check_unicode
from ..characters import joined
from ..errors import FormatError, IfrError
from ..graph.tables import Node, NodeKind
from ..storage.files import write_text
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
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")
_LIST = "graph-metadata.json"


class _Link(NamedTuple):
    source: Node
    target: Node | None  # None: the logit at its source's position
    weight: float
    kinds: dict[str, float] | None  # weight of each edge in the link, by kind


def to_neuronpedia(graph: GraphData, slug: str | None, scan: str, max_links: int) -> str:
    """The JSON document. Raises ValueError for `max_links` below 1, or a name that is no string."""
    return _text(_document(graph, slug, scan, max_links))


def save_neuronpedia(
    graph: GraphData, folder: Path, slug: str | None, scan: str, max_links: int
) -> Path:
    """Writes the document into a folder, which is made if need be, and lists it there.

    Returns the path of `<slug>.json`, and replaces one that is there. Raises ValueError for a slug
    that is no file name, and FormatError, before it writes, where the folder's list is damaged.
    """
    document = _document(graph, slug, scan, max_links)
    metadata = document["metadata"]
    slug = metadata["slug"]
    if not _FILE_NAME.fullmatch(slug) or slug == _LIST.removesuffix(".json"):
        raise ValueError(
            "slug: expected letters, digits, '-', '_' and '.' for the name of a file in a folder, "
            f"got {slug!r}"
        )
    listed = [other for other in _listed(folder / _LIST) if other.get("slug") != slug]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IfrError(f"{folder}: cannot be written ({error.strerror})") from error
    path = folder / f"{slug}.json"
    write_text(path, _text(document))
    write_text(folder / _LIST, _text({"graphs": [*listed, metadata]}))
    return path


def _listed(path: Path) -> list[dict[str, Any]]:
    """The metadata of the graphs in a folder."""
    try:
        graphs = json.loads(path.read_bytes())["graphs"]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: not a list of graphs ({error})") from error
    if not isinstance(graphs, list) or not all(isinstance(x, dict) for x in graphs):
        raise FormatError(f"{path}: not a list of graphs")
    return graphs


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, allow_nan=False, separators=(",", ":"))


def _document(graph: GraphData, slug: str | None, scan: str, max_links: int) -> dict[str, Any]:
    max_links = check_count("max_links", max_links)
    for argument, name in (("slug", "" if slug is None else slug), ("scan", scan)):
        check_unicode(argument, name)
    prompt = joined(graph.tokens)
    links, flow = _strongest(graph, max_links)
    nodes = list(dict.fromkeys(link.source for link in links))
    influence = _influence(nodes, flow)
    logits = {
        link.source.position: _logit(graph, link.source.position)
        for link in links
        if link.target is None
    }
    return {
        "metadata": {
            "slug": _slug(prompt) if slug is None else slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": graph.tokens,
            "prompt": prompt,
            "node_threshold": 1.0,
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
        found[node] = min(so_far / total, 1.0) if total else 1.0
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
