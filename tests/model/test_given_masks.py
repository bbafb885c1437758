"""Masks that a model reads or makes itself: a tensor that hides what a causal mask hides is one, a
bias of each key is part of the weights, and a choice of keys is refused, at every use.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from opened import tiny_tracer
from oracle import assert_graph_agrees, importances
from same_graph import assert_same_bits
from tiny import FAMILIES, VOCAB, Family, account, tiny_model, tiny_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ifr_fast import Tracer, UnsupportedArchitectureError
from ifr_fast.circuits import interventions
from ifr_fast.model.interface import attention_through
from ifr_fast.model.masks import LazyMask
from ifr_fast.recording.prefill import is_chunkable
from ifr_fast.survey.sweep import sweep

CHOSEN = 14  # keys that a sparse row may read; more than the probe has
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 52,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
}


def with_larger_weights(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model.eval()


def doge() -> PreTrainedModel:
    """It adds a number for each key to its scores; its residual weights are 1, as made."""
    torch.manual_seed(0)
    config = transformers.DogeConfig(**SIZES, keep_window_size=CHOSEN)
    model = with_larger_weights(AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.copy_(torch.tensor([0.7, -0.9]))
    return model


def deepseek() -> PreTrainedModel:
    config = FAMILIES["deepseek_v32"].config()
    config.index_topk = CHOSEN
    torch.manual_seed(0)
    model = with_larger_weights(AutoModelForCausalLM.from_config(config))
    model.tiny_family = "deepseek_v32"
    return model


def gpt_neo() -> PreTrainedModel:
    """Its attention is its own; one row does not read one key of the past."""
    model = copy.deepcopy(tiny_model("gpt_neo"))
    model.transformer.h[0].attn.attention.bias[..., CHOSEN, 5] = False
    return model


@pytest.fixture(autouse=True)
def known_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "doge", Family("", "", lambda: None))


@pytest.mark.parametrize("make", [doge, deepseek])
@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize("n_tokens", [3, CHOSEN])
def test_masks_of_the_model_that_choose_all_keys(make: Any, mode: str, n_tokens: int) -> None:
    model, text = make(), tiny_text(n_tokens)
    tracer = Tracer(model)
    layers = [importances(layer) for layer in account(model, text)]
    recording = tracer.record(text, mode=mode)
    assert_graph_agrees(tracer.trace(recording, threshold=0.02), layers)
    for graph in tracer.trace_all(recording, threshold=0.02):
        assert_graph_agrees(graph, layers)
    for graph in tracer.trace([text, text[:-1]], threshold=0.02)[:1]:
        assert_graph_agrees(graph, layers)


@pytest.mark.parametrize("make", [doge, deepseek])
def test_generation_with_masks_of_the_model(make: Any) -> None:
    model, text = make(), tiny_text(CHOSEN - 3)
    for step in Tracer(model).generate(text, max_new_tokens=3, threshold=0.02, eos_token_id=[]):
        assert_graph_agrees(step.graph, [importances(layer) for layer in account(model, text)])
        text = torch.cat([text, torch.tensor([step.token_id])])


@pytest.mark.parametrize("make", [doge, deepseek, gpt_neo])
def test_a_choice_of_keys_is_refused_at_every_use(make: Any) -> None:
    tracer, text = Tracer(make()), tiny_text(CHOSEN + 1)
    tracer.trace(text[:-1])
    assert not is_chunkable(tracer.decoder)
    for use in (
        lambda: tracer.trace(text),
        lambda: tracer.trace_all(text),
        lambda: tracer.record(text, mode="lean"),
        lambda: tracer.trace([text, text[:3]]),
        lambda: sweep(tracer.decoder, [tiny_text(CHOSEN + 2)], 0.02, tracer.kernel),
        lambda: list(tracer.generate(text[:-1], max_new_tokens=2, eos_token_id=[])),
        lambda: interventions.run(tracer.decoder, [text]),
    ):
        with pytest.raises(UnsupportedArchitectureError, match=r"keys that a row reads|other keys"):
            use()


class Attention(nn.Module):
    """Llama's attention, which calls the attention function in a way of its own."""

    def __init__(self, own: nn.Module, call: Any) -> None:
        super().__init__()
        self.own, self.call, self.config = own, call, own.config
        self.num_key_value_groups, self.is_causal = own.num_key_value_groups, True

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.own.head_dim)
        projections = (self.own.q_proj, self.own.k_proj, self.own.v_proj)
        q, k, v = (proj(hidden_states).view(shape).transpose(1, 2) for proj in projections)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        z = self.call(self, attend, q, k, v, attention_mask)[0]
        return self.own.o_proj(z.reshape(*hidden_states.shape[:-1], -1)), None


def llama(call: Any) -> PreTrainedModel:
    model = copy.deepcopy(tiny_model("llama"))
    for layer in model.model.layers:
        layer.self_attn = Attention(layer.self_attn, call)
    return model


