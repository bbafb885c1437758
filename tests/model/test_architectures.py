"""Every family of tiny.FAMILIES against a float64 oracle, which is made from the family's own eager
run, and the refusal of every entry of tiny.REFUSALS. The tables of docs/models.md are made from the
same two lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from opened import tiny_importances, tiny_tracer
from oracle import LayerImportance, assert_graph_agrees
from same_graph import assert_agree, assert_within
from tiny import (
    CONFIGS,
    FAMILIES,
    MODELS_PAGE,
    REFUSALS,
    WINDOW,
    model_tables,
    tiny_model,
    tiny_text,
)
from torch import Tensor
from unchecked import skip_closure_check

from ifr_fast import IfrError, Recording, Tracer, UnsupportedArchitectureError
from ifr_fast.kernels import reference
from ifr_fast.kernels.given_ffn import score_given_ffn
from ifr_fast.recording.layer_inputs import layer_inputs

T = 23  # three windows and a bit
LENGTHS = [1, 2, T]
MODES = ["full", "lean"]
FRONTIER = [0, 1, WINDOW - 1, WINDOW, 14, T - 1]
THRESHOLDS = [0.0, 0.02, 0.08, 0.3, 0.6]
# Families that differ from a plain Llama in how they are opened, recorded or scored.
SPECIAL = [
    "bart",
    "beam",
    "bert",
    "bloom",
    "deepseek_v3",
    "doge",
    "falcon",
    "gemma2",
    "gemma3",
    "gemma4",
    "gemma4-moe",
    "glm4",
    "gpt_neo",
    "gpt_oss",
    "gptj",
    "granite",
    "minimax",
    "mpt",
    "olmo2",
    "openai-gpt",
    "opt",
    "opt-post_norm",
    "qwen3_next",
]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


class Case:
    """A family's recordings, which its tests share and do not change."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.recordings = {
            (n, mode): tiny_tracer(name).record(tiny_text(n), mode=mode)
            for n in LENGTHS
            for mode in MODES
        }

    def layers(self, n_tokens: int = T) -> list[LayerImportance]:
        return tiny_importances(self.name, n_tokens)

    def each(self) -> Iterator[tuple[int, str, Recording]]:
        for (n, mode), recording in self.recordings.items():
            yield n, mode, recording


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def rows_of(name: str, n_tokens: int, mode: str, impl: str) -> list[list[int] | None]:
    """The rows that are scored; None: all. Short texts do not interact with both the family and the
    implementation.
    """
    every = name in CONFIGS
    if n_tokens < T:
        return [None] if every or impl == "cpu" else []
    if mode == "full":
        return [None]
    return [FRONTIER, None] if every else [FRONTIER]


@pytest.mark.parametrize("impl", ["cpu", "eager", "reference"])
def test_contributions_match_the_oracle(family: Case, impl: str) -> None:
    tracer = tiny_tracer(family.name, impl=impl)
    assert tracer.impl == impl
    for n, mode, recording in family.each():
        layers = family.layers(n)
        for rows in rows_of(family.name, n, mode, impl):
            count = 0
            for scores in tracer.contributions(recording, rows=rows, keep=0.0):
                expected = layers[scores.layer]
                assert_agree(scores, expected)
                target, source, weight = scores.token_edges
                dense = torch.zeros(n, n, dtype=torch.float64)
                dense[target, source] = weight.double()
                assert_within(dense[scores.rows], expected.heads.sum(0)[scores.rows])
                count += 1
            assert count == len(layers) == tracer.decoder.n_layers >= 3


def assert_routes_agree(
    family: Case, n_tokens: int, mode: str, positions: list[int], **options: Any
) -> int:
    """`trace` and `trace_all` agree with the oracle. The number of edges of the smallest graph."""
    tracer, recording = tiny_tracer(family.name), family.recordings[n_tokens, mode]
    routes = tracer.trace_all(recording, **options)
    assert len(routes) == n_tokens
    sizes = []
    for position in positions:
        graph = tracer.trace(recording, position=position, **options)
        assert_graph_agrees(graph, family.layers(n_tokens))
        assert_graph_agrees(routes[position], family.layers(n_tokens))
        sizes.append(len(graph.edges.layer))
    return min(sizes)


@pytest.mark.parametrize("mode", MODES)
def test_graphs_match_the_oracle(family: Case, mode: str) -> None:
    assert assert_routes_agree(family, T, mode, [WINDOW + 2, T - 1], threshold=0.02) > 10


