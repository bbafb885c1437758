"""compat.llm_transparency_tool against its documented arithmetic, evaluated anew in float64."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import math
import pickle
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import published_tool
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import importances
from paths import DOCS
from published_tool import Layer, Shares
from tiny import account, tiny_model, tiny_text
from torch import Tensor

import ifr_fast
from ifr_fast import IfrError, Tracer
from ifr_fast.compat import llm_transparency_tool as tool
from ifr_fast.compat.llm_transparency_tool import TransparentLlm, build_full_graph, model, values
from ifr_fast.compat.llm_transparency_tool import build_paths_to_predictions as build_paths
from ifr_fast.compat.llm_transparency_tool.decomposition import DecomposedAttention

TOLERANCE = 1e-5  # of weights
T = 64
SMOL = pytest.param("smol", marks=pytest.mark.default_model)
NO_EDGE = {"weight": 0.0}


class Case:
    """A model in parity that has run, and the tool's own account of the run, in float64."""

    def __init__(self, ours: TransparentLlm, layers: list[Layer]) -> None:
        self.ours, self.layers = ours, layers
        self.shares = [published_tool.shares(layer) for layer in layers]
        self.mine = cache(lambda threshold: build_full_graph(ours, 0, threshold))
        self.theirs = cache(lambda threshold: full_graph(self.shares, threshold))
        self.tied = cache(lambda threshold: tied(self.shares, threshold))


def value_bias(family: str, layer: Any) -> Tensor:
    """[H, V] by the model's own names."""
    if family == "gpt2":
        return layer.attn.c_attn.bias.detach().double().chunk(3)[2].view(6, 6)
    bias = layer.self_attn.v_proj.bias
    if bias is None:
        return torch.zeros(1, 1, dtype=torch.float64)
    of_kv_heads = bias.detach().double().view(-1, layer.self_attn.head_dim)
    group = layer.self_attn.num_key_value_groups
    return of_kv_heads.repeat_interleave(group, 0)


def accounted(family: str, of: Any, token_ids: Tensor) -> list[Layer]:
    """What the tool's model would hold: value biases folded away."""
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


@pytest.fixture(scope="module")
def smol_case(request: pytest.FixtureRequest) -> Case:
    smol, prose = request.getfixturevalue("smol"), request.getfixturevalue("prose")
    token_ids = prose[20_000 : 20_000 + T]
    ours = TransparentLlm.of(smol, parity=True)
    ours.run([token_ids])
    return Case(ours, accounted("smol", smol.model, token_ids))


@pytest.fixture(params=["gpt2", "qwen2", SMOL])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "smol":
        return request.getfixturevalue("smol_case")
    found = tiny_case(request.param)
    blocks = found.ours.tracer.decoder.model
    layers = blocks.transformer.h if request.param == "gpt2" else blocks.model.layers
    assert value_bias(request.param, layers[0]).abs().mean() > 0.05
    return found


def full_graph(shares: list[Shares], threshold: float | None) -> nx.DiGraph:
    """Every edge of the tool's graph. (That bench/published_tool.py fills it so, edge by edge, is
    tested too.)
    """
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
    """Of all edges' weights; an edge that is not there weighs 0, and 0 / 0 is like itself alone."""
    worst = 0.0
    for pair in {*mine.edges, *theirs.edges}:
        a, b = (g.get_edge_data(*pair, NO_EDGE)["weight"] for g in (mine, theirs))
        assert math.isnan(a) == math.isnan(b), (pair, a, b)
        if not math.isnan(a):
            worst = max(worst, abs(a - b))
    return worst


# Parity


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


def test_what_float32_adds_to_the_tool(case: Case) -> None:
    """Printed; ours, in float32 too, is nearer to the arithmetic."""
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


