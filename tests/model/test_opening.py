"""Models as they are opened: their blocks, and the models that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from definition import importances_by_definition
from opened import tiny_tracer
from refusals import assert_refused, attend, feed, llama_with
from tiny import VOCAB, tiny_model, tiny_text
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    RobertaConfig,
    RoFormerConfig,
    RoFormerForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention

from ifr_fast import Tracer, UnsupportedArchitectureError
from ifr_fast.survey.sweep import sweep

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "sites"),
    {
        "llama": ("model.layers.{}", "self_attn", "post_attention_layernorm"),
        "mistral": ("model.layers.{}", "self_attn", "post_attention_layernorm"),
        "gpt2": ("transformer.h.{}", "attn", "ln_2"),
        "gpt_neox": ("gpt_neox.layers.{}", "attention", None),
        "gpt_neox-sequential": (
            "gpt_neox.layers.{}",
            "attention",
            "post_attention_layernorm",
        ),
    }.items(),
)
def test_blocks_and_where_their_parts_are(family: str, sites: tuple[str, str, str | None]) -> None:
    tracer = tiny_tracer(family)
    model, blocks = tracer.model, tracer.decoder.blocks
    path, attention, mid = sites
    assert [block.layer for block in blocks] == [0, 1, 2]
    for i, block in enumerate(blocks):
        assert block.name == path.format(i)
        assert block.module is model.get_submodule(block.name)
        assert block.attention is getattr(block.module, attention)
        assert block.parallel == (mid is None)
        assert block.mid_site is (None if mid is None else getattr(block.module, mid))


def test_encoders_are_refused() -> None:
    torch.manual_seed(0)
    config = BertConfig(**SHAPE, intermediate_size=40)
    assert_refused(BertLMHeadModel(config), "reads later positions")
    config = RoFormerConfig(**SHAPE, intermediate_size=40)  # its attention is its own
    assert_refused(RoFormerForCausalLM(config), "RoFormerSelfAttention reads later positions")
    config = BertConfig(**SHAPE, intermediate_size=40)
    assert_refused(BertModel(config), "BertModel", "causal language model")


def test_what_a_model_raises_is_named() -> None:
    def always(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
        raise KeyError("codes")

    def watched(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
        if layer.self_attn.config._attn_implementation == "ifr_fast":
            raise RuntimeError("not like this\nsecond line")
        return x + attend(layer, x, kwargs)

    assert_refused(llama_with(always), "cannot be run on token ids alone (KeyError: 'codes')")
    said = "cannot be run while its attention is watched (RuntimeError: not like this)"
    assert_refused(llama_with(watched), said)


def test_layers_run_twice_and_layers_that_attend_twice_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)
    assert_refused(model, "layer model.layers.0 is run 3 times")

    def twice(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
        return x + attend(layer, x, kwargs) + attend(layer, x / 2, kwargs)

    model = llama_with(twice)
    model.model.layers = model.model.layers[1:2]
    assert_refused(model, "layer model.layers.0 computes 2 softmax attentions", "LlamaAttention")


def test_encoder_decoders_are_refused() -> None:
    config = T5Config(vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4)
    assert_refused(T5ForConditionalGeneration(config), "T5ForConditionalGeneration", "decoder")


def test_attention_that_is_called_twice_is_refused() -> None:
    def twice(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
        mid = x + attend(layer, x, kwargs) + attend(layer, 2 * x, kwargs)
        return mid + feed(layer, mid)

    assert_refused(llama_with(twice), "3 layers", "4 calls")


def test_layers_of_different_head_counts_are_refused() -> None:
    model = tiny_model("llama")
    config = copy.deepcopy(model.config)
    config.num_attention_heads, config.head_dim = 4, 6
    model.model.layers[1].self_attn = attention = LlamaAttention(config, layer_idx=1)
    attention.config = model.config  # its attention function is set through this
    assert_refused(model, "different numbers of heads: 6, 4, 6")


def test_a_layer_without_attention_reads_no_other_position() -> None:
    def none(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
        return x + feed(layer, x)

    model, text = llama_with(none), tiny_text(17)
    tracer = Tracer(model)
    (unmixed,) = [block.layer for block in tracer.decoder.blocks if block.unmixed]
    expected = importances_by_definition(model, text)
    for mode in ("full", "lean"):
        for scores in tracer.contributions(tracer.record(text, mode=mode), keep=0.0):
            of = expected[scores.layer]
            torch.testing.assert_close(scores.residual.double(), of.residual, rtol=0, atol=1e-5)
            torch.testing.assert_close(scores.ffn.double(), of.ffn, rtol=0, atol=1e-5)
            if scores.layer == unmixed:
                assert bool((scores.residual == 1).all())
                assert not scores.head_total.any()


def test_a_layer_that_mixes_without_attention_is_refused() -> None:
    def shifted(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
        return x + feed(layer, x.roll(1, 1))

    assert_refused(llama_with(shifted), "3 layers", "2 calls")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[7] = value
    with pytest.raises(ValueError, match=rf"model: parameter {name} holds NaN"):
        Tracer(model)


@pytest.mark.parametrize("model", [None, "gpt2", object(), nn.Linear(3, 3), nn.Identity()])
def test_other_objects_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=f"model: expected .*, got {type(model).__name__}"):
        Tracer(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [6, 8, 10])
def test_attention_that_is_not_what_its_mask_says_is_refused(
    window: int, dtype: torch.dtype
) -> None:
    """Most rows of the probe cross no window, so they are right."""

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


@pytest.mark.parametrize("pad", [0, 1, 5])
def test_positions_that_padding_does_not_count_in(pad: int) -> None:
    """RoBERTa's positions begin behind its padding token's number, and padding has none."""
    torch.manual_seed(0)
    config = RobertaConfig(**SHAPE, intermediate_size=40, is_decoder=True, pad_token_id=pad)
    tracer = Tracer(AutoModelForCausalLM.from_config(config))
    context = config.max_position_embeddings - pad - 1
    assert tracer.decoder.max_length == context
    text = tiny_text(context)
    text[text == pad] = pad + 1
    tracer.trace(text)
    assert len(list(tracer.generate(text[:-2], max_new_tokens=9, eos_token_id=[]))) == 3
    with pytest.raises(ValueError, match=f"the model's context holds {context}"):
        tracer.trace(torch.cat([text, text[:1]]))
    text[3] = pad
    for use in (
        lambda: tracer.trace(text),
        lambda: tracer.trace([text, text[:5]]),
        lambda: sweep(tracer.decoder, [text], 0.02, tracer.kernel),
        lambda: next(tracer.generate(text[:9], max_new_tokens=2)),
    ):
        with pytest.raises(ValueError, match=f"holds token {pad}, the padding of Roberta"):
            use()


def test_padding_that_is_a_token_like_others() -> None:
    for family in ("llama", "gpt2", "bart", "opt"):
        tracer = tiny_tracer(family)
        assert tracer.decoder.counted_padding is None
        assert tracer.decoder.max_length == 96
