"""The component graph: scores, the circuit that is chosen by them, and JSON files."""

from __future__ import annotations

import heapq
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...arguments import check_count, check_flag, check_instance, check_number, check_path, shown
from ...errors import FormatError, needing
from ...model.decoder import Decoder
from ...storage.files import write_text
from ...tracer import Tracer

if TYPE_CHECKING:
    import networkx as nx


class Node(NamedTuple):
    """One node of a component graph."""

    name: str
    score: float | None
    in_graph: bool


class Edge(NamedTuple):
    """One edge of a component graph."""

    name: str
    parent: str
    child: str
    qkv: str | None  # the input of a head that the edge leads into
    score: float
    in_graph: bool


@dataclass(eq=False)
class Graph:
    """Scores between components, and the circuit that some of them form.

    Rows are sources (`sources`). Columns are the inputs of nodes (`inputs`): in each layer q of all
    heads, then k, then v, then the FFN block; the last column is the logits. Pairs that are not an
    edge score 0.
    """

    cfg: dict[str, Any]  # n_layers, n_heads, parallel_attn_mlp, d_model
    scores: Tensor  # [n_forward, n_backward] float32
    in_graph: Tensor  # [n_forward, n_backward] bool
    nodes_in_graph: Tensor  # [n_forward] bool
    nodes_scores: Tensor | None = None  # [n_forward] float32, NaN where a node has none

    @classmethod
    def from_model(cls, model: Tracer | Decoder | dict[str, Any]) -> Graph:
        """A graph of a model's components, without scores and with an empty circuit.

        model: a Tracer, or a dict with n_layers, n_heads, parallel_attn_mlp and d_model.
        """
        if isinstance(model, dict):
            cfg = _check_config(model)
        else:
            check_instance("model", model, Tracer, Decoder)
            decoder = model.decoder if isinstance(model, Tracer) else model
            decoder.refuse_recurrences("EAP-IG's graph has no nodes for it")
            parallel = {block.parallel for block in decoder.blocks}
            if len(parallel) > 1:
                raise ValueError("model: has parallel and sequential blocks; expected one kind")
            cfg = {
                "n_layers": decoder.n_layers,
                "n_heads": decoder.n_heads,
                "parallel_attn_mlp": parallel.pop(),
                "d_model": decoder.d_model,
            }
        L, H = cfg["n_layers"], cfg["n_heads"]
        shape = (1 + L * (H + 1), L * (3 * H + 1) + 1)
        return cls(cfg, torch.zeros(shape), torch.zeros(shape).bool(), torch.zeros(shape[0]).bool())

    @property
    def n_forward(self) -> int:
        """Number of nodes that write."""
        return len(self.scores)

    @property
    def n_backward(self) -> int:
        """Number of inputs of all nodes."""
        return self.scores.shape[1]

    @property
    def sources(self) -> list[str]:
        """The names of the rows."""
        found = ["input"]
        for layer in range(self.cfg["n_layers"]):
            found += [f"a{layer}.h{head}" for head in range(self.cfg["n_heads"])]
            found.append(f"m{layer}")
        return found

    @property
    def inputs(self) -> list[tuple[str, str | None]]:
        """The node of each column, and q, k or v if the node is a head."""
        found: list[tuple[str, str | None]] = []
        for layer in range(self.cfg["n_layers"]):
            for letter in "qkv":
                found += [(f"a{layer}.h{head}", letter) for head in range(self.cfg["n_heads"])]
            found.append((f"m{layer}", None))
        return [*found, ("logits", None)]

    @property
    def real_edge_mask(self) -> Tensor:
        """[n_forward, n_backward] bool: True for pairs that are edges."""
        before = torch.tensor([self._sources_before(child) for child, _ in self.inputs])
        return torch.arange(self.n_forward)[:, None] < before

    @property
    def nodes(self) -> dict[str, Node]:
        """All nodes by name; the logits are always in the circuit."""
        found = {}
        for i, name in enumerate(self.sources):
            score = None if self.nodes_scores is None else float(self.nodes_scores[i])
            found[name] = Node(name, score, bool(self.nodes_in_graph[i]))
        return {**found, "logits": Node("logits", None, True)}

    @property
    def edges(self) -> dict[str, Edge]:
        """All edges by name."""
        found = {}
        scores, in_graph = self.scores.tolist(), self.in_graph.tolist()
        for i, j, name, parent, child, letter in self._named():
            found[name] = Edge(name, parent, child, letter, scores[i][j], in_graph[i][j])
        return found

    def count_included_edges(self) -> int:
        """Number of edges in the circuit."""
        return int(self.in_graph.sum())

    def count_included_nodes(self) -> int:
        """Number of nodes in the circuit, without the logits."""
        return int(self.nodes_in_graph.sum())

    def apply_threshold(
        self,
        threshold: float,
        absolute: bool = True,
        reset: bool = True,
        level: str = "edge",
        prune: bool = True,
    ) -> None:
        """Makes a circuit of the edges that score at least `threshold`.

        absolute: rank by absolute scores. reset: take the nodes that these edges join; otherwise
        leave the nodes as they are. level: "edge". prune: keep only nodes and edges on a path.
        """
        _check_level(level)
        _check_flags(absolute=absolute, reset=reset, prune=prune)
        threshold = check_number("threshold", threshold, "a number")
        self._choose((self._ranked(absolute) >= threshold) & self.real_edge_mask, reset, prune)

    def apply_topn(
        self,
        n: int,
        absolute: bool = True,
        level: str = "edge",
        reset: bool = True,
        prune: bool = True,
    ) -> None:
        """Makes a circuit of the n edges that score highest; of equal scores the first count.

        Other arguments as in `apply_threshold`.
        """
        _check_level(level)
        _check_flags(absolute=absolute, reset=reset, prune=prune)
        n_edges = int(self.real_edge_mask.sum())
        n = check_count("n", n, least=0, most=n_edges)
        ranked = self._ranked(absolute).masked_fill(~self.real_edge_mask, -torch.inf).flatten()
        best = ranked.argsort(descending=True, stable=True)[:n]
        chosen = torch.zeros(self.scores.numel(), dtype=torch.bool)
        chosen[best] = True
        self._choose(chosen.view_as(self.scores), reset, prune)

    def apply_greedy(
        self, n_edges: int, absolute: bool = True, reset: bool = True, prune: bool = True
    ) -> None:
        """Makes a circuit of n edges from the logits down, and adds each time the edge with the
        highest score among those into nodes of the circuit.

        reset: begin with the logits alone; otherwise begin with the present circuit, whose edges
        count among the n only if they are chosen again. Other arguments as in `apply_threshold`.
        """
        total = int(self.real_edge_mask.sum())
        n_edges = check_count("n_edges", n_edges, least=0, most=total)
        _check_flags(absolute=absolute, reset=reset, prune=prune)
        ranked, real, children = self._ranked(absolute), self.real_edge_mask, self._children
        chosen, nodes = self.in_graph.clone(), self.nodes_in_graph.clone()
        if reset:
            chosen[:], nodes[:] = False, False
        waiting: list[tuple[float, int, int]] = []

        def offer(into: int) -> None:
            columns = (children == into).nonzero().squeeze(1)
            for i, j in real[:, columns].nonzero().tolist():
                column = int(columns[j])
                heapq.heappush(waiting, (-float(ranked[i, column]), i, column))

        for node in [*nodes.nonzero().squeeze(1).tolist(), self.n_forward]:
            offer(node)
        while waiting and n_edges:
            _, i, j = heapq.heappop(waiting)
            chosen[i, j] = True
            n_edges -= 1
            if not nodes[i]:
                nodes[i] = True
                offer(i)
        self.in_graph, self.nodes_in_graph = chosen, nodes
        if prune:
            self.prune()

    def prune(self) -> None:
        """Keeps the part of the circuit that lies on paths from `input` to `logits`."""
        N, children = self.n_forward, self._children
        joined = torch.zeros(N, N + 1, dtype=torch.int32)
        joined.index_add_(1, children, self.in_graph.int())
        linked = joined > 0
        below = torch.zeros(N + 1, dtype=torch.bool)  # reachable from the input
        below[0] = True
        for child in range(1, N + 1):
            below[child] = bool((linked[:, child] & below[:N]).any())
        above = torch.zeros(N + 1, dtype=torch.bool)  # leads to the logits
        above[N] = True
        for parent in reversed(range(N)):
            above[parent] = bool((linked[parent] & above).any())
        on_path = below & above
        self.nodes_in_graph = on_path[:N]
        self.in_graph &= on_path[:N, None] & above[children] & below[children]

    def to_json(self, filename: str | os.PathLike[str]) -> None:
        """Writes the JSON that EAP-IG's `Graph.from_json` and the MIB benchmark read.

        A node without a score has none in the file. Raises ValueError if a score is not finite,
        since JSON has no number for it.
        """
        nodes: dict[str, dict[str, Any]] = {}
        for node in self.nodes.values():
            nodes[node.name] = {"in_graph": node.in_graph}
            if node.score is not None and not math.isnan(node.score):
                nodes[node.name]["score"] = node.score
        edges = {
            edge.name: {"score": edge.score, "in_graph": edge.in_graph}
            for edge in self.edges.values()
        }
        for name, entry in [*nodes.items(), *edges.items()]:
            if not math.isfinite(entry.get("score", 0)):
                raise ValueError(f"scores: expected finite numbers, got {entry['score']} of {name}")
        document = {"cfg": self.cfg, "nodes": nodes, "edges": edges}
        write_text(check_path("filename", filename), json.dumps(document, allow_nan=False))

    @classmethod
    def from_json(cls, json_path: str | os.PathLike[str]) -> Graph:
        """Reads a file that `to_json` wrote, here or in EAP-IG.

        Raises FormatError for any other file, and for a circuit of single neurons.
        """
        json_path = check_path("json_path", json_path)
        try:
            document = json.loads(json_path.read_bytes())
            graph = cls.from_model(document["cfg"])
            graph._fill(document["nodes"], document["edges"])
        except FileNotFoundError as error:
            raise FormatError(f"{json_path}: no such file") from error
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise FormatError(f"{json_path}: not a component graph in JSON ({error})") from error
        return graph

    def to_networkx(self) -> nx.MultiDiGraph:
        """The circuit. Edges have a `score`; the key of an edge into a head is q, k or v."""
        with needing("to_networkx", "networkx", "pip install 'ifr-fast[networkx]'"):
            import networkx as nx
        out = nx.MultiDiGraph(**self.cfg)
        names = self.sources
        out.add_nodes_from(names[i] for i in self.nodes_in_graph.nonzero().squeeze(1).tolist())
        out.add_node("logits")
        out.add_edges_from(
            (edge.parent, edge.child, edge.qkv, {"score": edge.score})
            for edge in self.edges.values()
            if edge.in_graph
        )
        return out

    @property
    def _children(self) -> Tensor:
        """[n_backward]: the row of each column's node; n_forward for the logits."""
        place = {name: i for i, name in enumerate([*self.sources, "logits"])}
        return torch.tensor([place[child] for child, _ in self.inputs])

    def _sources_before(self, child: str) -> int:
        """The number of nodes that write into the stream that `child` reads."""
        H = self.cfg["n_heads"]
        if child == "logits":
            return self.n_forward
        before: int = 1 + int(child[1:].partition(".")[0]) * (H + 1)
        reads_mid = child[0] == "m" and not self.cfg["parallel_attn_mlp"]
        return before + H if reads_mid else before

    def _named(self) -> Iterator[tuple[int, int, str, str, str, str | None]]:
        """Row, column, name, parent, child and letter of each edge, in EAP-IG's order."""
        sources, inputs, H = self.sources, self.inputs, self.cfg["n_heads"]
        for layer in range(self.cfg["n_layers"]):
            first = layer * (3 * H + 1)
            for i in range(self._sources_before(f"a{layer}.h0")):
                for head in range(H):
                    for j in range(first + head, first + 3 * H, H):
                        child, letter = inputs[j]
                        yield i, j, f"{sources[i]}->{child}<{letter}>", sources[i], child, letter
            for i in range(self._sources_before(f"m{layer}")):
                yield i, first + 3 * H, f"{sources[i]}->m{layer}", sources[i], f"m{layer}", None
        for i, parent in enumerate(sources):
            yield i, self.n_backward - 1, f"{parent}->logits", parent, "logits", None

    def _ranked(self, absolute: bool) -> Tensor:
        return self.scores.abs() if absolute else self.scores

    def _choose(self, chosen: Tensor, reset: bool, prune: bool) -> None:
        self.in_graph = chosen
        if reset:
            read = torch.zeros(self.n_forward + 1, dtype=torch.bool)
            read[0] = True
            read[self._children[chosen.any(0)]] = True
            self.nodes_in_graph = chosen.any(1) & read[:-1]
        if prune:
            self.prune()

    def _fill(self, nodes: dict[str, Any], edges: dict[str, Any]) -> None:
        """Fills in a document. Raises ValueError if it does not fit this graph."""
        sources = self.sources
        if set(nodes) - {"logits"} != set(sources):
            raise ValueError(f"nodes: expected {len(sources)} and logits, got {len(nodes)}")
        scored = torch.full((len(sources),), torch.nan)
        for i, name in enumerate(sources):
            node = nodes[name]
            if "neurons" in node or "neurons_scores" in node:
                raise ValueError(f"nodes: {name} has neurons; only whole components can be read")
            self.nodes_in_graph[i] = _flag(name, node["in_graph"])
            if "score" in node:
                scored[i] = float(node["score"])
        if not bool(scored.isnan().all()):
            self.nodes_scores = scored
        scores, in_graph = self.scores.tolist(), self.in_graph.tolist()
        n_edges = 0
        for i, j, name, *_ in self._named():
            edge = edges[name]
            scores[i][j] = float(edge["score"])
            if not math.isfinite(scores[i][j]):
                raise ValueError(f"edges: {name} has a score of {edge['score']}, not a number")
            in_graph[i][j] = _flag(name, edge["in_graph"])
            n_edges += 1
        if len(edges) != n_edges:
            raise ValueError(f"edges: expected {n_edges}, got {len(edges)}")
        self.scores, self.in_graph = torch.tensor(scores), torch.tensor(in_graph)


def _check_config(cfg: dict[str, Any]) -> dict[str, Any]:
    for name in ("n_layers", "n_heads", "d_model"):
        if type(cfg.get(name)) is not int or cfg[name] < 1:
            raise ValueError(f"cfg: expected {name} to be a positive int, got {cfg.get(name)!r}")
    _flag("cfg: parallel_attn_mlp", cfg.get("parallel_attn_mlp"))
    return dict(cfg)


def _check_level(level: str) -> None:
    if not isinstance(level, str) or level != "edge":
        raise ValueError(f"level: expected 'edge', got {shown(level)}; nodes have no scores here")


def _check_flags(**flags: bool) -> None:
    for name, flag in flags.items():
        check_flag(name, flag)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {value!r}")
    return value