def attention_contributions(of: TransparentLlm, layer: int) -> list[Tensor]:
    """As the published app asks for them; [T, T, H] and [T]."""
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
    """At 3 tokens of a model that hardly attends, and whose bias moves each node away from where it
    was, all parts are at the floor, keys to come among them.
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


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen3_next"])
def test_windows_norms_and_gates(family: str) -> None:
    """Which the tool has not; the arithmetic of their parts is the same."""
    ours = TransparentLlm(hf_model=tiny_model(family).eval(), parity=True)
    ours.run([tiny_text(20)])
    for i in range(3):
        parts = ours.decomposed_attn(0, i) + 0.0
        assert type(parts) is Tensor
        formed = tool.get_attention_contributions(
            ours.residual_in(i), ours.residual_after_attn(i), parts[None], parity=True
        )
        for mine, theirs in zip(attention_contributions(ours, i), formed, strict=True):
            torch.testing.assert_close(mine, theirs[0], atol=TOLERANCE, rtol=0)
    build_full_graph(ours, 0, 0.04)  # the parts and folded biases add up


# Corrected


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "falcon"])
def test_corrected_weights_are_the_importances(family: str) -> None:
    made, token_ids = tiny_model(family).eval(), tiny_text(20)
    ours = TransparentLlm(hf_model=made)
    ours.run([token_ids])
    graph = build_full_graph(ours)
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
    """Or nothing, where nothing exceeds the threshold."""
    ours = TransparentLlm(hf_model=tiny_model(family).eval())
    ours.run([tiny_text(40)])
    graph, sums = build_full_graph(ours, 0, 0.1), []
    for node in graph:
        if node[0] in "AI" and graph.pred[node]:
            sums.append(sum(data["weight"] for data in graph.pred[node].values()))
    assert len(sums) > 40
    assert sums == pytest.approx([1] * len(sums), abs=1e-5)
    plain = build_full_graph(ours)
    assert set(graph.edges) < set(plain.edges)


def test_a_model_that_is_not_ours() -> None:
    """Only the published methods: its decomposition is formed."""
    ours = TransparentLlm(hf_model=tiny_model("qwen2").eval())
    ours.run([tiny_text(20)])

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


# Functions


@given(st.integers(0, 10_000), st.integers(1, 3), st.booleans(), st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_contributions_are_shares_of_what_they_bring_nearer(
    seed: int, k: int, parity: bool, norm: int
) -> None:
    torch.manual_seed(seed)
    parts = torch.randn(*range(2, 2 + k), 5, 2, 7, dtype=torch.float64)
    whole = parts.sum(tuple(range(k))) * torch.rand(5, 2, 1)
    gap = torch.linalg.vector_norm(parts - whole + (1e-6 if parity else 0), norm, -1)
    scores = torch.linalg.vector_norm(whole, norm, -1) - gap
    scores = scores.clamp(min=1e-5 if parity else 0)
    expected = scores / scores.sum(tuple(range(k)), keepdim=True)
    got = tool.get_contributions(parts, whole, norm, parity=parity)
    defined = ~expected.isnan()
    torch.testing.assert_close(got[defined], expected[defined], atol=1e-9, rtol=0)
    ones = torch.ones(5, 2, dtype=torch.float64)
    torch.testing.assert_close(got.sum(tuple(range(k))), ones)
    one_off = torch.randn(5, 2, 7, dtype=torch.float64)
    of_parts, of_one = tool.get_contributions_with_one_off_part(
        parts, one_off, whole, norm, parity=parity
    )
    both = torch.cat([parts.flatten(0, k - 1), one_off[None]])
    flat = tool.get_contributions(both, whole, norm, parity=parity)
    assert torch.equal(torch.cat([of_parts.flatten(0, k - 1), of_one[None]]), flat)


def test_where_nothing_brings_nearer_all_parts_share() -> None:
    parts, whole = torch.tensor([[10.0], [-9.0]]), torch.tensor([1.0])
    assert tool.get_contributions(parts, whole).tolist() == [0.5, 0.5]
    assert tool.get_contributions(parts, whole, parity=True).tolist() == [0.5, 0.5]


def test_thresholds_renormalize_each_position() -> None:
    blocks, residual = torch.tensor([0.2, 0.6, 0.05]), torch.tensor([0.8, 0.4, 0.03])
    ours = tool.apply_threshold_and_renormalize(0.3, blocks, residual)
    assert [x.tolist() for x in ours] == [[0, pytest.approx(0.6), 0], [1, pytest.approx(0.4), 0]]
    theirs = tool.apply_threshold_and_renormalize(0.3, blocks, residual, parity=True)
    assert theirs[0].tolist() == pytest.approx([0, 0.6, 0])
    assert theirs[1].tolist() == pytest.approx([0.8 / 1.4, 0.4, 0])
    of_heads = torch.tensor([[[0.5, 0.1]], [[0.04, 0.04]]])  # [pos, key_pos, head]
    for parity in (False, True):
        heads, residual = tool.apply_threshold_and_renormalize(
            0.1, of_heads, torch.tensor([0.3, 0.0]), parity=parity
        )
        assert heads[0].tolist() == [[pytest.approx(0.625), 0]]
        assert residual[0].item() == pytest.approx(0.375)
        assert bool(residual[1].isnan()) is parity


def test_decomposed_ffn() -> None:
    torch.manual_seed(0)
    neurons, mid = torch.randn(9, 5), torch.randn(5)
    post = mid + neurons.sum(0)
    got, residual = tool.get_decomposed_mlp_contributions(mid, post, neurons)
    scores = post.abs().sum() - (post - torch.cat([neurons, mid[None]])).abs().sum(-1)
    expected = scores.relu() / scores.relu().sum()
    assert isinstance(residual, float)
    torch.testing.assert_close(torch.cat([got, torch.tensor([residual])]), expected)


def ran() -> TransparentLlm:
    ours = TransparentLlm(hf_model=tiny_model("llama").eval())
    ours.run([tiny_text(4)])
    return ours


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: tool.get_contributions(torch.ones(2, 3), torch.ones(4)), "whole"),
        (
            lambda: tool.get_contributions_with_one_off_part(
                torch.ones(2, 3), torch.ones(2), torch.ones(3)
            ),
            "one_off",
        ),
        (
            lambda: tool.apply_threshold_and_renormalize(0.1, torch.ones(2, 3), torch.ones(3)),
            "c_residual",
        ),
        (lambda: build_paths(nx.DiGraph(), 1, 3, [3], 0.1), "starting_tokens"),
        (lambda: build_paths(nx.DiGraph(), 1, 3, [0], 0.1), "n_layers"),
        (lambda: TransparentLlm(device="tpu"), "device"),
        (lambda: ran().residual_in("1"), "layer"),
        (lambda: ran().attention_matrix(0, 0, 6), "head"),
        (lambda: build_full_graph(ran(), 1), "batch_i"),
        (lambda: build_full_graph(ran(), 0, math.nan), "renormalizing_threshold"),
    ],
)
def test_wrong_arguments_are_named(call: Any, names: str) -> None:
    with pytest.raises(ValueError, match=f"^{names}: "):
        call()


# TransparentLlm


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "granite", "gpt_neox"])
def test_methods_agree_with_the_model(family: str, parity: bool) -> None:
    made, token_ids = tiny_model(family).eval(), tiny_text(20)
    if family == "gpt_neox" and parity:
        with pytest.raises(ValueError, match=r"^parity: .*parallel"):
            TransparentLlm(hf_model=made, parity=True)
        return
    ours = TransparentLlm(hf_model=made, parity=parity)
    ours.run([token_ids])
    assert ours.tokens().tolist() == [token_ids.tolist()]
    assert ours.batch_size() == 1
    info = ours.model_info()
    assert (info.n_layers, info.n_heads, info.d_model, info.d_vocab) == (3, 6, 36, 97)
    assert info.n_params_estimate == made.num_parameters()
    with torch.no_grad():
        logits = made(token_ids[None]).logits
    close(ours.logits(), logits)
    for i, x in enumerate(account(made, token_ids)):
        close(ours.residual_in(i)[0], x.resid_pre)
        close(ours.residual_out(i)[0], x.resid_post)
        close(ours.ffn_out(i)[0], x.ffn)
        parts = ours.decomposed_attn(0, i)
        assert parts.shape == (20, 20, 6, 36)
        assert parts.triu(1).numel() > 0
        for h in range(6):
            close(ours.attention_matrix(0, i, h), x.pattern[h])
            close(ours.attention_output_per_head(0, i, 7, h), parts[7, :, h].sum(0))
        added = ours.attention_output(0, i, 7)
        if x.resid_mid is None:
            with pytest.raises(ValueError, match="parallel block"):
                ours.residual_after_attn(i)
        else:
            close(ours.residual_after_attn(i)[0], x.resid_mid)
            close(added, (x.resid_mid - x.resid_pre)[7])
        if not parity:
            bias = ours.tracer.decoder.blocks[i].bias
            close(parts[7].sum((0, 1)) + bias, added)
    close(ours.unembed(ours.residual_out(2)[0, 7], normalize=True), logits[0, 7])
    close(ours.unembed(ours.tracer.record(token_ids).states[7], normalize=False), logits[0, 7])
    assert ours.tokens_to_strings(token_ids[:2]) == [f"<{i}>" for i in token_ids[:2].tolist()]


def close(got: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().clamp(min=1).item()
    torch.testing.assert_close(got.double(), expected.double(), atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "gpt2", "granite", "gpt_neox", "phi3"])
def test_neurons_add_up_to_the_ffn(family: str) -> None:
    made = tiny_model(family).eval()
    ours = TransparentLlm(hf_model=made)
    ours.run([tiny_text(12)])
    for i in range(3):
        neurons = ours.decomposed_ffn_out(0, i, 5)
        activations = ours.neuron_activations(0, i, 5)
        assert neurons.shape == (len(activations), 36)
        close(activations[3] * ours.neuron_output(i, 3), neurons[3])
        difference = ours.ffn_out(i)[0, 5] - neurons.sum(0)
        other = ours.ffn_out(i)[0, 8] - ours.decomposed_ffn_out(0, i, 8).sum(0)
        close(difference, other)  # the projection's bias
        if family in ("llama", "phi3"):
            close(difference, torch.zeros(36))


@pytest.mark.parametrize("parity", [False, True])
def test_neurons_behind_a_norm(parity: bool) -> None:
    ours = TransparentLlm(hf_model=tiny_model("gemma2").eval(), parity=parity)
    ours.run([tiny_text(12)])
    for pos in (0, 5):
        neurons = ours.decomposed_ffn_out(0, 1, pos)
        close(neurons.sum(0), ours.ffn_out(1)[0, pos])
        assert len(neurons) == len(ours.neuron_activations(0, 1, pos))
    with pytest.raises(ValueError, match=r"^layer: a norm after the FFN of layer 1 "):
        ours.neuron_output(1, 3)


def test_neurons_count_from_the_end() -> None:
    ours = TransparentLlm(hf_model=tiny_model("llama").eval())
    ours.run([tiny_text(5)])
    F = len(ours.neuron_activations(0, 1, 2))
    assert torch.equal(ours.neuron_output(1, -1), ours.neuron_output(1, F - 1))
    with pytest.raises(ValueError, match=f"^neuron: expected {-F} to {F - 1}, got {F}$"):
        ours.neuron_output(1, F)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neuron_activations_in_parity_are_those_before_the_function(family: str) -> None:
    made = tiny_model(family).eval()
    models = {parity: TransparentLlm(hf_model=made, parity=parity) for parity in (False, True)}
    for of in models.values():
        of.run([tiny_text(12)])
    before, after = (models[parity].neuron_activations(0, 1, 5) for parity in (True, False))
    x = models[True].residual_after_attn(1)[0, 5]
    block = made.transformer.h[1] if family == "gpt2" else made.model.layers[1]
    with torch.no_grad():
        if family == "gpt2":
            expected = block.mlp.c_fc(block.ln_2(x))
            of_function = block.mlp.act(expected)
        else:
            read = block.post_attention_layernorm(x)
            expected = block.mlp.gate_proj(read)
            of_function = block.mlp.act_fn(expected) * block.mlp.up_proj(read)
    close(before, expected)
    close(after, of_function)


def test_a_mixture_of_experts_has_no_neurons_to_tell_apart() -> None:
    ours = TransparentLlm(hf_model=tiny_model("mixtral").eval())
    ours.run([tiny_text(12)])
    with pytest.raises(ValueError, match=r"^layer: .*no neurons"):
        ours.neuron_activations(0, 1, 5)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama", "llama-bias", "opt", "phi", "falcon"])
def test_value_biases_are_found(family: str) -> None:
    made = tiny_model(family).eval()
    tracer = Tracer(made)
    found = values.biases(tracer.record(tiny_text(11), mode="full"))
    for bias, layer in zip(found, accounted_biases(family, made), strict=True):
        torch.testing.assert_close(bias, layer, atol=1e-6, rtol=0)


def accounted_biases(family: str, made: Any) -> list[Tensor]:
    """[H_kv, V] of each layer."""
    if family == "gpt2":
        return [x.attn.c_attn.bias.detach()[72:].view(6, 6) for x in made.transformer.h]
    if family == "falcon":
        return [torch.zeros(1, 6)] * 3
    if family == "opt":
        return [x.self_attn.v_proj.bias.detach().view(6, 6) for x in made.model.decoder.layers]
    projections = [x.self_attn.v_proj for x in made.model.layers]
    width = {"llama-bias": 10}.get(family, 6)
    return [
        torch.zeros(len(x.weight) // width, width)
        if x.bias is None
        else x.bias.detach().view(-1, width)
        for x in projections
    ]


def test_sinks_have_no_bias_to_fold() -> None:
    with pytest.raises(ValueError, match=r"^parity: .*sinks"):
        TransparentLlm(hf_model=tiny_model("gpt_oss").eval(), parity=True)


def test_a_batch_is_padded_on_the_right() -> None:
    made = tiny_model("qwen2").eval()
    texts = [tiny_text(9), tiny_text(15, seed=1)]
    both, alone = (TransparentLlm(hf_model=made, parity=True) for _ in range(2))
    both.run([x.tolist() for x in texts])
    assert both.batch_size() == 2
    assert both.tokens().shape == (2, 15)
    assert both.residual_in(1)[0, 9:].abs().max() == 0
    for i, text in enumerate(texts):
        alone.run([text])
        n = len(text)
        close(both.residual_out(1)[i, :n], alone.residual_out(1)[0])
        close(both.logits()[i, :n], alone.logits()[0])
        close(both.attention_matrix(i, 1, 2)[:n, :n], alone.attention_matrix(0, 1, 2))
        close(both.decomposed_attn(i, 1)[:n, :n], alone.decomposed_attn(0, 1) + 0.0)
        mine, expected = (
            x[0] for x in (attention_contributions_of(both, i), attention_contributions(alone, 1))
        )
        torch.testing.assert_close(mine[:n, :n], expected, atol=TOLERANCE, rtol=0)
        graph = build_full_graph(both, i, 0.04)
        assert largest_gap(graph, build_full_graph(alone, 0, 0.04)) < TOLERANCE
        assert len(build_paths(graph, 3, 15, range(15), 0.0)) == 15


def attention_contributions_of(of: TransparentLlm, batch_i: int) -> tuple[Tensor, Tensor]:
    found = tool.get_attention_contributions(
        of.residual_in(1)[batch_i][None],
        of.residual_after_attn(1)[batch_i][None],
        of.decomposed_attn(batch_i, 1)[None],
        parity=True,
    )
    return found[0][0], found[1][0]


def test_copies_have_their_own_state() -> None:
    ours = TransparentLlm(hf_model=tiny_model("llama").eval())
    with pytest.raises(RuntimeError, match="call `run` first"):
        ours.tokens()
    other = ours.copy()
    other.run([tiny_text(5)])
    with pytest.raises(IfrError):
        ours.batch_size()
    assert other.tokens().shape == (1, 5)


def test_another_precision_leaves_the_given_model_alone() -> None:
    made = tiny_model("llama").eval()
    ours = TransparentLlm("tiny", made, None, "cpu", torch.float64)
    assert ours.tracer.model.dtype == torch.float64
    assert made.dtype == torch.float32
    assert TransparentLlm("tiny", made, None, "cpu", torch.float32).tracer.model is made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Scored as float32 would score what the model computed."""
    ours = TransparentLlm(hf_model=tiny_model("qwen2", dtype=dtype).eval(), parity=True)
    ours.run([tiny_text(20)])
    formed = tool.get_attention_contributions(
        ours.residual_in(1),
        ours.residual_after_attn(1),
        ours.decomposed_attn(0, 1)[None] + 0.0,
        parity=True,
    )
    for mine, theirs in zip(attention_contributions(ours, 1), formed, strict=True):
        torch.testing.assert_close(mine, theirs[0], atol=TOLERANCE, rtol=0)
    build_full_graph(ours, 0, 0.04)


