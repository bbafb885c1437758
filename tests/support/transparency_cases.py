"""Models that have run in the published tool's arithmetic, beside that arithmetic in float64."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import networkx as nx
import published_tool
import pytest
import torch
from published_tool import Layer, Shares
from tiny import account, tiny_model, tiny_text
from torch import Tensor

from ifr_fast.compat import llm_transparency_tool as tool
from ifr_fast.compat.llm_transparency_tool import TransparentLlm, build_full_graph

TOLERANCE = 1e-5  # of weights
T = 32
SMOL = pytest.param("smol", marks=pytest.mark.default_model)
NO_EDGE = {"weight": 0.0}


class Case:
    """A model in parity that has run, and the tool's arithmetic of the run, in float64."""

    def __init__(self, ours: TransparentLlm, layers: list[Layer]) -> None:
        self.ours, self.layers = ours, layers
        self.shares = [published_tool.shares(layer) for layer in layers]
        self.mine = cache(lambda threshold: build_full_graph(ours, 0, threshold))
        self.theirs = cache(lambda threshold: full_graph(self.shares, threshold))
        self.tied = cache(lambda threshold: tied(self.shares, threshold))


def value_bias(family: str, layer: Any) -> Tensor:
    """The value bias [H, V] of a layer, read from the model's own parameters."""
    if family == "gpt2":
        return layer.attn.c_attn.bias.detach().double().chunk(3)[2].view(6, 6)
    bias = layer.self_attn.v_proj.bias
    if bias is None:
        return torch.zeros(1, 1, dtype=torch.float64)
    of_kv_heads = bias.detach().double().view(-1, layer.self_attn.head_dim)
    group = layer.self_attn.num_key_value_groups
    return of_kv_heads.repeat_interleave(group, 0)


def accounted(family: str, of: Any, token_ids: Tensor) -> list[Layer]:
    """The tensors of the tool's model, whose value biases are folded away."""
    blocks = of.transformer.h if family == "gpt2" else of.model.layers
    return [
        Layer(
            x.resid_pre,
            x.resid_mid,
            x.resid_post,
            x.ffn,
            x.pattern,
            x.v - value_bias(family, block),
            x.W_O,
        )
        for x, block in zip(account(of, token_ids), blocks, strict=True)
    ]


@cache
def tiny_case(family: str, impl: str = "auto", length: int = T) -> Case:
    made, token_ids = tiny_model(family).eval(), tiny_text(length)
    ours = TransparentLlm(hf_model=made, parity=True, impl=impl)
    ours.run([token_ids])
    return Case(ours, accounted(family, made, token_ids))


def full_graph(shares: list[Shares], threshold: float | None) -> nx.DiGraph:
    """Every edge of the tool's graph. Another test compares it with bench/peers/."""
    graph = nx.DiGraph()
    for i, whole in enumerate(shares):
        x = whole if threshold is None else published_tool.cut(threshold, whole)
        into_mid = x.heads.sum(-1) + x.residual.diag()
        below = f"I{i - 1}" if i else "X0"
        for t, row in enumerate(into_mid.tolist()):
            graph.add_weighted_edges_from(
                (f"{below}_{j}", f"A{i}_{t}", weight) for j, weight in enumerate(row)
            )
        for t, (ffn, passed) in enumerate(
            zip(x.ffn.tolist(), x.ffn_residual.tolist(), strict=True)
        ):
            graph.add_edge(f"A{i}_{t}", f"M{i}_{t}", weight=ffn)
            graph.add_edge(f"M{i}_{t}", f"I{i}_{t}", weight=ffn)
            graph.add_edge(f"A{i}_{t}", f"I{i}_{t}", weight=passed)
    return graph


def tied(shares: list[Shares], threshold: float | None) -> set[str]:
    """Nodes with a part that rounding might put on the other side of the threshold."""
    if threshold is None:
        return set()
    nodes = set()
    for i, x in enumerate(shares):
        rows, all_rows = published_tool.ties(threshold, x)
        nodes |= {f"A{i}_{t}" for t in rows.nonzero().flatten().tolist()}
        if all_rows:
            nodes |= {f"{kind}{i}_{t}" for kind in "MI" for t in range(len(rows))}
    return nodes


def without(graph: nx.DiGraph, nodes: set[str]) -> nx.DiGraph:
    """The graph without the edges into some nodes."""
    kept = nx.DiGraph()
    kept.add_nodes_from(graph)
    kept.add_edges_from(edge for edge in graph.edges(data=True) if edge[1] not in nodes)
    return kept


def largest_gap(mine: nx.DiGraph, theirs: nx.DiGraph) -> float:
    """The largest difference of edge weights; a missing edge weighs 0, and NaN equals only NaN."""
    worst = 0.0
    for pair in {*mine.edges, *theirs.edges}:
        a, b = (g.get_edge_data(*pair, NO_EDGE)["weight"] for g in (mine, theirs))
        assert math.isnan(a) == math.isnan(b), (pair, a, b)
        if not math.isnan(a):
            worst = max(worst, abs(a - b))
    return worst


def attention_contributions(of: TransparentLlm, layer: int) -> list[Tensor]:
    """Contributions [T, T, H] and [T], called as in the published app."""
    found = tool.get_attention_contributions(
        resid_pre=of.residual_in(layer)[0].unsqueeze(0),
        resid_mid=of.residual_after_attn(layer)[0].unsqueeze(0),
        decomposed_attn=of.decomposed_attn(0, layer).unsqueeze(0),
        parity=of.parity,
    )
    return [x[0] for x in found]


def ffn_contributions(of: TransparentLlm, layer: int) -> list[Tensor]:
    found = tool.get_mlp_contributions(
        resid_mid=of.residual_after_attn(layer)[0].unsqueeze(0),
        resid_post=of.residual_out(layer)[0].unsqueeze(0),
        mlp_out=of.ffn_out(layer)[0].unsqueeze(0),
        parity=of.parity,
    )
    return [x[0] for x in found]


def close(got: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().clamp(min=1).item()
    torch.testing.assert_close(got.double(), expected.double(), atol=1e-4 * scale, rtol=0)


@cache
def opened(family: str, parity: bool = False) -> TransparentLlm:
    """A tiny model, opened once for all tests."""
    return TransparentLlm(hf_model=tiny_model(family).eval(), parity=parity)


def ran(family: str, n_tokens: int, parity: bool = False) -> TransparentLlm:
    """A copy of the opened model that has run on a text."""
    ours = opened(family, parity).copy()
    ours.run([tiny_text(n_tokens)])
    return ours
