"""Drill-downs against a float64 account of the model by its own module names."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import networkx as nx
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import importances, proximity
from tiny import LayerAccount, account, tiny_model, tiny_text
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifr_fast import Tracer
from ifr_fast.drilldown import neurons
from ifr_fast.errors import IfrError, UnsupportedArchitectureError
from ifr_fast.graph.tables import EdgeKind, Node, NodeKind
from ifr_fast.kernels import neurons as neuron_kernel
from ifr_fast.kernels.neurons import neuron_proximities
from ifr_fast.recording.recording import RecordingMode
from ifr_fast.routes.comparison import Column

T = 13
LAYER = 1


class Names(NamedTuple):
    """Where a family keeps what is looked at."""

    layers: str
    down: str  # in a layer: the FFN's down projection
    norm: str
    head: str
    after: str | None = None  # in a layer: a norm after the FFN


NAMES = {
    "llama": Names("model.layers", "mlp.down_proj", "model.norm", "lm_head"),
    "llama-bias": Names("model.layers", "mlp.down_proj", "model.norm", "lm_head"),
    "gpt2": Names("transformer.h", "mlp.c_proj", "transformer.ln_f", "lm_head"),
    "phi": Names("model.layers", "mlp.fc2", "model.final_layernorm", "lm_head"),
    "gpt_neox": Names(
        "gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm", "lm_head"
    ),
    "gemma2": Names(
        "model.layers", "mlp.down_proj", "model.norm", "lm_head", "post_feedforward_layernorm"
    ),
    "opt": Names("model.decoder.layers", "fc2", "model.decoder.final_layer_norm", "lm_head"),
    "granite": Names("model.layers", "mlp.down_proj", "model.norm", "lm_head"),
    "qwen3_next": Names("model.layers", "", "model.norm", "lm_head"),
    "bloom": Names("transformer.h", "mlp.dense_4h_to_h", "transformer.ln_f", "lm_head"),
}
WITH_NEURONS = [family for family in NAMES if NAMES[family].down]


class Oracle:
    """A model's own float64 run of a text."""

    def __init__(self, model: PreTrainedModel, names: Names, text: Tensor) -> None:
        self.layers: list[LayerAccount] = account(model, text)
        self.model = copy.deepcopy(model).double().eval()
        self.model.config._attn_implementation = "eager"
        self.model.config._experts_implementation = "eager"
        self.norm: nn.Module = self.model.get_submodule(names.norm)
        self.unembedding: Tensor = self.model.get_submodule(names.head).weight.detach()
        seen: dict[Any, Tensor] = {}
        handles = [
            self.norm.register_forward_hook(lambda _, args, __: seen.update(final=args[0])),
        ]
        for i, layer in enumerate(self.model.get_submodule(names.layers)):
            if not names.down:
                continue
            down = layer.get_submodule(names.down)
            handles.append(
                down.register_forward_hook(
                    lambda _, args, out, i=i: seen.update({(i, "a"): args[0], (i, "out"): out})
                )
            )
        with torch.no_grad():
            output = self.model(input_ids=text[None], use_cache=False)
        for handle in handles:
            handle.remove()
        self.logits = output.logits[0]
        self.final = seen.pop("final")[0]
        self.seen = {key: x.reshape(len(text), -1) for key, x in seen.items()}
        self.names = names

    @torch.no_grad()
    def lens(self, x: Tensor) -> Tensor:
        """Logits of residual streams [R, D], as config and modules have it."""
        logits = self.norm(x) @ self.unembedding.T
        config = self.model.config
        logits = logits / getattr(config, "logits_scaling", 1.0)
        head = self.model.get_submodule(self.names.head)
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def direct(self, part: Tensor, position: int) -> Tensor:
        """What `part` adds to the logits at a position, its norm held: by the norms' formulas."""
        x, weight = self.final[position], self.norm.weight
        eps = next(
            getattr(self.norm, name)
            for name in ("eps", "variance_epsilon")
            if hasattr(self.norm, name)
        )
        if isinstance(self.norm, nn.LayerNorm):
            part, x = part - part.mean(), x - x.mean()
        elif float(self.norm(torch.full_like(x, 2.0))[0]) == pytest.approx(1 + float(weight[0])):
            weight = 1 + weight
        normed = part / (x.square().mean() + eps).sqrt() * weight
        return normed @ self.unembedding.T / getattr(self.model.config, "logits_scaling", 1.0)

    def head(self, layer: int, head: int, position: int) -> Tensor:
        """[T, D] what a head adds from each source."""
        of = self.layers[layer]
        v = of.v[:, head]
        if of.gate is not None:
            v = v * of.gate[position, head]
        parts = of.pattern[head, position, :, None] * (v @ of.W_O[head])
        return parts if of.after is None else parts * of.after[position]

    def neurons(self, layer: int) -> Tensor:
        """[T, F, D] what each neuron adds."""
        down = self.model.get_submodule(self.names.layers)[layer].get_submodule(self.names.down)
        W = down.weight.detach()
        W = W if type(down).__name__ == "Conv1D" else W.T
        parts = self.seen[layer, "a"][..., None] * W
        if self.names.after is not None:  # elementwise, at what it was
            return parts * (self.layers[layer].ffn / self.seen[layer, "out"])[:, None]
        return parts * getattr(self.model.config, "residual_multiplier", 1.0)

    def before_ffn(self, layer: int) -> Tensor:
        of = self.layers[layer]
        return of.resid_pre if of.resid_mid is None else of.resid_mid