def test_lean_recordings_are_replayed() -> None:
    ours = TransparentLlm(hf_model=tiny_model("qwen2").eval(), parity=True)
    ours.run([tiny_text(20)])
    full = build_full_graph(ours, 0, 0.04)
    ours._recordings = [ours.tracer.record(tiny_text(20), mode="lean")]
    assert largest_gap(build_full_graph(ours, 0, 0.04), full) < TOLERANCE


def test_the_decomposition_is_formed_only_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = TransparentLlm(hf_model=tiny_model("llama").eval())
    ours.run([tiny_text(20)])
    formed = []
    own = model.formed_parts
    monkeypatch.setattr(model, "formed_parts", lambda inputs: formed.append(1) or own(inputs))
    parts = ours.decomposed_attn(0, 1)
    assert isinstance(parts.unsqueeze(0), DecomposedAttention)
    heads, _ = attention_contributions(ours, 1)
    build_full_graph(ours)
    build_full_graph(ours, 0, 0.04)
    assert formed == []
    again, _ = tool.get_attention_contributions(
        ours.residual_in(1), ours.residual_after_attn(1), parts.unsqueeze(0).clone()
    )
    assert len(formed) == 1
    torch.testing.assert_close(heads, again[0], atol=TOLERANCE, rtol=0)
    assert parts[3, 2].shape == (6, 36)
    assert len(formed) == 1


