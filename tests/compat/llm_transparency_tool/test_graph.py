"""Full graphs and path graphs against the tool's documented arithmetic, in float64."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import networkx as nx
import published_tool
import pytest
import torch
from oracle import importances
from tiny import account, tiny_model, tiny_text
from torch import Tensor
from transparency_cases import (
    SMOL,
    TOLERANCE,
    Case,
    T,
    accounted,
    attention_contributions,
    ffn_contributions,
    full_graph,
    largest_gap,
    ran,
    tiny_case,
    value_bias,
    without,
)

from ifr_fast import IfrError
from ifr_fast.compat.llm_transparency_tool import TransparentLlm, build_full_graph
from ifr_fast.compat.llm_transparency_tool import build_paths_to_predictions as build_paths


@pytest.fixture(params=["gpt2", "qwen2", SMOL])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "smol":
        return request.getfixturevalue("smol_case")
    found = tiny_case(request.param)
    blocks = found.ours.tracer.decoder.model
    layers = blocks.transformer.h if request.param == "gpt2" else blocks.model.layers
    assert value_bias(request.param, layers[0]).abs().mean() > 0.05
    return found


@pytest.fixture(scope="module")
def smol_case(request: pytest.FixtureRequest) -> Case:
    smol, prose = request.getfixturevalue("smol"), request.getfixturevalue("prose")
    token_ids = prose[20_000 : 20_000 + T]
    ours = TransparentLlm.of(smol, parity=True)
    ours.run([token_ids])
    return Case(ours, accounted("smol", smol.model, token_ids))


@pytest.mark.parametrize("threshold", [None, 0.04, 0.01])
def test_every_edge_of_the_full_graph(case: Case, threshold: float | None) -> None:
    mine, theirs, ties = case.mine(threshold), case.theirs(threshold), case.tied(threshold)
    assert len(ties) < len(theirs) / 50
    gap = largest_gap(without(mine, ties), without(theirs, ties))
    print(f"{len(theirs.edges)} edges, {len(ties)} nodes with ties, largest gap {gap:.1e}")
    assert gap < TOLERANCE
    assert set(mine) == set(theirs)
    n_pairs = T * T + 4 * T - T  # self-attention and the residual share an edge
    assert len(theirs.edges) == n_pairs * len(case.layers)
    if threshold is None:
        assert set(mine.edges) == set(theirs.edges)
    else:
        assert all(weight != 0 for *_, weight in mine.edges(data="weight"))


@pytest.mark.parametrize("renormalizing_threshold", [None, 0.04])
@pytest.mark.parametrize("threshold", [0.004, 0.02])
def test_path_graphs_have_the_same_edges(
    case: Case, renormalizing_threshold: float | None, threshold: float
) -> None:
    ties = case.tied(renormalizing_threshold)
    theirs = without(case.theirs(renormalizing_threshold), ties)
    mine = without(case.mine(renormalizing_threshold), ties)
    weights = sorted(weight for *_, weight in theirs.edges(data="weight") if weight > threshold)
    while weights and weights[0] - threshold < 2 * TOLERANCE:  # no edge is within it
        threshold = weights.pop(0) + TOLERANCE
    n_layers, starts = len(case.layers), [0, T // 2, T - 1]
    expected = published_tool.paths(theirs, n_layers, starts, threshold)
    for got, tree in zip(build_paths(mine, n_layers, T, starts, threshold), expected, strict=True):
        assert set(got.edges) == set(tree.edges)
        assert set(got) == set(tree)
        assert largest_gap(got, tree) < TOLERANCE
    if renormalizing_threshold is None:
        assert expected[-1].number_of_edges() > 2 * n_layers


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("threshold", [None, 0.04])
def test_every_implementation(impl: str, threshold: float | None) -> None:
    case = tiny_case("qwen2", impl, 24)
    ties = case.tied(threshold)
    gap = largest_gap(without(case.mine(threshold), ties), without(case.theirs(threshold), ties))
    assert gap < TOLERANCE


def test_the_benchmark_loops_over_the_same_edges() -> None:
    case = tiny_case("qwen2", "eager", 24)
    for threshold in (None, 0.04):
        loop = published_tool.full_graph(case.shares, threshold)
        assert set(loop.edges) == set(case.theirs(threshold).edges)
        assert largest_gap(loop, case.theirs(threshold)) < 1e-12


@pytest.mark.parametrize("threshold", [0.5, 0.999])
def test_nothing_left_is_0_over_0(threshold: float) -> None:
    found = tiny_case("gpt2")
    theirs = found.theirs(threshold)
    undefined = sum(math.isnan(weight) for *_, weight in theirs.edges(data="weight"))
    assert undefined > T
    assert largest_gap(found.mine(threshold), theirs) < TOLERANCE
    ours = TransparentLlm.of(found.ours.tracer)
    ours.run([tiny_text(T)])
    graph = build_full_graph(ours, 0, threshold)
    assert not any(math.isnan(weight) for *_, weight in graph.edges(data="weight"))


def test_keys_not_seen_count_even_above_the_threshold() -> None:
    """Three tokens of a model that hardly attends, with a bias that moves each node far away: all
    parts are at the floor, including those of later keys.
    """
    made = tiny_model("gpt2", dtype=torch.float64).eval()
    with torch.no_grad():
        for block in made.transformer.h:
            block.attn.c_proj.weight.mul_(1e-7)
            block.attn.c_proj.bias.fill_(-300)
    ours = TransparentLlm(hf_model=made, parity=True)
    token_ids = made.transformer.wte.weight.sum(-1).topk(3).indices
    ours.run([token_ids])
    shares = [published_tool.shares(x) for x in accounted("gpt2", made, token_ids)]
    assert (shares[0].heads[0, 1:] > 0.04).all()
    for threshold in (None, 0.04):
        theirs = full_graph(shares, threshold)
        assert largest_gap(build_full_graph(ours, 0, threshold), theirs) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "falcon"])
def test_corrected_weights_are_the_importances(family: str) -> None:
    ours, token_ids = ran(family, 20), tiny_text(20)
    made, graph = ours.tracer.model, build_full_graph(ours)
    expected = nx.DiGraph()
    expected.add_nodes_from(graph)
    for i, x in enumerate(importances(a) for a in account(made, token_ids)):
        parallel = x.ffn_residual is None
        below, mid = (f"I{i - 1}" if i else "X0"), (f"I{i}" if parallel else f"A{i}")
        into_mid = x.heads.sum(0) + x.residual.diag()
        for t in range(20):
            for j in range(t + 1):
                expected.add_edge(f"{below}_{j}", f"{mid}_{t}", weight=float(into_mid[t, j]))
            expected.add_edge(
                f"{below if parallel else mid}_{t}", f"M{i}_{t}", weight=x.ffn[t].item()
            )
            expected.add_edge(f"M{i}_{t}", f"I{i}_{t}", weight=x.ffn[t].item())
            if not parallel:
                expected.add_edge(f"A{i}_{t}", f"I{i}_{t}", weight=x.ffn_residual[t].item())
        for t in range(20):
            shared = graph.get_edge_data(f"{below}_{t}", f"{mid}_{t}", {})
            assert shared.get("residual", 0) == pytest.approx(x.residual[t].item(), abs=TOLERANCE)
    assert largest_gap(graph, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_corrected_nodes_share_out_1(family: str) -> None:
    """Contributions into a node sum to 1, or there are none above the threshold."""
    ours = ran(family, 40)
    graph, sums = build_full_graph(ours, 0, 0.1), []
    for node in graph:
        if node[0] in "AI" and graph.pred[node]:
            sums.append(sum(data["weight"] for data in graph.pred[node].values()))
    assert len(sums) > 40
    assert sums == pytest.approx([1] * len(sums), abs=1e-5)
    plain = build_full_graph(ours)
    assert set(graph.edges) < set(plain.edges)


def test_a_model_that_is_not_ours() -> None:
    """A model with only the published methods; its decomposition is formed."""
    ours = ran("qwen2", 20)

    class Foreign:
        def decomposed_attn(self, batch_i: int, layer: int) -> Tensor:
            return ours.decomposed_attn(batch_i, layer) + 0.0

        def __getattr__(self, name: str) -> Any:
            if name == "edge_weights":
                raise AttributeError(name)
            return getattr(ours, name)

    for threshold in (None, 0.04):
        mine, theirs = (build_full_graph(x, 0, threshold) for x in (ours, Foreign()))
        assert largest_gap(mine, theirs) < TOLERANCE


def test_lean_recordings_are_replayed() -> None:
    ours = ran("qwen2", 20, parity=True)
    full = build_full_graph(ours, 0, 0.04)
    ours._recordings = [ours.tracer.record(tiny_text(20), mode="lean")]
    assert largest_gap(build_full_graph(ours, 0, 0.04), full) < TOLERANCE


def test_changed_weights_are_noticed() -> None:
    made = tiny_model("qwen2").eval()
    ours = TransparentLlm(hf_model=made, parity=True)
    with torch.no_grad():
        made.model.layers[1].self_attn.o_proj.weight.mul_(2)
    ours.run([tiny_text(20)])
    with pytest.raises(IfrError, match="layer 1"):
        build_full_graph(ours)


def test_graphs_are_plain_and_their_users_own() -> None:
    """Graphs equal those filled by networkx's own methods; changing one changes no other."""
    found = tiny_case("gpt2")
    full = build_full_graph(found.ours, 0, 0.04)
    trees = build_paths(full, 3, T, [T - 1, T - 2, T - 1], 0.0)
    assert max(map(len, trees)) > 10
    for graph in (full, *trees):
        again = nx.DiGraph()
        again.add_nodes_from(graph)
        again.add_edges_from((u, v, dict(data)) for u, v, data in graph.edges(data=True))
        assert type(graph) is nx.DiGraph
        assert nx.utils.graphs_equal(graph, again)
        assert set(graph.in_edges) == set(again.in_edges)
        assert nx.utils.graphs_equal(graph.reverse().reverse(), again)
        assert {type(weight) for *_, weight in graph.edges(data="weight")} == {float}
    before = [copy.deepcopy(graph) for graph in (full, *trees)]
    source, target = next(iter(trees[0].edges))
    trees[0][source][target]["weight"] = -1.0
    assert trees[0].pred[target][source]["weight"] == -1.0
    trees[0].nodes[source]["seen"] = True
    trees[0].add_edge(target, "mine", weight=2.0)
    trees[0].remove_node(source)
    assert "mine" in trees[0].succ[target]
    assert source not in trees[0].pred[target]
    for graph, own in zip((full, *trees[1:]), (before[0], *before[2:]), strict=True):
        assert nx.utils.graphs_equal(graph, own)
    assert (
        build_paths(nx.DiGraph([("X0_0", "I2_1", {"weight": 0.1})]), 3, 2, [1], 0.1)[0].size() == 0
    )


def test_the_collector_is_as_it_was() -> None:
    found = tiny_case("gpt2")
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        graph = build_full_graph(found.ours)
        with pytest.raises(ValueError, match="starting_tokens"):
            build_paths(graph, 3, T, [T], 0.1)
        assert gc.isenabled() is enabled
    gc.enable()


def test_what_float32_adds_to_the_tool(case: Case) -> None:
    """Errors of the tool's float32 and of ours are printed; ours is nearer to the arithmetic."""
    theirs = mine = 0.0
    for i, (layer, exact) in enumerate(zip(case.layers, case.shares, strict=True)):
        narrow = published_tool.shares(layer.to(torch.float32))
        heads, residual = attention_contributions(case.ours, i)
        ffn, passed = ffn_contributions(case.ours, i)
        for x, y, z in zip(narrow, (heads, residual, ffn, passed), exact, strict=True):
            theirs = max(theirs, float((x - z).abs().max()))
            mine = max(mine, float((y - z).abs().max()))
    print(f"largest error: the tool's float32 {theirs:.1e}, ours {mine:.1e}")
    assert mine < TOLERANCE
    assert theirs < 1e-2