class Case(NamedTuple):
    tracer: Tracer
    oracle: Oracle
    text: Tensor


@functools.cache
def case(family: str) -> Case:
    model = tiny_model(family).eval()
    text = tiny_text(T)
    return Case(Tracer(model, None), Oracle(model, NAMES[family], text), text)


@pytest.fixture(params=list(NAMES))
def any_case(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


@pytest.fixture(params=WITH_NEURONS)
def neuron_case(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest number."""
    assert got.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    assert float((got.double() - expected).abs().max()) < tolerance * scale


# Contribution maps


def test_contribution_maps(any_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer, oracle, text = any_case
    monkeypatch.setattr("ifr_fast.drilldown.parts._MAP_ELEMENTS", 5 * T * tracer.decoder.n_heads)
    for mode in RecordingMode:
        recording = tracer.record(text, mode=mode)
        for layer in range(tracer.decoder.n_layers):
            expected = importances(oracle.layers[layer]).heads
            for head in (0, -1):
                got = tracer.contribution_map(recording, layer=layer, head=head)
                assert_close(got, expected[head])
            assert_close(tracer.contribution_map(recording, layer=layer), expected.sum(0))


def test_a_map_says_what_a_graph_says() -> None:
    tracer, _, text = case("llama")
    heads = tracer.trace(text, threshold=0.0, granularity="head").head_edges
    got = tracer.contribution_map(text, layer=LAYER, head=2)
    mine = (heads.layer == LAYER) & (heads.head == 2)
    assert torch.equal(got[heads.target[mine], heads.source[mine]], heads.weight[mine])
    assert not got.is_inference()


# Logit lens


def test_logit_lens_of_every_kind_of_node(any_case: Case) -> None:
    tracer, oracle, text = any_case
    of = oracle.layers[LAYER]
    states: dict[Any, Tensor] = {
        (0, "embed", 4): oracle.layers[0].resid_pre[4],
        (LAYER, "post", -1): of.resid_post[-1],
        (LAYER, "ffn", 3): of.ffn[3],
        (tracer.decoder.n_layers - 1, "post", 6): oracle.layers[-1].resid_post[6],
    }
    if of.resid_mid is not None:
        states[LAYER, "mid", 5] = of.resid_mid[5]
    expected = oracle.lens(torch.stack(list(states.values())))
    lenses = tracer.logit_lens(text, list(states), k=4)
    for node, lens, logits in zip(states, lenses, expected, strict=True):
        assert lens.node == Node(node[0], NodeKind(node[1]), node[2] % T)
        assert_close(lens.logits, logits)
        probabilities = logits.softmax(-1)
        top = probabilities.topk(4)
        assert [p.token_id for p in lens.predictions] == top.indices.tolist()
        got = [p.probability for p in lens.predictions]
        assert got == pytest.approx(top.values.tolist(), abs=1e-5)
        for place, token_id in enumerate(logits.argsort(descending=True)[:10].tolist(), start=1):
            assert lens.rank(token_id) == place
            assert lens.probability(token_id) == pytest.approx(
                float(probabilities[token_id]), abs=1e-5
            )
    assert_close(lenses[3].logits, oracle.logits[6])


def test_lens_of_one_node_and_what_is_refused() -> None:
    tracer, _, text = case("phi")
    one = tracer.logit_lens(text, Node(0, NodeKind.POST, 3))
    assert torch.equal(one.logits, tracer.logit_lens(text, [(0, "post", 3)])[0].logits)
    with pytest.raises(ValueError, match="nodes: layer 0 is a parallel block, which has no mid"):
        tracer.logit_lens(text, (0, "mid", 3))
    with pytest.raises(ValueError, match="nodes: an embed is at layer 0, got 1"):
        tracer.logit_lens(text, (1, "embed", 3))
    with pytest.raises(ValueError, match=r"nodes: expected \(layer, kind, position\)"):
        tracer.logit_lens(text, (0, "resid", 3))
    with pytest.raises(ValueError, match="nodes: position: expected -13 to 12, got 13"):
        tracer.logit_lens(text, (0, "post", 13))
    with pytest.raises(ValueError, match="nodes: is empty"):
        tracer.logit_lens(text, [])
    with pytest.raises(ValueError, match="nodes: expected a node or several, got 3"):
        tracer.logit_lens(text, 3)  # type: ignore[call-overload]
    for of in (one.rank, one.probability):
        for token_id in (-1, len(one.logits)):
            with pytest.raises(ValueError, match=f"token_id: expected 0 to .*, got {token_id}"):
                of(token_id)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        tracer.logit_lens(text, (0, "post", 3), k=0)


# Promoted tokens


def test_promoted_by_heads_and_blocks(any_case: Case) -> None:
    tracer, oracle, text = any_case
    position = 9
    for mode in RecordingMode:
        recording = tracer.record(text, mode=mode)
        for head in (0, 4):
            parts = oracle.head(LAYER, head, position)
            whole = tracer.promoted_tokens(
                recording, layer=LAYER, head=head, position=position, k=3
            )
            assert_close(whole.part, parts.sum(0))
            expected = oracle.direct(parts.sum(0), position)
            assert_close(whole.logits, expected)
            for named, largest in ((whole.promoted, True), (whole.suppressed, False)):
                top = expected.topk(3, largest=largest)
                assert [x.token_id for x in named] == top.indices.tolist()
                assert_close(torch.tensor([x.logit for x in named]), top.values)
            single = tracer.promoted_tokens(
                recording, layer=LAYER, head=head, position=position, source=7
            )
            assert_close(single.logits, oracle.direct(parts[7], position))
        block = tracer.promoted_tokens(recording, layer=LAYER, position=position)
        assert_close(block.logits, oracle.direct(oracle.layers[LAYER].ffn[position], position))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_what_all_parts_add_is_the_logits(family: str) -> None:
    """Every head, block and the embedding together: the logits, less what biases add."""
    tracer, oracle, text = case(family)
    recording = tracer.record(text)
    total = oracle.direct(oracle.layers[0].resid_pre[T - 1], T - 1)
    for layer, block in enumerate(tracer.decoder.blocks):
        total += tracer.promoted_tokens(recording, layer=layer).logits
        total += oracle.direct(block.bias.double(), T - 1)
        for head in range(tracer.decoder.n_heads):
            total += tracer.promoted_tokens(recording, layer=layer, head=head).logits
    bias = oracle.norm.bias if isinstance(oracle.norm, nn.LayerNorm) else torch.zeros(1)
    constant = bias.double().detach() @ oracle.unembedding.T if len(bias) > 1 else 0
    head_bias = getattr(oracle.model.get_submodule(oracle.names.head), "bias", None)
    constant = constant + (0 if head_bias is None else head_bias.detach())
    assert_close(total + constant, oracle.logits[-1].detach(), 1e-4)


def test_promoted_by_neurons(neuron_case: Case) -> None:
    tracer, oracle, text = neuron_case
    parts = oracle.neurons(LAYER)[6]
    for neuron in (0, 17, -1, -len(parts)):
        found = tracer.promoted_tokens(text, layer=LAYER, position=6, neuron=neuron)
        assert_close(found.part, parts[neuron])
        assert_close(found.logits, oracle.direct(parts[neuron], 6))


def test_promoted_tokens_refuses() -> None:
    tracer, _, text = case("llama")
    with pytest.raises(ValueError, match="neuron: give it, or head, not both"):
        tracer.promoted_tokens(text, layer=0, head=0, neuron=0)
    with pytest.raises(ValueError, match="source: goes with head"):
        tracer.promoted_tokens(text, layer=0, source=0)
    with pytest.raises(ValueError, match="source: expected a position up to 3, got 4"):
        tracer.promoted_tokens(text, layer=0, head=0, position=3, source=4)
    with pytest.raises(ValueError, match="neuron: expected -50 to 49, got 50"):
        tracer.promoted_tokens(text, layer=0, neuron=50)
    with pytest.raises(ValueError, match="neuron: expected -50 to 49, got -51"):
        tracer.promoted_tokens(text, layer=0, neuron=-51)
    with pytest.raises(ValueError, match="head: expected -6 to 5, got 6"):
        tracer.promoted_tokens(text, layer=0, head=6)


def test_more_than_a_norm_before_the_head_is_refused() -> None:
    model = tiny_model("llama").eval()
    tracer = Tracer(model, None)
    model.model.norm.register_forward_hook(lambda _, __, x: torch.tanh(x))
    with pytest.raises(UnsupportedArchitectureError, match="stands more than a norm"):
        tracer.promoted_tokens(tiny_text(T), layer=0)


# Neurons


def shares_of_neurons(oracle: Oracle, layer: int, kind: NodeKind) -> list[Tensor]:
    """Importance of neurons [T, F]; in `post` also of the stream and, in parallel, of attention."""
    of, parts = oracle.layers[layer], oracle.neurons(layer)
    y = of.ffn if kind == NodeKind.FFN else of.resid_post
    neurons = torch.stack([proximity(p, row) for p, row in zip(parts, y, strict=True)])
    found = [neurons]
    if kind == NodeKind.POST:
        found.append(proximity(oracle.before_ffn(layer), y))
        if of.resid_mid is None:
            pairs = torch.zeros(T, dtype=torch.float64)
            for t in range(T):
                for head in range(len(of.pattern)):
                    of_head = oracle.head(layer, head, t)[: t + 1]
                    pairs[t] += proximity(of_head, y[t]).sum()
            found.append(pairs)
    total = neurons.sum(-1) + sum(found[1:])
    return [x / (total[:, None] if x.ndim == 2 else total) for x in found]


@pytest.mark.parametrize("kind", ["post", "ffn"])
def test_neurons(neuron_case: Case, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_kernel, "VISIT_ELEMENTS", 300)
    tracer, oracle, text = neuron_case
    for mode in RecordingMode:
        recording = tracer.record(text, mode=mode)
        for layer in (0, LAYER):
            expected = shares_of_neurons(oracle, layer, NodeKind(kind))
            rows = [0, 5, T - 1]
            scores = tracer.neurons(recording, layer=layer, position=rows, kind=kind)
            assert_close(scores.activations, oracle.seen[layer, "a"][rows])
            got = [scores.importance, scores.residual, scores.attention]
            got = [x for x in got if x is not None]
            assert len(got) == len(expected)
            for mine, other in zip(got, expected, strict=True):
                assert_close(mine, other[rows])
            total = sum(x if x.ndim == 1 else x.sum(-1) for x in got)
            assert_close(total, torch.ones(3, dtype=torch.float64))
            assert not scores.unattributed.any()


def test_the_most_important_neurons_come_first() -> None:
    tracer, oracle, text = case("gpt2")
    scores = tracer.neurons(text, layer=LAYER)
    with pytest.raises(ValueError, match="k: expected at least 1, got -1"):
        scores.top(-1)
    (top,) = scores.top(5)
    expected = shares_of_neurons(oracle, LAYER, NodeKind.POST)[0][-1].topk(5)
    assert [n.neuron for n in top] == expected.indices.tolist()
    assert [n.importance for n in top] == pytest.approx(expected.values.tolist(), abs=1e-5)
    for n in top:
        value = float(oracle.seen[LAYER, "a"][-1, n.neuron])
        assert n.activation == pytest.approx(value, abs=1e-4)


def test_neurons_in_bfloat16() -> None:
    """Against float64 importances of the same half-precision activations and streams."""
    model = tiny_model("llama", dtype=torch.bfloat16).eval()
    tracer, text, seen = Tracer(model, None), tiny_text(T), {}
    layer = model.model.layers[LAYER]
    down = layer.mlp.down_proj
    handle = down.register_forward_hook(lambda _, args, out: seen.update(a=args[0][0], out=out[0]))
    recording = tracer.record(text)
    handle.remove()
    scores = tracer.neurons(recording, layer=LAYER, position=slice(None))
    parts = (seen["a"].double()[..., None] * down.weight.double().T).detach()
    post = recording.resid_post(LAYER).double()
    of_neurons = torch.stack([proximity(p, y) for p, y in zip(parts, post, strict=True)])
    mid = proximity(recording.layers[LAYER].resid_mid.double(), post)
    total = of_neurons.sum(-1) + mid
    assert float((scores.importance - of_neurons / total[:, None]).abs().max()) < 2e-4
    assert float((scores.residual - mid / total).abs().max()) < 2e-3


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_neurons_where_nothing_is_attributed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part moves anything towards a sum of 0: each of the n gets 1/n."""
    tracer, _, text = case(family)
    rows = neurons.ffn_rows

    def cancelled(*args: Any) -> Any:
        found, y = rows(*args), torch.zeros(1, 36)
        return found._replace(post=y, inputs=found.inputs._replace(y=y))

    monkeypatch.setattr(neurons, "ffn_rows", cancelled)
    scores = tracer.neurons(text, layer=LAYER, position=4)
    n = 1 + scores.importance.shape[1] + (0 if scores.attention is None else 6 * 5)
    assert scores.unattributed.tolist() == [True]
    assert torch.equal(scores.importance, torch.full_like(scores.importance, 1 / n))
    assert float(scores.residual) == pytest.approx(1 / n)
    if scores.attention is not None:
        assert float(scores.attention) == pytest.approx(30 / n)


def test_an_ffn_that_adds_nothing_has_no_neurons() -> None:
    model = tiny_model("llama").eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    with pytest.raises(UnsupportedArchitectureError, match="no basis of neurons"):
        Tracer(model, None).neurons(tiny_text(5), layer=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_have_no_basis_of_neurons(family: str) -> None:
    tracer = Tracer(tiny_model(family).eval(), None)
    message = r"model: the FFN of layer model\.layers\.1 has no basis of neurons.*experts"
    with pytest.raises(UnsupportedArchitectureError, match=message):
        tracer.neurons(tiny_text(T), layer=1)


def test_changed_weights_are_noticed() -> None:
    model = tiny_model("gemma2").eval()  # whose basis is no view of the weights
    tracer = Tracer(model, None)
    tracer.neurons(tiny_text(T), layer=0)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.copy_(
            torch.randn_like(model.model.layers[0].mlp.down_proj.weight)
        )
    with pytest.raises(IfrError, match="at layer 0 the neurons do not add up"):
        tracer.neurons(tiny_text(T), layer=0)


def test_neurons_of_adapters() -> None:
    model = tiny_model("llama")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    text = tiny_text(T)
    scores = Tracer(adapted, None).neurons(text, layer=LAYER)
    merged = Tracer(adapted.merge_and_unload().eval(), None).neurons(text, layer=LAYER)
    assert_close(scores.importance, merged.importance.double())


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 30), st.integers(0, 99), st.booleans())
def test_neuron_proximities_are_exact(R: int, F: int, D: int, seed: int, zeros: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    c, W, y = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((R, F), (F, D), (R, D))
    )
    if zeros:
        W[:, seed % D], y[:, seed % D], c[:, seed % F] = 0, 0, 0
    got = neuron_proximities(4 * c, W.T.contiguous().T, y)
    expected = torch.stack(
        [proximity(4 * row[:, None] * W, y_row) for row, y_row in zip(c, y, strict=True)]
    )
    assert torch.allclose(got, expected, rtol=0, atol=1e-12 * D)


# Reach


def path_sums(graph: nx.MultiDiGraph, source: Any) -> dict[Any, float]:
    """Weight of all paths from a node of a networkx graph to each."""
    weights = dict.fromkeys(graph, 0.0)
    if source not in weights:
        return weights
    weights[source] = 1.0
    for node in nx.topological_sort(graph):
        for _, target, data in graph.out_edges(node, data=True):
            weights[target] += weights[node] * data["weight"]
    return weights


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("granularity", ["token", "head"])
def test_reach_in_a_graph(family: str, granularity: Any) -> None:
    tracer, _, text = case(family)
    graph = tracer.trace(
        text, position=[7, -1], position_weights=[1, 3], threshold=0.02, granularity=granularity
    )
    drawn = graph.to_networkx()
    importance = graph.token_importance()
    for source in range(T):
        reach = graph.reach(source)
        expected = path_sums(drawn, ("embed", 0, source))
        for (kind, layer, position), weight in expected.items():
            if kind in ("mid", "post"):
                got = getattr(reach, kind)[layer, position]
                assert float(got) == pytest.approx(weight, abs=1e-6)
        at_top = sum(w * float(reach.predictions[t]) for t, w in graph.starts.items())
        assert at_top == pytest.approx(float(importance[source]), abs=1e-6)
        listed = {(n.kind, n.layer, n.position): weight for n, weight in reach.nodes(0.01)}
        above = {
            key: weight
            for key, weight in expected.items()
            if weight > 0.01 and key[0] in ("mid", "post")
        }
        assert listed == pytest.approx(above, abs=1e-6)
        order = [weight for _, weight in reach.nodes()]
        assert order == sorted(order, reverse=True)


def test_routes_from_a_token() -> None:
    tracer, _, text = case("llama")
    graph = tracer.trace(text, threshold=0.02)
    importance = graph.token_importance()
    for source in range(-T, 0):
        part = graph.routes_from(source)
        got = part.token_importance()
        assert float(got[source]) == pytest.approx(float(importance[source]), abs=1e-6)
        assert got.count_nonzero() == (importance[source] > 0)
        drawn = part.to_networkx()
        root, top = ("embed", 0, source % T), ("post", graph.n_layers - 1, T - 1)
        if len(part.edges.layer):
            assert set(drawn) == {root} | nx.descendants(drawn, root)
            assert set(drawn) == {top} | nx.ancestors(drawn, top)
    with pytest.raises(ValueError, match="source: expected -13 to 12, got 13"):
        graph.routes_from(13)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_routes_whose_weight_rounds_to_0_are_routes(family: str) -> None:
    """As in deep models: a product of many small weights."""
    tracer, _, text = case(family)
    graph = tracer.trace(text, threshold=0.02)
    weak = dataclasses.replace(
        graph, edges=graph.edges._replace(weight=torch.full_like(graph.edges.weight, 1e-38))
    )
    assert float(weak.reach(0).predictions.max()) == 0
    for source in range(T):
        part, expected = weak.routes_from(source), graph.routes_from(source)
        for got, column in zip(part.edges[:4], expected.edges[:4], strict=True):
            assert torch.equal(got, column)
        for got, column in zip(part.head_edges, expected.head_edges, strict=True):
            assert torch.equal(got, column)
    assert len(weak.routes_from(0).edges.layer) > 3


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("granularity", ["token", "head"])
def test_reach_in_all_routes(family: str, granularity: Any) -> None:
    tracer, _, text = case(family)
    routes = tracer.trace_all(text, threshold=0.02, granularity=granularity)
    for at in (routes, routes.at(0.05)):
        importance = torch.stack([at[t].token_importance() for t in range(T)])
        for source in range(T):
            assert_close(at.reach(source).predictions, importance[:, source].double(), 1e-6)


# Differences


def as_dict(table: Any, places: list[int | None]) -> dict[Any, float]:
    rows = zip(*(x.tolist() for x in table), strict=True)
    return {(a, b, places[t], places[s]): w for a, b, t, s, w in rows}


def assert_difference(first: Any, second: Any, difference: Any) -> None:
    """The tables hold both graphs and nothing else."""
    for name in ("edges", "head_edges"):
        table = getattr(difference, name)
        rows = list(zip(*(x.tolist() for x in table), strict=True))
        assert rows == sorted(rows)
        for i, graph in enumerate((first, second)):
            where = {c[i]: n for n, c in enumerate(difference.columns) if c[i] is not None}
            expected = as_dict(getattr(graph, name), [where[t] for t in range(len(graph.tokens))])
            got = {row[:4]: row[4 + i] for row in rows}
            assert {key: w for key, w in got.items() if w > 0} == expected
    importance = difference.token_importance()
    for i, graph in enumerate((first, second)):
        for column, weight in zip(difference.columns, importance[:, i].tolist(), strict=True):
            expected = 0 if column[i] is None else float(graph.token_importance()[column[i]])
            assert weight == pytest.approx(expected)


def test_difference_of_two_prompts_of_unequal_length() -> None:
    tracer, _, text = case("llama")
    inserted = torch.cat([text[:4], torch.tensor([90, 91]), text[4:]])
    first, second = (tracer.trace(ids, threshold=0.03) for ids in (text, inserted))
    difference = first.compare(second)
    expected = [Column(i, i) for i in range(4)] + [Column(None, 4), Column(None, 5)]
    assert difference.columns == expected + [Column(i, i + 2) for i in range(4, T)]
    assert difference.tokens[4] == (None, "<90>")
    assert_difference(first, second, difference)
    changes = difference.top_changes(5)
    sizes = (difference.edges.second - difference.edges.first).abs()
    assert [abs(c.second - c.first) for c in changes] == pytest.approx(
        sizes.topk(5).values.tolist()
    )


def test_difference_of_two_models_and_its_forms() -> None:
    text = tiny_text(T)
    graphs = [
        Tracer(tiny_model("gpt2", seed).eval(), None).trace(text, threshold=0.03) for seed in (0, 1)
    ]
    difference = graphs[0].compare(graphs[1])
    assert difference.columns == [Column(i, i) for i in range(T)]
    assert_difference(*graphs, difference)
    heads = graphs[1].head_importance() - graphs[0].head_importance()
    assert torch.equal(difference.head_importance(), heads)
    ffn = graphs[1].ffn_importance() - graphs[0].ffn_importance()
    assert torch.equal(difference.ffn_importance(), ffn)

    frame = difference.to_pandas()
    expected = (frame["second"] - frame["first"]).tolist()
    assert frame["difference"].tolist() == pytest.approx(expected, abs=1e-6)
    kinds = [EdgeKind[kind.upper()] for kind in frame["kind"]]
    assert kinds == difference.edges.kind.tolist()
    joined = difference.to_networkx()
    for name, graph in zip(("first", "second"), graphs, strict=True):
        mine = graph.to_networkx()
        got = {
            (u, v, data["kind"]): data[name]
            for u, v, data in joined.edges(data=True)
            if data[name] > 0
        }
        assert got == {(u, v, d["kind"]): d["weight"] for u, v, d in mine.edges(data=True)}
        tokens = {n: d[name] for n, d in joined.nodes(data=True) if d[name] is not None}
        assert tokens == {n: d["token"] for n, d in mine.nodes(data=True)}


def test_a_graph_does_not_differ_from_itself() -> None:
    tracer, _, text = case("phi")
    graph = tracer.trace(text, threshold=0.02)
    difference = graph.compare(graph)
    assert difference.top_changes() == []
    assert len(difference.edges.layer) == len(graph.edges.layer)
    assert f"{len(graph.edges.layer)} in both" in repr(difference)


@given(st.data())
def test_columns_hold_every_position_once(data: st.DataObject) -> None:
    n = [data.draw(st.integers(1, T)) for _ in range(2)]
    first, second = (small_graph(length) for length in n)
    pairs: list[tuple[int, int]] = []
    for i, j in zip(
        sorted(data.draw(st.sets(st.integers(0, n[0] - 1)))),
        sorted(data.draw(st.sets(st.integers(0, n[1] - 1)))),
        strict=False,
    ):
        pairs.append((i, j))
    columns = first.compare(second, positions=pairs).columns
    for which in (0, 1):
        assert [c[which] for c in columns if c[which] is not None] == list(range(n[which]))
    assert [c for c in columns if None not in c] == pairs


@functools.cache
def small_graph(n_tokens: int) -> Any:
    tracer, _, text = case("llama")
    return tracer.trace(text[:n_tokens], threshold=0.1)


def test_differences_refused() -> None:
    graph = small_graph(5)
    other = Tracer(tiny_model("gpt_neox").eval(), None).trace(tiny_text(5))
    with pytest.raises(ValueError, match="other: expected a graph of a model with the same layers"):
        graph.compare(other)
    with pytest.raises(ValueError, match="other: expected a RouteGraph, got int"):
        graph.compare(3)  # type: ignore[arg-type]
    for positions in ([(0, 5)], [(1, 1), (1, 2)], [(2, 1), (1, 2)], [(-1, 0)]):
        with pytest.raises(ValueError, match="positions: expected pairs"):
            graph.compare(graph, positions=positions)


# The default model


@pytest.mark.default_model
def test_drilldowns_on_the_default_model(smol: Tracer) -> None:
    text = "When Mary and John went to the store, John gave a drink to"
    recording = smol.record(text)
    oracle = Oracle(smol.model, NAMES["llama"], recording.token_ids)
    layer, position = 23, len(recording) - 1
    got = smol.contribution_map(recording, layer=layer, head=0)
    assert_close(got, importances(oracle.layers[layer]).heads[0])
    mary = 5099
    lenses = smol.logit_lens(recording, [(i, "post", -1) for i in (10, 29)])
    for lens, i in zip(lenses, (10, 29), strict=True):
        expected = oracle.lens(oracle.layers[i].resid_post[-1:])[0]
        assert_close(lens.logits, expected)
        assert lens.rank(mary) == int((expected > expected[mary]).sum()) + 1
    assert lenses[1].predictions[0].token == " Mary"
    found = smol.promoted_tokens(recording, layer=layer, head=0)
    assert_close(found.logits, oracle.direct(oracle.head(layer, 0, position).sum(0), position))
    assert " Mary" in [x.token for x in found.promoted]
    of, parts = oracle.layers[layer], oracle.neurons(layer)[position]
    neurons = proximity(parts, of.resid_post[position])
    total = neurons.sum() + proximity(of.resid_mid[position], of.resid_post[position])
    scores = smol.neurons(recording, layer=layer)
    assert_close(scores.importance[0], neurons / total)