def test_the_decomposition_leaves_torch_as_any_tensor_does() -> None:
    ours = TransparentLlm(hf_model=tiny_model("llama").eval())
    ours.run([tiny_text(5)])
    parts = ours.decomposed_attn(0, 1)
    expected = parts.clone()
    assert type(expected) is torch.Tensor
    assert expected.abs().sum() > 0
    stored = io.BytesIO()
    torch.save(parts, stored)
    stored.seek(0)
    for got in (
        torch.from_numpy(parts.cpu().numpy()),
        torch.tensor(parts.tolist()),
        copy.deepcopy(parts),
        torch.load(stored, weights_only=True),
        pickle.loads(pickle.dumps(parts)),
    ):
        assert type(got) is torch.Tensor
        assert torch.equal(got, expected)


def test_changed_weights_are_noticed() -> None:
    made = tiny_model("qwen2").eval()
    ours = TransparentLlm(hf_model=made, parity=True)
    with torch.no_grad():
        made.model.layers[1].self_attn.o_proj.weight.mul_(2)
    ours.run([tiny_text(20)])
    with pytest.raises(IfrError, match="layer 1"):
        build_full_graph(ours)


@pytest.mark.default_model
def test_sentences_of_the_default_model(smol: Tracer) -> None:
    text = "When Mary and John went to the store, John gave a drink to"
    ours, theirs = (TransparentLlm.of(smol, parity=parity) for parity in (False, True))
    for of in (ours, theirs):
        of.run(text)
    assert ours.tokens_to_strings(ours.tokens()[0])[:2] == ["When", " Mary"]
    assert theirs.tokens().shape[1] == ours.tokens().shape[1] + 1
    assert theirs.tokens()[0, 0] == smol.tokenizer.bos_token_id
    best = int(ours.unembed(ours.residual_out(29)[0, -1], normalize=True).argmax())
    assert ours.tokens_to_strings(torch.tensor([best])) == [" Mary"]
    neurons = ours.decomposed_ffn_out(0, 20, -1)
    assert neurons.shape == (1536, 576)
    close(neurons.sum(0), ours.ffn_out(20)[0, -1])