@pytest.mark.parametrize("granularity", ["token", "head"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_graphs_at_every_threshold_match_the_oracle(name: str, granularity: str) -> None:
    """The mode changes what is scored, not how a graph grows: both are tried at one threshold."""
    family = Case(name)
    for threshold in THRESHOLDS:
        options = {"threshold": threshold, "granularity": granularity}
        assert_routes_agree(family, T, "full", [0, T // 2, T - 1], **options)
        assert_routes_agree(family, 2, "lean", [0, 1], **options)
        assert_routes_agree(family, 1, "full", [0], **options)
    for n, mode in ((1, "lean"), (2, "full"), (T, "lean")):
        assert_routes_agree(family, n, mode, [n - 1], threshold=0.08, granularity=granularity)


def test_a_value_replaced_moves_its_source_alone(
    family: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum over keys does not depend on their order. Another v at one position must change the
    weight of that source, in the rows that see it, and of no other beyond the common denominator.
    """
    changed = 9
    # The closure check would rightly see the change.
    skip_closure_check(monkeypatch)
    tracer = tiny_tracer(family.name, impl="eager")
    recording = family.recordings[T, "full"]

    def parts(layer: int) -> Tensor:
        """[T, T + 1]: importances of the sources, and of the residual stream."""
        (scores,) = tracer.contributions(recording, layers=[layer], keep=0.0)
        dense = torch.zeros(T, T + 1, dtype=torch.float64)
        target, source, weight = scores.token_edges
        dense[target, source] = weight.double()
        dense[:, T] = scores.residual.double()
        return dense

    for layer in range(3):
        before = parts(layer)
        v = recording.layers[layer].v
        recording.layers[layer].v = v.clone()
        recording.layers[layer].v[changed] *= -0.5
        try:
            after = parts(layer)
        finally:
            recording.layers[layer].v = v
        rows = (after != before).any(-1).nonzero().squeeze(1).tolist()
        seeing = family.layers()[layer].heads.sum(0)[:, changed] > 1e-6
        window = recording.layers[layer].window or T
        assert set(rows) <= set(range(changed, min(T, changed + window)))
        assert set(seeing.nonzero().squeeze(1).tolist()) <= set(rows)
        if family.name == "mistral":
            assert rows == list(range(changed, changed + WINDOW))
        others = torch.arange(T + 1) != changed
        for t in rows:
            # Weights in common units: shares of all but the source that was changed.
            was, now = (x[t, others] / x[t, others].sum() for x in (before, after))
            assert_within(now, was)


@pytest.mark.parametrize("name", SPECIAL)
def test_weights_changed_after_opening_are_noticed(name: str) -> None:
    model = tiny_model(name)
    tracer = Tracer(model)
    described = FAMILIES[name]
    layer = model.get_submodule(described.layers)[1].get_submodule(described.attention)
    with torch.no_grad():
        weight = layer.get_submodule(described.out).weight
        weight.add_(torch.randn_like(weight))
    for mode in MODES:
        with pytest.raises(IfrError, match="at layer 1 the parts"):
            tracer.trace_all(tracer.record(tiny_text(T), mode=mode))


@HALF
@pytest.mark.parametrize("name", ["llama", *SPECIAL])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Scores against the float64 oracle on the activations that were recorded."""
    tracer = tiny_tracer(name, dtype)
    assert tracer.decoder.dtype == dtype
    for mode in MODES:
        recording = tracer.record(tiny_text(T), mode=mode)
        for scores in tracer.contributions(recording, keep=0.0):
            with recording.replaying():
                inputs, post, _ = layer_inputs(recording, scores.layer, scores.rows)
            exact = reference.score_attention(inputs.to(torch.float64), 0.0)
            pairs = [
                (scores.head_total, exact.head_total),
                (scores.residual, exact.residual),
            ]
            if post is None:
                pairs.append((scores.ffn, exact.ffn))
            else:
                exact_parts = (x.double() for x in (post.residual, post.ffn, post.y))
                of_ffn = score_given_ffn(*exact_parts)
                pairs += [(scores.ffn, of_ffn.ffn), (scores.ffn_residual, of_ffn.residual)]
            for mine, theirs in pairs:
                assert mine.dtype == torch.float32
                assert_within(mine, theirs)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_choice_of_experts_may_flip_by_rounding(name: str, seed: int) -> None:
    """It flips for some row of the probe in about a tenth of such models."""
    tracer = Tracer(tiny_model(name, seed=seed, dtype=torch.bfloat16))
    (step,) = tracer.generate(tiny_text(WINDOW + 2), max_new_tokens=1, threshold=0.0)
    assert step.graph.token_importance().sum() == pytest.approx(1, abs=1e-3)


@HALF
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mistral", "mixtral", "phi3", "falcon-new", "olmo", "smollm3"])
def test_sharp_attention_in_half_precision(name: str, seed: int, dtype: torch.dtype) -> None:
    """Scores so large that their rounding changes weights: a float32 run attends elsewhere."""
    model = tiny_model(name, seed=seed, dtype=dtype)
    with torch.no_grad():
        for of, weight in model.named_parameters():
            if weight.ndim > 1 and re.search("q_|k_|qkv|query", of):
                weight.mul_(4)
    Tracer(model)


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_families_that_cannot_be_explained_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=REFUSALS[name].message) as caught:
        Tracer(tiny_model(name))
    assert str(caught.value).startswith("model: ")
    assert "\n" not in str(caught.value)


def test_the_page_lists_what_is_tested() -> None:
    """`python tests/support/tiny.py` writes the page's tables anew."""
    text = MODELS_PAGE.read_text()
    for table in model_tables():
        assert table in text
