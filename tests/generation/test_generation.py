"""Generation against whole passes over the same text, step by step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from generating import NEW, OPTIONS, PROMPT, whole
from opened import tiny_tracer
from oracle import assert_graph_agrees, importances
from same_graph import assert_same_graph
from tiny import FAMILIES, VOCAB, account, tiny_model, tiny_text
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ifr_fast.generation.generation as module
from ifr_fast import Tracer, UnsupportedArchitectureError
from ifr_fast.generation import decoding
from ifr_fast.graph.tables import Granularity
from ifr_fast.model.block import Block
from ifr_fast.recording.layer_inputs import LayerRows
from ifr_fast.scoring import layer as scoring_layer


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_routes_match_the_models_own_run(family: str) -> None:
    tracer, prompt = tiny_tracer(family), tiny_text(PROMPT)
    model = tracer.model
    steps = list(tracer.generate(prompt, **OPTIONS))
    text = whole(prompt, steps)
    with torch.no_grad():
        expected = model.generate(
            prompt[None], attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
            max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        best = model(text[None]).logits[0].softmax(-1)
    assert torch.equal(text, expected[0])
    for i, step in enumerate(steps):
        position = PROMPT - 1 + i
        assert step.graph.position == position
        assert torch.equal(step.graph.token_ids, text[: position + 1])
        assert len(step.graph.tokens) == position + 1
        assert step.graph.predictions[0].token_id == step.token_id
        assert step.probability == pytest.approx(float(best[position, step.token_id]), abs=1e-5)
    # Later tokens change nothing of earlier rows, so one run of the whole text has them all.
    layers = [importances(layer) for layer in account(model, text[:-1])]
    for i in (0, 2, NEW - 1):
        assert_graph_agrees(steps[i].graph, layers)


def test_positions_that_are_counted_by_a_cache() -> None:
    """BART's positions begin where its cache ends. The steps' cache says so and holds nothing."""
    tracer = Tracer(tiny_model("bart"))
    assert not tracer.decoder.counts_past
    list(tracer.generate(tiny_text(PROMPT), **OPTIONS))
    assert tracer.decoder.counts_past
    plain = tiny_tracer("llama")
    list(plain.generate(tiny_text(PROMPT), **OPTIONS))
    assert not plain.decoder.counts_past


def test_positions_that_a_step_cannot_be_given_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer(tiny_model("bart"))
    monkeypatch.setattr("ifr_fast.model.decoder._Past.get_seq_length", lambda _: 0)
    with pytest.raises(UnsupportedArchitectureError, match="BartForCausalLM cannot generate here"):
        next(tracer.generate(tiny_text(PROMPT), **OPTIONS))
    assert not tracer.decoder.counts_past


@pytest.mark.parametrize(
    ("family", "mode", "granularity"),
    [
        *itertools.product(["llama"], ["full", "lean"], ["token", "head"]),
        *((f, "full", "token") for f in ("gpt_neox", "mistral", "gemma2", "gpt_neo")),
        *((f, "lean", "head") for f in ("gpt_neox", "mistral", "gemma2", "gpt_neo")),
    ],
)
def test_routes_are_those_of_fresh_traces(
    family: str, mode: str, granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROOM", 2)  # the store has to grow
    tracer, prompt = tiny_tracer(family), tiny_text(PROMPT)
    options = OPTIONS | {"granularity": granularity}
    steps = list(tracer.generate(tracer.record(prompt, mode=mode), **options))
    assert len(steps) == NEW
    for step in steps:
        fresh = tracer.trace(step.graph.token_ids, threshold=0.02, granularity=granularity)
        assert_same_graph(step.graph, fresh, tolerance=1e-5)


@pytest.mark.parametrize("impl", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, impl: str) -> None:
    tracer = tiny_tracer("llama", dtype, impl)
    model = tracer.model
    steps = list(tracer.generate(tiny_text(PROMPT), **OPTIONS))
    with torch.no_grad():
        best = model(whole(tiny_text(PROMPT), steps)[None]).logits[0].float().softmax(-1)
    for position, step in enumerate(steps, PROMPT - 1):
        assert step.probability == pytest.approx(float(best[position, step.token_id]), abs=0.02)
        fresh = tracer.trace(step.graph.token_ids, threshold=0.02)
        assert_same_graph(step.graph, fresh, tolerance=2e-2)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_next", "gpt_neo"])
def test_an_interrupted_step_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny_model(family).train()
    tracer = Tracer(model)
    expected = list(tracer.generate(tiny_text(PROMPT), **OPTIONS))
    before = model.config._attn_implementation
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    steps = tracer.generate(tiny_text(PROMPT), **OPTIONS)
    next(steps)
    handle = tracer.decoder.blocks[1].module.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    handle.remove()
    assert next(steps, None) is None
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(m.training for m in model.modules())
    assert model.config._attn_implementation == before
    for mine, theirs in zip(tracer.generate(tiny_text(PROMPT), **OPTIONS), expected, strict=True):
        assert mine.token_id == theirs.token_id
        assert_same_graph(mine.graph, theirs.graph, tolerance=0.0)


def test_every_node_is_scored_once_and_no_text_run_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracer = Tracer(tiny_model("llama"))
    list(tracer.generate(tiny_text(3), max_new_tokens=1))  # the check that precedes the first
    scored: list[tuple[int, int]] = []
    runs: list[int] = []
    of_rows, of_step = scoring_layer.score_rows, decoding._Layer.score
    forward = tracer.model.model.forward

    def counting(block: Block, rows: LayerRows, *args: Any) -> Any:
        scored.extend((block.layer, row) for row in rows.inputs.rows.tolist())
        return of_rows(block, rows, *args)

    def counting_new(layer: Any, keep: float) -> None:
        scored.append((layer.block.layer, layer.n_keys - 1))
        return of_step(layer, keep)

    def running(input_ids: Tensor, **kwargs: Any) -> Any:
        runs.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(scoring_layer, "score_rows", counting)
    monkeypatch.setattr(decoding._Layer, "score", counting_new)
    monkeypatch.setattr(tracer.model.model, "forward", running)
    list(tracer.generate(tiny_text(20), **OPTIONS))
    assert runs == [20] + [1] * (NEW - 1)
    assert len(scored) == len(set(scored))
    new = [(layer, row) for layer, row in scored if row >= 20]
    assert len(new) == tracer.decoder.n_layers * (NEW - 1)


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_the_model_is_as_it_was_between_tokens(family: str) -> None:
    model = tiny_model(family).train()
    tracer = Tracer(model)
    before = model.config._attn_implementation
    model.eval()
    with torch.no_grad():
        expected = model(tiny_text(6)[None]).logits
    model.train()
    steps = tracer.generate(tiny_text(PROMPT), **OPTIONS)
    for _ in range(3):
        next(steps)
        assert model.config._attn_implementation == before
        assert model.training
        assert all(layer.training for layer in model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not torch.is_inference_mode_enabled()
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(tiny_text(6)[None]).logits, expected)
        model.train()
    steps.close()
    other = tracer.generate(tiny_text(PROMPT), **OPTIONS)
    again = tracer.generate(tiny_text(PROMPT), **OPTIONS)
    for mine, theirs in zip(other, again, strict=True):  # their steps alternate
        assert mine.token_id == theirs.token_id


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_routes_across_a_rotary_switch(kind: str) -> None:
    """All keys change when the frequencies change."""
    of_kind: dict[str, Any] = {"factor": 4.0, "rope_theta": 100.0}
    if kind == "longrope":
        of_kind |= {"short_factor": [1.0] * 3, "long_factor": [3.0] * 3}
        of_kind["original_max_position_embeddings"] = 8
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=50,
        max_position_embeddings=8 if kind == "dynamic" else 64,
        rope_parameters={"rope_type": kind, **of_kind},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4 if parameter.ndim > 1 else 1
    tracer = Tracer(model)
    tracer.decoder.max_length = None  # a stretched context is no limit
    for step in tracer.generate(tiny_text(PROMPT), **OPTIONS):
        fresh = tracer.trace(step.graph.token_ids, threshold=0.02)
        assert_same_graph(step.graph, fresh, tolerance=1e-5)
        assert fresh.predictions[0].token_id == step.token_id


@pytest.mark.default_model
def test_the_default_model_generates_with_routes(smol: Tracer) -> None:
    model, tokenizer, n = smol.model, smol.tokenizer, 8
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    steps = list(itertools.islice(smol.generate(messages, max_new_tokens=n), n))
    assert "Paris" in "".join(step.token for step in steps)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        expected = model.generate(**ids, max_new_tokens=n, do_sample=False)[0]
    assert [s.token_id for s in steps] == expected[ids["input_ids"].shape[1] :].tolist()
    for step in (steps[0], steps[4], steps[-1]):
        fresh = smol.trace(step.graph.token_ids, threshold=0.04)
        near = (fresh.edges.weight - 0.04).abs().min()
        assert near > 1e-5
        assert_same_graph(step.graph, fresh, tolerance=1e-5)