def test_graphs_are_plain_and_their_users_own() -> None:
    """As if filled by networkx's own methods; a change of one is seen in no other."""
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


# Installation

STAND_IN = {
    "__init__": "",
    "routes/__init__": "",
    "models/__init__": "",
    "server/__init__": "",
    "routes/contributions": "\n".join(
        f"def {name}(*args, **kwargs): raise AssertionError"
        for name in (
            "get_contributions",
            "get_contributions_with_one_off_part",
            "get_attention_contributions",
            "get_mlp_contributions",
            "get_decomposed_mlp_contributions",
            "apply_threshold_and_renormalize",
        )
    ),
    "routes/graph": (
        "def build_full_graph(*args): raise AssertionError\n"
        "def build_paths_to_predictions(*args): raise AssertionError"
    ),
    "models/transparent_llm": "from abc import ABC\nclass TransparentLlm(ABC): pass",
    "models/tlens_model": (
        "from llm_transparency_tool.models.transparent_llm import TransparentLlm\n"
        "class TransformerLensTransparentLlm(TransparentLlm): pass"
    ),
    "server/app": (
        "from llm_transparency_tool.models.tlens_model import TransformerLensTransparentLlm\n"
        "import llm_transparency_tool.routes.contributions as contributions\n"
        "import llm_transparency_tool.routes.graph"
    ),
    "server/utils": "from llm_transparency_tool.routes.graph import build_full_graph",
}


