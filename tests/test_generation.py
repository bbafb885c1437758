"""Generation against whole passes over the same text, step by step."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import assert_graph_agrees, importances
from same_graph import assert_same_graph
from tiny import FAMILIES, VOCAB, account, tiny_model, tiny_text
from transformers import LlamaConfig, LlamaForCausalLM

import ifr_fast.generation.generation as module
from ifr_fast import Tracer, UnsupportedArchitectureError
from ifr_fast.generation import decoding
from ifr_fast.generation.steps import GenerationStep
from ifr_fast.model.pretrained import load
from ifr_fast.scoring import layer as scoring_layer

PROMPT = 5  # shorter than the window, which is crossed on the way
NEW = 9
OPTIONS = {"max_new_tokens": NEW, "threshold": 0.02, "eos_token_id": []}


def whole(prompt: torch.Tensor, steps: list[GenerationStep]) -> torch.Tensor:
    return torch.cat([prompt, torch.tensor([step.token_id for step in steps])])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_routes_match_the_models_own_account(family):
    model = tiny_model(family).eval()
    prompt = tiny_text(PROMPT)
    steps = list(Tracer(model).generate(prompt, **OPTIONS))
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
    for i in (0, 2, NEW - 1):
        layers = [importances(layer) for layer in account(model, text[: PROMPT + i])]
        assert_graph_agrees(steps[i].graph, layers)


@pytest.mark.parametrize("granularity", ["token", "head"])
@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral", "gemma2", "gpt_neo"])
def test_routes_are_those_of_fresh_traces(family, mode, granularity, monkeypatch):
    monkeypatch.setattr(module, "_ROOM", 2)  # the store has to grow
    tracer = Tracer(tiny_model(family))
    prompt = tiny_text(PROMPT)
    options = OPTIONS | {"granularity": granularity}
    steps = list(tracer.generate(tracer.record(prompt, mode=mode), **options))
    assert len(steps) == NEW
    for step in steps:
        fresh = tracer.trace(step.graph.token_ids, threshold=0.02, granularity=granularity)
        assert_same_graph(step.graph, fresh, tolerance=1e-5)


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "gemma2", "bloom", "gpt_oss", "gpt_neox", "qwen3_next", "deepseek_v3"],
)
def test_other_kernels_have_a_store_of_their_own(family, monkeypatch):
    monkeypatch.setattr(module, "_ROOM", 2)
    tracer = Tracer(tiny_model(family), impl="eager")
    for step in tracer.generate(tiny_text(PROMPT), **OPTIONS):
        fresh = tracer.trace(step.graph.token_ids, threshold=0.02)
        assert_same_graph(step.graph, fresh, tolerance=1e-5)


@pytest.mark.parametrize("impl", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, impl):
    model = tiny_model("llama", dtype=dtype)
    tracer = Tracer(model, impl=impl)
    steps = list(tracer.generate(tiny_text(PROMPT), **OPTIONS))
    with torch.no_grad():
        best = model(whole(tiny_text(PROMPT), steps)[None]).logits[0].float().softmax(-1)
    for position, step in enumerate(steps, PROMPT - 1):
        assert step.probability == pytest.approx(float(best[position, step.token_id]), abs=0.02)
        fresh = tracer.trace(step.graph.token_ids, threshold=0.02)
        assert_same_graph(step.graph, fresh, tolerance=2e-2)


def test_a_store_that_grew_leaves_nothing_of_the_old_one():
    tracer = Tracer(tiny_model("mistral"))
    recording = tracer.record(tiny_text(PROMPT), mode="lean")
    generation = module.Generation(tracer._recorder, tracer.kernel, recording, 0.02, "token", 2)
    for token_id in range(4):
        generation.append(token_id)
    layers = generation._decoding._layers
    for layer, mine, theirs in zip(
        layers, generation._decoding.recorded, recording.layers, strict=True
    ):
        assert len(layer.k) > PROMPT + 2
        assert torch.equal(mine.k, theirs.k)
        assert torch.equal(mine.v, theirs.v)
        assert mine.k.untyped_storage().data_ptr() == layer.k.untyped_storage().data_ptr()
        assert mine.v.untyped_storage().data_ptr() == layer.v.untyped_storage().data_ptr()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_next", "gpt_neo"])
def test_an_interrupted_step_leaves_the_model_as_it_was(family):
    model = tiny_model(family).train()
    tracer = Tracer(model)
    expected = list(tracer.generate(tiny_text(PROMPT), **OPTIONS))
    before = model.config._attn_implementation
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    def interrupt(*_):
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


def test_every_node_is_scored_once_and_no_text_run_twice(monkeypatch):
    tracer = Tracer(tiny_model("llama"))
    list(tracer.generate(tiny_text(3), max_new_tokens=1))  # the check that precedes the first
    scored: list[tuple[int, int]] = []
    runs: list[int] = []
    of_rows, of_step = scoring_layer.score_rows, decoding._Layer.score
    forward = tracer.model.model.forward

    def counting(block, inputs, *args):
        scored.extend((block.layer, row) for row in inputs.rows.tolist())
        return of_rows(block, inputs, *args)

    def counting_new(layer, keep):
        scored.append((layer.block.layer, layer.n_keys - 1))
        return of_step(layer, keep)

    def running(input_ids, **kwargs):
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
def test_the_model_is_as_it_was_between_tokens(family):
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
    for mine, theirs in zip(other, again, strict=True):  # in turn, with the same model
        assert mine.token_id == theirs.token_id


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_routes_across_a_rotary_switch(kind):
    """Every key changes where the frequencies do."""
    of_kind = {"factor": 4.0, "rope_theta": 100.0}
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
    tracer.decoder.max_length = None  # where it is stretched, the context is no limit
    for step in tracer.generate(tiny_text(PROMPT), **OPTIONS):
        fresh = tracer.trace(step.graph.token_ids, threshold=0.02)
        assert_same_graph(step.graph, fresh, tolerance=1e-5)
        assert fresh.predictions[0].token_id == step.token_id


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 7}, {"temperature": 1.7, "top_p": 0.8}]
)
def test_sampling_is_that_of_transformers(options):
    model = tiny_model("llama").eval()
    tracer = Tracer(model)
    prompt = tiny_text(PROMPT)
    theirs = {"top_k": 0, **options}

    def seeded(seed: int, **more) -> torch.Tensor:
        torch.manual_seed(seed)
        return whole(prompt, list(tracer.generate(prompt, do_sample=True, **OPTIONS, **options)))

    list(tracer.generate(prompt, max_new_tokens=1))
    torch.manual_seed(3)
    with torch.no_grad():
        expected = model.generate(
            prompt[None], attention_mask=torch.ones(1, PROMPT, dtype=torch.long), do_sample=True,
            max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, **theirs,
        )[0]  # fmt: skip
    assert torch.equal(seeded(3), expected)
    assert any(not torch.equal(seeded(s), expected) for s in range(4, 8))
    mine = [
        whole(
            prompt,
            list(
                tracer.generate(
                    prompt, do_sample=True, generator=torch.Generator().manual_seed(5),
                    **OPTIONS, **options,
                )
            ),
        )
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(*mine)


def test_it_ends_with_eos_and_with_the_context():
    model = tiny_model("llama")
    tracer = Tracer(model)
    prompt = tiny_text(PROMPT)
    ids = [step.token_id for step in tracer.generate(prompt, **OPTIONS)]
    end = next(t for t in ids[2:] if t not in ids[:2])
    for eos in (end, [end, VOCAB + 1]):
        got = [s.token_id for s in tracer.generate(prompt, **OPTIONS | {"eos_token_id": eos})]
        assert got == ids[: ids.index(end) + 1]
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, end
    got = [s.token_id for s in tracer.generate(prompt, max_new_tokens=NEW)]
    model.generation_config.eos_token_id = before
    assert got == ids[: ids.index(end) + 1]

    limit = tracer.decoder.max_length
    steps = list(tracer.generate(tiny_text(limit - 2), **OPTIONS))
    assert len(steps) == 3  # the last is predicted after the last position
    assert steps[-1].graph.position == limit - 1


def test_a_processor_sees_what_was_generated():
    tracer = Tracer(tiny_model("llama"))

    def never_again(token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, token_ids[0], float("-inf"))

    steps = list(tracer.generate(tiny_text(PROMPT), logits_processor=[never_again], **OPTIONS))
    text = whole(tiny_text(PROMPT), steps).tolist()
    assert len(set(text)) == len(set(text[:PROMPT])) + NEW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_models_that_cannot_take_one_token_are_refused(monkeypatch, name, dtype):
    tracer = Tracer(tiny_model(name, dtype=dtype))
    monkeypatch.setattr(tracer.decoder, "_takes_positions", False)
    with pytest.raises(UnsupportedArchitectureError, match="cannot generate"):
        next(tracer.generate(tiny_text(PROMPT)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"threshold": 2}, "threshold"),
        ({"granularity": "both"}, "granularity"),
        ({"temperature": 0.5}, "do_sample"),
        ({"do_sample": True, "temperature": 0}, "temperature"),
        ({"do_sample": True, "top_k": 0}, "top_k"),
        ({"do_sample": True, "top_p": 0}, "top_p"),
        ({"do_sample": True, "top_p": 1.1}, "top_p"),
    ],
)
def test_bad_options_are_refused_at_once(options, words):
    with pytest.raises(ValueError, match=words):
        Tracer(tiny_model("llama")).generate(tiny_text(4), **options)


@pytest.mark.parametrize("prompt", [[], "text", [VOCAB], None])
def test_bad_prompts_are_refused_at_once(prompt):
    with pytest.raises(ValueError, match="text"):
        Tracer(tiny_model("llama")).generate(prompt)


@pytest.mark.default_model
def test_the_default_model_generates_with_routes():
    model, tokenizer = load()
    tracer = Tracer(model, tokenizer)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    steps = list(itertools.islice(tracer.generate(messages, max_new_tokens=12), 12))
    assert "Paris" in "".join(step.token for step in steps)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        expected = model.generate(**ids, max_new_tokens=12, do_sample=False)[0]
    assert [s.token_id for s in steps] == expected[ids["input_ids"].shape[1] :].tolist()
    for step in (steps[0], steps[4], steps[-1]):
        fresh = tracer.trace(step.graph.token_ids, threshold=0.04)
        near = (fresh.edges.weight - 0.04).abs().min()
        assert near > 1e-5
        assert_same_graph(step.graph, fresh, tolerance=1e-5)