def wholly_by_keyword(module: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
    return attend(
        module=module, query=q, key=k, value=v, attention_mask=mask, scaling=module.own.scaling
    )


def scaled_by_a_tensor(module: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
    return attend(module, q, k, v, mask, scaling=torch.tensor(module.own.scaling))


def read_and_passed_on(module: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
    if mask is not None:
        mask = mask[:, :, :, : k.shape[-2]].to(q.device).contiguous()
        assert mask.ndim == 4
        assert mask.dtype == torch.bool
    return attend(module, q, k, v, mask, scaling=module.own.scaling)


def made_a_tensor(module: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
    mask = None if mask is None else mask & torch.ones_like(mask)
    return attend(module, q, k, v, mask, scaling=module.own.scaling)


def made_a_bias(module: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    return attend(module, q, k, v, mask, scaling=module.own.scaling)


@pytest.mark.parametrize(
    "call",
    [wholly_by_keyword, scaled_by_a_tensor, read_and_passed_on, made_a_tensor, made_a_bias],
)
def test_ways_to_call_the_attention_function(call: Any) -> None:
    text, expected = tiny_text(23), tiny_tracer("llama")
    tracer = Tracer(llama(call))
    assert tracer.decoder.makes_masks == (call in (made_a_tensor, made_a_bias))
    for mode in ("full", "lean"):
        assert_same_bits(
            tracer.trace(tracer.record(text, mode=mode), threshold=0.02),
            expected.trace(expected.record(text, mode=mode), threshold=0.02),
        )


SCALES = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])[:, None, None]


def scaled_by_head(module: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
    if attend.__module__.startswith("ifr_fast"):
        return attend(module, q, k, v, mask, scaling=SCALES)
    return attend(module, q * SCALES, k, v, mask, scaling=1.0)


def test_a_scale_of_each_head() -> None:
    """The oracle's model has the scales in its queries."""
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.q_proj.weight
            weight.view(6, -1, weight.shape[-1]).mul_(SCALES / layer.self_attn.scaling)
    layers = [importances(layer) for layer in account(model, tiny_text(23))]
    tracer = Tracer(llama(scaled_by_head))
    for mode in ("full", "lean"):
        recording = tracer.record(tiny_text(23), mode=mode)
        assert_graph_agrees(tracer.trace(recording, threshold=0.02), layers)


def scaled_by_key(module: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
    return attend(module, q, k, v, mask, scaling=torch.ones(k.shape[2]))


def biased_by_pair(module: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
    if isinstance(mask, Tensor):
        positions = torch.arange(k.shape[2], dtype=q.dtype)
        bias = -(positions[:, None] - positions).abs()
        mask = bias.masked_fill(~mask, torch.finfo(q.dtype).min)
    return attend(module, q, k, v, mask, scaling=module.own.scaling)


def without_a_mask(module: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
    return attend(module, q, k, v, None, scaling=module.own.scaling)


def with_a_mask_of_two_dims(
    module: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any
) -> Any:
    return attend(module, q, k, v, mask[0, 0].clone() & True, scaling=module.own.scaling)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (scaled_by_key, "scales its scores by a tensor that differs between keys"),
        (biased_by_pair, "a bias that is not one number for each key"),
        (without_a_mask, "got None as its mask"),
        (with_a_mask_of_two_dims, r"a mask of shape \(11, 11\)"),
    ],
)
def test_ways_that_are_refused(call: Any, message: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=message):
        Tracer(llama(call))


@pytest.mark.parametrize(("make", "dtype"), [(sdpa_mask, torch.bool), (eager_mask, torch.float16)])
def test_a_mask_stands_for_the_tensor_that_the_model_would_have(
    make: Any, dtype: torch.dtype
) -> None:
    expected = make(
        batch_size=1,
        q_length=7,
        kv_length=7,
        mask_function=causal_mask_function,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    mask = LazyMask(causal_mask_function, torch.device("cpu"), None, (7, 7), dtype)
    assert (mask.shape, mask.dtype) == (expected.shape, expected.dtype)
    for same in (mask[..., :7], mask[:, :, :, :9], mask.to("cpu"), mask.clone(), mask.detach()):
        assert isinstance(same, LazyMask)
    for read in (
        lambda x: x + 0,
        lambda x: x[:, 0, 2:],
        lambda x: x.mT,
        lambda x: torch.cat([x, x], -1),
        lambda x: torch.where(x < 0, x, 1),
        lambda x: x.expand(2, 3, 7, 7),
    ):
        got = read(mask)
        assert type(got) is Tensor
        assert torch.equal(got, read(expected))
    rows = torch.tensor([1, 4, 6])
    assert torch.equal(mask.among(rows) + 0, expected[:, :, rows][..., rows])
    assert mask.among(rows).among(torch.tensor([0, 2])).whole is mask


def paligemma(language_model: str, **options: Any) -> PreTrainedModel:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 36,
    }
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": language_model, "head_dim": 6, **SIZES},
        vision_config=vision,
        projection_dim=36,
        image_token_index=VOCAB - 1,
    )
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration._from_config(config, **options)
    with_larger_weights(model.model.language_model)
    return model.eval()


def test_a_language_model_within_another_that_makes_its_masks() -> None:
    whole = paligemma("gemma", attn_implementation="eager")
    config = copy.deepcopy(whole.config.text_config)
    config.use_bidirectional_attention = False
    alone = AutoModelForCausalLM.from_config(config)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    text = tiny_text(23).clamp(max=VOCAB - 2)
    layers = [importances(layer) for layer in account(alone, text)]
    assert_graph_agrees(Tracer(whole).trace(text, threshold=0.02), layers)
    # Where it is given no mask, as with sdpa, its attention is not causal.
    with pytest.raises(UnsupportedArchitectureError, match="gives other states"):
        Tracer(paligemma("gemma", attn_implementation="sdpa"))


def test_nested_models_keep_their_own_attention_functions() -> None:
    model = paligemma("gemma2")
    modules = [x for x in model.modules() if isinstance(x, PreTrainedModel)]
    before = [x.config._attn_implementation for x in modules]
    assert len(set(before)) > 1
    for _ in range(2):
        with attention_through(model, lambda call: call.v):
            assert {x.config._attn_implementation for x in modules} == {"ifr_fast"}
        assert [x.config._attn_implementation for x in modules] == before