@pytest.mark.parametrize("parity", [False, True])
def test_install(parity: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a package with the published one's module names, some loaded before, some after."""
    for name, source in STAND_IN.items():
        path = tmp_path / "llm_transparency_tool" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    app = importlib.import_module("llm_transparency_tool.server.app")
    theirs = app.TransformerLensTransparentLlm
    restore = tool.install(parity=parity)
    try:
        utils = importlib.import_module("llm_transparency_tool.server.utils")
        made = tiny_model("qwen2").eval()
        of = app.TransformerLensTransparentLlm("a name", made, None, "cpu", torch.float32)
        base = sys.modules["llm_transparency_tool.models.transparent_llm"].TransparentLlm
        assert isinstance(of, base)
        assert of.parity is parity
        assert of.model_info().name == "a name"
        # As the app's own `load_model` and `run_inference` do.
        of = app.TransformerLensTransparentLlm(
            model_name="a name",
            hf_model=made,
            tokenizer=None,
            device="cpu",
            dtype=torch.float32,
            supported_model_name="another",
        )
        with torch.inference_mode():
            of = of.copy()
            of.run([tiny_text(12)])
        expected = TransparentLlm(hf_model=made, parity=parity)
        expected.run([tiny_text(12)])
        graph = utils.build_full_graph(of, 0, 0.04)
        assert largest_gap(graph, build_full_graph(expected, 0, 0.04)) == 0
        arguments = torch.ones(2, 3), torch.ones(3)
        assert torch.equal(
            app.contributions.get_contributions(*arguments),
            tool.get_contributions(*arguments, parity=parity),
        )
        assert app.contributions.get_contributions.keywords == {"parity": parity}
    finally:
        restore()
        for name in list(sys.modules):
            if name.startswith("llm_transparency_tool"):
                del sys.modules[name]
    assert app.TransformerLensTransparentLlm is theirs


def test_install_without_the_tool() -> None:
    with pytest.raises(IfrError, match="llm_transparency_tool cannot be imported"):
        tool.install()


# Documentation

PAGE = DOCS / "compat-llm-transparency-tool.md"


@pytest.mark.default_model
def test_the_page_runs() -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    shown = re.findall(r"^assert (.*)$", text, re.MULTILINE)
    assert len(shown) >= 3
    assert ifr_fast.__name__ in text
