"""Every family of tiny.FAMILIES against a float64 oracle of its own eager run, and every one of
tiny.REFUSALS refused, in so many words. The tables of docs/models.md are made of the same two
lists.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import TOLERANCE, LayerImportance, assert_graph_agrees, importances
from same_graph import assert_agree
from tiny import (
    FAMILIES,
    MODELS_PAGE,
    REFUSALS,
    WINDOW,
    account,
    model_tables,
    tiny_model,
    tiny_text,
)
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from unchecked import skip_closure_check

from ifr_fast import IfrError, Tracer, UnsupportedArchitectureError
from ifr_fast.kernels import reference
from ifr_fast.recording.layer_inputs import layer_inputs

T = 23  # crosses the window three times over
FRONTIER = [0, 1, WINDOW - 1, WINDOW, 14, T - 1]
# What differs from a plain Llama in how it is opened, recorded or scored.
SPECIAL = [
    "bloom",
    "deepseek_v3",
    "falcon",
    "gemma2",
    "gemma3",
    "glm4",
    "gpt_neo",
    "gpt_oss",
    "gptj",
    "granite",
    "mpt",
    "olmo2",
    "opt",
    "qwen3_next",
]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: Any) -> tuple[PreTrainedModel, list[LayerImportance]]:
    model = tiny_model(request.param)
    return model, [importances(layer) for layer in account(model, tiny_text(T))]


@pytest.mark.parametrize("impl", ["cpu", "eager", "reference"])
@pytest.mark.parametrize(
    ("mode", "rows"), [("full", None), ("lean", FRONTIER)], ids=["full", "lean"]
)
def test_contributions_match_the_oracle(
    family: tuple[PreTrainedModel, list[LayerImportance]],
    mode: str,
    rows: list[int] | None,
    impl: str,
) -> None:
    model, layers = family
    tracer = Tracer(model, impl=impl)
    recording = tracer.record(tiny_text(T), mode=mode)
    n = 0
    for scores in tracer.contributions(recording, rows=rows, keep=0.0):
        assert_agree(scores, layers[scores.layer])
        n += 1
    assert n == len(layers) == 3


@pytest.mark.parametrize("mode", ["full", "lean"])
def test_graphs_match_the_oracle(
    family: tuple[PreTrainedModel, list[LayerImportance]], mode: str
) -> None:
    model, layers = family
    tracer = Tracer(model)
    recording = tracer.record(tiny_text(T), mode=mode)
    routes = tracer.trace_all(recording, threshold=0.02)
    for position in (WINDOW + 2, T - 1):
        graph = tracer.trace(recording, position=position, threshold=0.02)
        assert len(graph.edges.layer) > 10
        assert_graph_agrees(graph, layers)
        assert_graph_agrees(routes[position], layers)


@pytest.mark.parametrize("n_tokens", [1, 2])
def test_short_texts_match_the_oracle(
    family: tuple[PreTrainedModel, list[LayerImportance]], n_tokens: int
) -> None:
    model, _ = family
    text = tiny_text(n_tokens)
    layers = [importances(layer) for layer in account(model, text)]
    tracer = Tracer(model)
    for mode in ("full", "lean"):
        for scores in tracer.contributions(tracer.record(text, mode=mode), keep=0.0):
            assert_agree(scores, layers[scores.layer])


def test_a_value_replaced_moves_its_source_alone(
    family: tuple[PreTrainedModel, list[LayerImportance]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum over keys is blind to their order: another v at one position must change the weight
    of that source, in the rows that see it, and of no other beyond the common denominator.
    """
    changed = 9
    # The closure check would see the change, rightly.
    skip_closure_check(monkeypatch)
    model, layers = family
    tracer = Tracer(model, impl="eager")
    recording = tracer.record(tiny_text(T), mode="full")

    def parts(layer: int) -> torch.Tensor:
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
        after = parts(layer)
        recording.layers[layer].v = v
        rows = (after != before).any(-1).nonzero().squeeze(1).tolist()
        seeing = (layers[layer].heads.sum(0)[:, changed] > 1e-6).nonzero().squeeze(1).tolist()
        window = recording.layers[layer].window or T
        assert set(rows) <= set(range(changed, min(T, changed + window)))
        assert set(seeing) <= set(rows)
        others = torch.arange(T + 1) != changed
        for t in rows:
            # Their weights in common units: of all but the source that was changed.
            was, now = (x[t, others] / x[t, others].sum() for x in (before, after))
            torch.testing.assert_close(now, was, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("mode", ["full", "lean"])
def test_weights_changed_after_opening_are_noticed(name: str, mode: str) -> None:
    model = tiny_model(name)
    tracer = Tracer(model)
    described = FAMILIES[name]
    layer = model.get_submodule(described.layers)[1].get_submodule(described.attention)
    with torch.no_grad():
        weight = layer.get_submodule(described.out).weight
        weight.add_(torch.randn_like(weight))
    with pytest.raises(IfrError, match="at layer 1 the parts"):
        tracer.trace_all(tracer.record(tiny_text(T), mode=mode))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Against the float64 oracle on the activations that were recorded, closure included."""
    tracer = Tracer(tiny_model(name, dtype=dtype))
    assert tracer.decoder.dtype == dtype
    for mode in ("full", "lean"):
        recording = tracer.record(tiny_text(T), mode=mode)
        for scores in tracer.contributions(recording, keep=0.0):
            with recording.replaying():
                inputs, _ = layer_inputs(recording, scores.layer, scores.rows)
            exact = reference.score_attention(inputs.to(torch.float64), 0.0)
            assert scores.residual.dtype == torch.float32
            for mine, theirs in (
                (scores.head_total, exact.head_total),
                (scores.residual, exact.residual),
            ):
                torch.testing.assert_close(mine.double(), theirs, atol=TOLERANCE, rtol=0)


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
EVERY = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_choice_of_experts_may_flip_by_rounding(name: str, seed: int) -> None:
    """It does for one row or another of the probe, in about a tenth of such models."""
    tracer = Tracer(tiny_model(name, seed=seed, dtype=torch.bfloat16))
    (step,) = tracer.generate(tiny_text(T), max_new_tokens=1, threshold=0.0)
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


class Changed(nn.Module):
    """An FFN that gives something more than the one it stands for, in all runs but the first."""

    def __init__(self, ffn: nn.Module, more: Callable[[Tensor], Tensor], n_right: int = 0) -> None:
        super().__init__()
        self.ffn, self.more, self.left = ffn, more, n_right

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        return self.ffn(x) + self.more(x) if self.left < 0 else self.ffn(x)


@EVERY
def test_a_layer_that_is_another_when_run_again_is_refused(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    layer = model.model.layers[1]
    # The plain run and two watched ones.
    layer.mlp = Changed(layer.mlp, lambda x: 0.5 * x, n_right=3)
    again = "does not give its output back"
    message = again if dtype == torch.float32 else "in float32 it gives another"
    with pytest.raises(UnsupportedArchitectureError, match=f"layer model.layers.1 .*{message}"):
        Tracer(model)


@EVERY
def test_an_ffn_that_reads_other_positions_is_refused(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    layer = model.model.layers[1]
    layer.mlp = Changed(layer.mlp, lambda x: 0.5 * x.roll(1, dims=1))
    with pytest.raises(UnsupportedArchitectureError, match="beside attention reads other pos"):
        Tracer(model)


@EVERY
@pytest.mark.parametrize("window", [6, 8, 10])
def test_attention_that_is_not_what_its_mask_says_is_refused(
    window: int, dtype: torch.dtype
) -> None:
    """Most rows of the probe are right, as they cross no window."""

    def windowed(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, *__: Any, **options: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        seen = (distance >= 0) & (distance < window)
        z = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=options["scaling"]
        )
        return z.transpose(1, 2).contiguous(), None

    AttentionInterface.register("windowed_for_a_test", windowed)
    AttentionMaskInterface.register("windowed_for_a_test", sdpa_mask)
    model = tiny_model("llama", dtype=dtype)
    model.set_attn_implementation("windowed_for_a_test")
    with pytest.raises(UnsupportedArchitectureError, match="when its attention is"):
        Tracer(model)


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_what_cannot_be_explained_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=REFUSALS[name].message) as caught:
        Tracer(tiny_model(name))
    assert str(caught.value).startswith("model: ")
    assert "\n" not in str(caught.value)


def test_the_page_lists_what_is_tested() -> None:
    """`python tests/support/tiny.py` writes the page's tables anew."""
    text = MODELS_PAGE.read_text()
    for table in model_tables():
        assert table in text
