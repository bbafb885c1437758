"""Opening models, recording texts, and what a Tracer takes: values where it is right, and a clear
refusal where it cannot be shown to be.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import TOLERANCE, assert_graph_agrees, importances
from tiny import CONFIGS, VOCAB, account, tiny_model, tiny_text
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    GraniteConfig,
    OPTConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaAttention

import ifr_fast.recording.plan
from ifr_fast import (
    IfrError,
    MemoryBudgetError,
    RouteGraph,
    Tracer,
    UnsupportedArchitectureError,
)
from ifr_fast.kernels import reference
from ifr_fast.model.opening import open_decoder
from ifr_fast.recording.layer_inputs import layer_inputs

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def llama() -> Tracer:
    """Shared by tests that change nothing of it."""
    return Tracer(tiny_model("llama"))


def output_projection(model: PreTrainedModel, layer: int) -> Tensor:
    """The weight of a layer's output projection as [H * V, D]."""
    match model.config.model_type:
        case "gpt2":
            return model.transformer.h[layer].attn.c_proj.weight
        case "gpt_neox":
            return model.gpt_neox.layers[layer].attention.dense.weight.T
        case _:
            return model.model.layers[layer].self_attn.o_proj.weight.T


def assert_same_tables(got: RouteGraph, expected: RouteGraph) -> None:
    for mine, theirs in zip(
        (*got.edges, *got.head_edges), (*expected.edges, *expected.head_edges), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert got.predictions == expected.predictions


# What opening finds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_probed_output_map_is_the_modules_own_weight(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    decoder = open_decoder(model)
    assert decoder.n_layers == 3
    assert decoder.dtype == dtype
    for block in decoder.blocks:
        H, V, D = block.W_O.shape
        assert (H, D) == (6, 36)
        assert torch.equal(block.W_O.reshape(H * V, D), output_projection(model, block.layer))


def test_an_adapter_on_the_output_projection_is_part_of_the_map() -> None:
    class LowRank(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.down = nn.Linear(base.in_features, 3, bias=False)
            self.up = nn.Linear(3, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 0.5 * self.up(self.down(x))

    model = tiny_model("llama")
    layer = model.model.layers[1].self_attn
    layer.o_proj = LowRank(layer.o_proj)
    adapter = layer.o_proj
    expected = (adapter.base.weight + 0.5 * adapter.up.weight @ adapter.down.weight).T
    found = open_decoder(model).blocks[1].W_O.reshape(-1, 36)
    assert not torch.allclose(found, adapter.base.weight.T, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_residual_multiplier_is_part_of_the_map() -> None:
    torch.manual_seed(0)
    config = GraniteConfig(**SHAPE, intermediate_size=40, residual_multiplier=0.3)
    model = AutoModelForCausalLM.from_config(config)
    for block in open_decoder(model).blocks:
        expected = 0.3 * block.attention.o_proj.weight.T
        torch.testing.assert_close(block.W_O.reshape(-1, 24), expected, atol=1e-6, rtol=1e-6)


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
    model = tiny_model(family)
    path, attention, mid = sites
    blocks = open_decoder(model).blocks
    assert [block.layer for block in blocks] == [0, 1, 2]
    for i, block in enumerate(blocks):
        assert block.name == path.format(i)
        assert block.module is model.get_submodule(block.name)
        assert block.attention is getattr(block.module, attention)
        assert block.parallel == (mid is None)
        assert block.mid_site is (None if mid is None else getattr(block.module, mid))


def test_a_wrapped_ffn_is_one_ffn() -> None:
    class Wrapped(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp, self.adapter = mlp, nn.Linear(36, 36)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x) + self.adapter(x)

    model = tiny_model("llama")
    model.model.layers[1].mlp = Wrapped(model.model.layers[1].mlp)
    text = tiny_text(9)
    layers = [importances(layer) for layer in account(model, text)]
    assert_graph_agrees(Tracer(model).trace(text, threshold=0.02), layers)


# What is refused


def refused(model: PreTrainedModel, *words: str) -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        Tracer(model)
    message = str(caught.value)
    assert message.startswith("model: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_encoders_are_refused() -> None:
    torch.manual_seed(0)
    config = BertConfig(**SHAPE, intermediate_size=40)
    refused(BertLMHeadModel(config), "reads later positions")
    refused(BertModel(config), "BertModel", "causal language model")


def test_encoder_decoders_are_refused() -> None:
    config = T5Config(vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4)
    refused(T5ForConditionalGeneration(config), "T5ForConditionalGeneration", "decoder")


def test_norms_after_the_residual_sum_are_refused() -> None:
    torch.manual_seed(0)
    config = OPTConfig(**SHAPE, ffn_dim=40, word_embed_proj_dim=24, do_layer_norm_before=False)
    refused(AutoModelForCausalLM.from_config(config), "layers.0", "residual addition")


Parts = Callable[[nn.Module, Tensor, Any], Tensor]


def _attend(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    return layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]


def _feed(layer: nn.Module, mid: Tensor) -> Tensor:
    return layer.mlp(layer.post_attention_layernorm(mid))


def _as_it_is(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + _attend(layer, x, kwargs)
    return mid + _feed(layer, mid)


def _scaled_residual(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + _attend(layer, x, kwargs)
    return 0.5 * mid + _feed(layer, mid)


def _scaled_first_residual(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = 0.5 * x + _attend(layer, x, kwargs)
    return mid + _feed(layer, mid)


def _adapter_of_x(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + _attend(layer, x, kwargs)
    return mid + _feed(layer, mid) + layer.extra(x)


def _adapter_of_mid(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + _attend(layer, x, kwargs)
    return mid + _feed(layer, mid) + layer.extra(mid)


def _adapter_before_mid(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + _attend(layer, x, kwargs) + layer.extra(x)
    return mid + _feed(layer, mid)


def _norm_at_the_end(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    return layer.norm(_as_it_is(layer, x, kwargs))


def _norm_then_nothing(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    return layer.norm(_as_it_is(layer, x, kwargs)) * 1.0


def _norm_in_the_middle(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = layer.norm(x + _attend(layer, x, kwargs))
    return mid + _feed(layer, mid)


def _attention_into_the_end(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    attention = _attend(layer, x, kwargs)
    mid = x + attention
    return mid + _feed(layer, mid) + 0.1 * attention


def _attention_times_gate(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + _attend(layer, x, kwargs) * torch.sigmoid(layer.extra(x))
    return mid + _feed(layer, mid)


def _squashed_attention(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + torch.tanh(_attend(layer, x, kwargs))
    return mid + _feed(layer, mid)


def _two_ffns(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + _attend(layer, x, kwargs)
    post = mid + _feed(layer, mid)
    return post + layer.extra(post)


def _neighbour_mixed_in(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + _attend(layer, x, kwargs)
    post = mid + _feed(layer, mid)
    return post + 0.1 * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def with_forward(family: str, index: int, parts: Parts) -> PreTrainedModel:
    """A tiny Llama of which one layer computes `parts` instead."""
    model = tiny_model(family)
    layer = model.model.layers[index]
    torch.manual_seed(1)
    layer.extra = nn.Linear(36, 36)
    layer.norm = nn.LayerNorm(36)

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return parts(layer, hidden_states, kwargs)

    layer.forward = forward
    return model


def test_a_layer_written_differently_is_the_same_layer() -> None:
    text = tiny_text(9)
    expected = Tracer(tiny_model("llama")).trace(text, threshold=0.02)
    assert_same_tables(Tracer(with_forward("llama", 1, _as_it_is)).trace(text, threshold=0.02),
                       expected)  # fmt: skip


@pytest.mark.parametrize(
    "parts",
    [
        _scaled_residual,
        _scaled_first_residual,
        _adapter_of_x,
        _adapter_of_mid,
        _adapter_before_mid,
        _norm_at_the_end,
        _norm_then_nothing,
        _norm_in_the_middle,
        _attention_into_the_end,
        _attention_times_gate,
        _squashed_attention,
        _two_ffns,
        _neighbour_mixed_in,
    ],
)
def test_layers_with_parts_that_are_not_ours_are_refused(parts: Parts) -> None:
    refused(with_forward("llama", 1, parts), "layers.1")


@pytest.mark.parametrize("where", ["attention", "block", "scaled"])
def test_parallel_layers_with_parts_that_are_not_ours_are_refused(where: str) -> None:
    """What an adapter reads of x is no bias of the attention module."""
    model = tiny_model("gpt_neox")
    layer = model.gpt_neox.layers[1]
    module = layer.attention if where == "attention" else layer
    own = module.forward
    torch.manual_seed(1)
    layer.extra = nn.Linear(36, 36)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = own(hidden_states, *args, **kwargs)
        if where == "attention":
            return output[0] + layer.extra(hidden_states), *output[1:]
        added = layer.extra(hidden_states) if where == "block" else -0.5 * hidden_states
        return output + added

    module.forward = forward
    refused(model, "layers.1")


def test_attention_that_is_called_twice_is_refused() -> None:
    def twice(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
        mid = x + _attend(layer, x, kwargs) + _attend(layer, 2 * x, kwargs)
        return mid + _feed(layer, mid)

    refused(with_forward("llama", 1, twice), "3 layers", "4 calls")


def test_layers_of_different_head_counts_are_refused() -> None:
    model = tiny_model("llama")
    config = copy.deepcopy(model.config)
    config.num_attention_heads, config.head_dim = 4, 6
    model.model.layers[1].self_attn = attention = LlamaAttention(config, layer_idx=1)
    attention.config = model.config  # through which its attention function is set
    refused(model, "different numbers of heads: 6, 4, 6")


def test_a_layer_without_attention_is_refused() -> None:
    def none(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
        return x + _feed(layer, x)

    refused(with_forward("llama", 1, none), "3 layers", "2 calls")


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
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=f"model: expected .*, got {type(model).__name__}"):
        Tracer(model)


# What is left as it was


def state(model: PreTrainedModel) -> Any:
    """All that opening and tracing touch for a while."""
    return (
        model.config._attn_implementation,
        [
            (
                name,
                module.training,
                list(module._forward_hooks),
                list(module._forward_pre_hooks),
            )
            for name, module in model.named_modules()
        ],
        [
            (name, parameter.requires_grad, parameter.grad)
            for name, parameter in model.named_parameters()
        ],
    )


def mixed(family: str = "llama") -> PreTrainedModel:
    """A model with hooks and flags of its own, some modules in train mode, some not."""
    model = tiny_model(family).train()
    first = model.get_decoder().layers[0]
    first.eval()
    first.mlp.train()
    first.register_forward_hook(lambda *_: None)
    first.mlp.register_forward_pre_hook(lambda *_: None)
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["full", "lean"])
def test_a_model_is_left_as_it_was(mode: str, implementation: str) -> None:
    model = mixed()
    model.set_attn_implementation(implementation)
    before = state(model)
    assert before[0] == implementation
    tracer = Tracer(model)
    assert state(model) == before
    recording = tracer.record(tiny_text(9), mode=mode)
    assert state(model) == before
    tracer.trace(recording, position=3)
    assert state(model) == before
    tracer.trace_all(recording)[2]
    assert state(model) == before
    for _ in tracer.contributions(recording):
        assert state(model) == before  # between two layers, too
    assert state(model) == before
    # It can still be trained.
    model.get_decoder().layers[1].train()
    ids = tiny_text(9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert float(model.get_decoder().layers[1].mlp.up_proj.weight.grad.abs().sum()) > 0


def test_a_model_is_left_as_it_was_when_something_breaks() -> None:
    class BreakError(Exception):
        pass

    model = mixed()
    tracer = Tracer(model)
    lean = tracer.record(tiny_text(9), mode="lean")
    before = state(model)
    layer = model.model.layers[1]
    own = layer.self_attn.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise BreakError

    layer.self_attn.forward = broken
    for act in (
        lambda: Tracer(model),
        lambda: tracer.record(tiny_text(9)),
        lambda: tracer.trace(tiny_text(9)),
        lambda: tracer.trace(lean, threshold=0.0),
        lambda: tracer.trace_all(lean),
        lambda: list(tracer.contributions(lean)),
    ):
        with pytest.raises(BreakError):
            act()
        assert state(model) == before
    layer.self_attn.forward = own
    assert len(tracer.trace(lean, threshold=0.0).edges.layer) > 0


def test_a_model_with_dropout_in_train_mode_gives_the_same_graph() -> None:
    text = tiny_text(20)

    def dropping() -> PreTrainedModel:
        model = tiny_model("gpt2")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        for block in model.transformer.h:
            block.attn.attn_dropout.p = 0.5
        return model

    training = dropping().train()
    ids = text[None]
    assert not torch.equal(training(input_ids=ids).logits, training(input_ids=ids).logits)
    for mode in ("full", "lean"):
        of_training, of_eval = Tracer(training), Tracer(dropping().eval())
        assert_same_tables(
            of_training.trace(of_training.record(text, mode=mode), threshold=0.02, position=7),
            of_eval.trace(of_eval.record(text, mode=mode), threshold=0.02, position=7),
        )
    assert training.training


@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_grad_modes_make_no_difference(family: str, mode: str) -> None:
    text = tiny_text(20)
    expected = None
    for opened in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        model = tiny_model(family)
        with opened():
            tracer = Tracer(model)
        for traced in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with traced():
                graph = tracer.trace(tracer.record(text, mode=mode), threshold=0.02)
                routes = tracer.trace_all(text, threshold=0.02)
            assert not graph.edges.weight.requires_grad
            expected = graph if expected is None else expected
            assert_same_tables(graph, expected)
            assert torch.equal(routes[-1].edges.source, expected.edges.source)


# Recording


@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gpt_neox"])
def test_recorded_logits_are_the_models(family: str, mode: str) -> None:
    model = tiny_model(family).eval()
    text = tiny_text(20)
    with torch.no_grad():
        logits = model(input_ids=text[None]).logits[0]
    tracer = Tracer(model)
    recording = tracer.record(text, mode=mode)
    torch.testing.assert_close(recording.logits, logits[-1], atol=1e-5, rtol=1e-5)
    rows = torch.tensor([0, 3, 11, 19])
    of_head = tracer.decoder.head(recording.states[rows])
    torch.testing.assert_close(of_head, logits[rows], atol=1e-5, rtol=1e-5)
    for position in (0, 7, 19):
        probabilities = logits[position].softmax(-1)
        for graph in (
            tracer.trace(recording, position=position),
            tracer.trace(text, position=position),
        ):
            best = probabilities.argsort(descending=True)[:5].tolist()
            assert [p.token_id for p in graph.predictions] == best
            assert [p.probability for p in graph.predictions] == pytest.approx(
                probabilities[best].tolist(), abs=1e-5
            )


@pytest.mark.parametrize("mode", ["full", "lean"])
def test_float64_models_are_scored_in_float64(mode: str) -> None:
    """GPT-2 casts nothing down, so its own eager account is float64 throughout."""
    model = tiny_model("gpt2", dtype=torch.float64)
    text = tiny_text(20)
    layers = [importances(layer) for layer in account(model, text)]
    tracer = Tracer(model)
    for scores in tracer.contributions(tracer.record(text, mode=mode), keep=0.0):
        expected, got = layers[scores.layer], scores.attention
        assert got.residual.dtype == torch.float64
        heads = torch.zeros_like(expected.heads)
        heads[:, got.edges.row, got.edges.source] = got.edges.head_weight.T
        for mine, theirs in (
            (heads, expected.heads),
            (got.head_total, expected.heads.sum(-1).T),
            (got.residual, expected.residual),
        ):
            assert float((mine - theirs).abs().max()) < 1e-9


def test_float64_replays_are_those_of_a_full_recording() -> None:
    for family in ("gpt2", "mistral"):
        tracer = Tracer(tiny_model(family, dtype=torch.float64))
        full, lean = (tracer.record(tiny_text(20), mode=mode) for mode in ("full", "lean"))
        for layer in range(3):
            rows = torch.tensor([2, 19])
            with lean.replaying():
                (of_full, _), (of_lean, _) = (
                    layer_inputs(recording, layer, rows) for recording in (full, lean)
                )
            assert float((of_full.q - of_lean.q).abs().max()) < 1e-9
            assert float((of_full.y - of_lean.y).abs().max()) < 1e-9


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_lean_and_full_recordings_give_the_same(family: str) -> None:
    tracer = Tracer(tiny_model(family))
    text = tiny_text(33)
    full, lean = (tracer.record(text, mode=mode) for mode in ("full", "lean"))
    assert lean.layers[0].q is None
    assert lean.layers[0].resid_mid is None
    rows = [0, 1, 8, 30]
    for a, b in zip(
        tracer.contributions(full, rows=rows, keep=0.0),
        tracer.contributions(lean, rows=rows, keep=0.0),
        strict=True,
    ):
        torch.testing.assert_close(a.head_total, b.head_total, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(a.residual, b.residual, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(a.ffn, b.ffn, atol=TOLERANCE, rtol=0)
        assert torch.equal(a.rows, torch.tensor(rows))


@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_a_poisoned_recording_is_noticed(family: str, layer: int, mode: str) -> None:
    """A value swapped at a key that a checked row reads is no longer what the model attended to."""
    tracer = Tracer(tiny_model(family))
    text = tiny_text(20)
    for field, position in (("v", 19), ("k", 18)):
        recording = tracer.record(text, mode=mode)
        assert 19 in recording.checked_rows.tolist()
        cache = getattr(recording.layers[layer], field).clone()
        cache[position] = -3 * cache[position]
        setattr(recording.layers[layer], field, cache)
        for act in (
            lambda recording=recording: tracer.trace(recording, threshold=0.0),
            lambda recording=recording: tracer.trace_all(recording),
            lambda recording=recording: list(tracer.contributions(recording, layers=[layer])),
        ):
            with pytest.raises(IfrError, match=f"layer {layer} .*do not add up"):
                act()


def test_text_that_overflows_in_half_precision_names_the_dtype() -> None:
    model = tiny_model("gpt2", dtype=torch.float16)
    with torch.no_grad():  # beyond the length of any probe
        model.transformer.wpe.weight[40] = 6e4
        model.transformer.wte.weight[5] = 6e4
    tracer = Tracer(model)
    text = torch.full((41,), 7)
    text[40] = 5
    with pytest.raises(IfrError, match=r"not finite.*float16"):
        tracer.trace(text)
    assert len(tracer.trace(text[:40]).predictions) == 5


# What a Tracer takes


@pytest.mark.parametrize("position", [20, -21, 10**9, True, False, 3.0, None, "3", [[3]], [20]])
def test_positions_out_of_range_are_refused(llama: Tracer, position: Any) -> None:
    with pytest.raises(ValueError, match=r"position: expected .*-20 to 19, got"):
        llama.trace(tiny_text(20), position=position)
    with pytest.raises(ValueError, match=r"position: expected .*-20 to 19, got"):
        llama.trace(llama.record(tiny_text(20)), position=position)


@pytest.mark.parametrize("threshold", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_thresholds_out_of_range_are_refused(llama: Tracer, threshold: float) -> None:
    for act in (llama.trace, llama.trace_all):
        with pytest.raises(ValueError, match="threshold: expected a number from 0 to 1"):
            act(tiny_text(5), threshold=threshold)
    with pytest.raises(ValueError, match="keep: expected a number from 0 to 1"):
        llama.contributions(tiny_text(5), keep=threshold)


@pytest.mark.parametrize("threshold", ["0.1", None])
def test_thresholds_that_are_no_numbers_are_refused(llama: Tracer, threshold: Any) -> None:
    with pytest.raises(ValueError, match="threshold: expected a number from 0 to 1"):
        llama.trace(tiny_text(5), threshold=threshold)


@pytest.mark.parametrize("granularity", ["heads", "", None, "TOKEN"])
def test_granularities_are_two(llama: Tracer, granularity: Any) -> None:
    for act in (llama.trace, llama.trace_all):
        with pytest.raises(ValueError, match="granularity: expected 'token' or 'head'"):
            act(tiny_text(5), granularity=granularity)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ([], "is empty"),
        (torch.empty(0, dtype=torch.int64), "is empty"),
        ("words", "no tokenizer"),
        ("", "no tokenizer|is empty"),
        ([1.5, 2.0], "expected .* token ids"),
        ([1, "a"], "expected .* token ids"),
        (["a", 3], "expected .* token ids"),
        ([True, False], "expected .* token ids"),
        ([1, None], "expected .* token ids"),
        (torch.tensor([1.0, 2.0]), "expected token ids"),
        (torch.tensor([True, False]), "expected token ids"),
        (torch.tensor([[1, 2], [3, 4]]), r"shape \[T\], got \(2, 2\)"),
        (torch.tensor(3), "expected token ids"),
        ([VOCAB], f"from 0 to {VOCAB - 1}"),
        ([3, -1], f"from 0 to {VOCAB - 1}"),
        ([2**40], f"from 0 to {VOCAB - 1}"),
        ([2**70], "token ids"),
        ([[1, 2], 3], "expected .* token ids"),
        ([{"role": "user", "content": "hello"}], "no tokenizer"),
        ([{"role": "user"}, 3], "expected"),
        (b"\x01\x02", "expected a string"),
        (3, "expected"),
        (None, "expected"),
        ([0] * 97, "97 tokens.* 96"),
    ],
    ids=repr,
)
def test_texts_that_are_none_are_refused(llama: Tracer, text: Any, reason: str) -> None:
    for act in (llama.trace, llama.trace_all, llama.record, llama.contributions):
        with pytest.raises(ValueError, match=f"text: .*({reason})"):
            act(text)


def test_texts_in_every_form_are_the_same(llama: Tracer) -> None:
    ids = tiny_text(9)
    expected = llama.trace(ids)
    assert expected.tokens == [f"<{i}>" for i in ids.tolist()]
    for text in (ids.tolist(), tuple(ids.tolist()), ids.int(), llama.record(ids)):
        assert_same_tables(llama.trace(text), expected)
    assert len(llama.trace([3] * 96).tokens) == 96


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", [20]),
        ("rows", [-21]),
        ("rows", [1.0]),
        ("rows", [True]),
        ("rows", []),
        ("rows", torch.tensor([25])),
        ("layers", [3]),
        ("layers", [-4]),
        ("layers", ["0"]),
    ],
    ids=repr,
)
def test_rows_and_layers_out_of_range_are_refused(llama: Tracer, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: "):
        llama.contributions(tiny_text(20), **{name: value})


def test_rows_and_layers_may_be_named_in_any_order(llama: Tracer) -> None:
    text = tiny_text(20)
    every = {scores.layer: scores for scores in llama.contributions(text, keep=0.02)}
    assert list(every) == [2, 1, 0]
    rows = torch.tensor([-1, 3, 3, 0])
    some = list(llama.contributions(text, rows=rows, layers=[0, -1], keep=0.02))
    assert [scores.layer for scores in some] == [2, 0]
    for scores in some:
        assert scores.rows.tolist() == [0, 3, 19]
        whole = every[scores.layer]
        torch.testing.assert_close(scores.residual, whole.residual[scores.rows])
        among = torch.isin(whole.token_edges.target, scores.rows)
        assert torch.equal(scores.token_edges.source, whole.token_edges.source[among])
        assert torch.equal(scores.token_edges.target, whole.token_edges.target[among])
        assert (scores.token_edges.weight > 0.02).all()
        assert (scores.head_edges.weight > 0.02).all()


def test_modes(llama: Tracer) -> None:
    assert llama.record(tiny_text(3), mode="lean").mode == "lean"
    with pytest.raises(ValueError, match=r"mode: expected .*'fast'"):
        llama.record(tiny_text(3), mode="fast")


def test_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.delenv("IFR_FAST_IMPL", raising=False)
    assert Tracer(model).impl in ("eager", "cpu", "triton")
    for impl in ("fast", "Eager"):
        with pytest.raises(ValueError, match=f"impl: expected one of auto, .*, got '{impl}'"):
            Tracer(model, impl=impl)
    monkeypatch.setenv("IFR_FAST_IMPL", "reference")
    assert Tracer(model).impl == "reference"
    assert Tracer(model, impl="eager").impl == "eager"
    monkeypatch.setenv("IFR_FAST_IMPL", "eager")
    assert Tracer(model).impl == "eager"
    monkeypatch.setenv("IFR_FAST_IMPL", "nonsense")
    with pytest.raises(ValueError, match="'nonsense'"):
        Tracer(model)
    monkeypatch.setenv("IFR_FAST_IMPL", "")
    assert Tracer(model).impl in ("eager", "cpu", "triton")


def test_the_implementation_chosen_is_the_one_that_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own = reference.score_attention
    monkeypatch.setattr(reference, "score_attention", lambda *args: calls.append(1) or own(*args))
    model = tiny_model("llama")
    Tracer(model, impl="eager").trace(tiny_text(9), threshold=0.0)
    assert calls == []
    Tracer(model, impl="reference").trace(tiny_text(9), threshold=0.0)
    assert len(calls) == 3


def test_memory_decides_what_is_recorded(llama: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = llama.plan(96)
    assert plan.lean_bytes < plan.full_bytes
    # Of a token: resid_pre and k, v of each layer, the last's output and what the head reads; q and
    # resid_mid besides.
    assert plan.lean_bytes == 96 * 4 * (3 * (36 + 2 * 2 * 6) + 2 * 36)
    assert plan.full_bytes - plan.lean_bytes == 96 * 3 * 4 * (36 + 36)

    def with_memory(n_bytes: float | None) -> None:
        available = None if n_bytes is None else int(n_bytes)
        monkeypatch.setattr(ifr_fast.recording.plan, "available_memory", lambda _: available)

    text = tiny_text(96)
    expected = llama.trace(text)
    with_memory(None)
    assert llama.record(text).mode == "full"
    assert llama.plan(96).available_bytes is None
    with_memory(2 * plan.added_bytes)
    assert llama.record(text).mode == "full"
    with_memory(plan.added_bytes / 0.85)
    assert llama.plan(96).mode == "lean"
    assert llama.plan(96).recording_bytes == plan.lean_bytes
    assert llama.record(text).mode == "lean"
    graph = llama.trace(text)
    assert torch.equal(graph.edges.source, expected.edges.source)
    with_memory(1000)
    for act in (llama.record, llama.trace, llama.trace_all, llama.contributions):
        with pytest.raises(MemoryBudgetError, match=r"96 tokens.*1 kB are available"):
            act(text)
    with pytest.raises(MemoryBudgetError, match="96 tokens"):
        llama.plan(96)


@pytest.mark.parametrize("n_tokens", [0, -1])
def test_plans_need_tokens(llama: Tracer, n_tokens: int) -> None:
    with pytest.raises(ValueError, match="n_tokens: expected at least 1"):
        llama.plan(n_tokens)


@pytest.mark.default_model
def test_chat_messages(smol: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    expected = smol.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert smol.record(messages).token_ids.tolist() == expected
    for bad in ([{"role": "user"}], [{"content": "Hi"}], [{"role": "user", "content": 3}]):
        with pytest.raises(ValueError, match="text: expected messages with role and content"):
            smol.record(bad)
    monkeypatch.setattr(smol.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="text: this tokenizer has no chat template"):
        smol.record(messages)


@pytest.mark.default_model
def test_special_tokens_are_the_tokenizers_unless_told(smol: Tracer) -> None:
    with pytest.raises(ValueError, match="text: is empty"):
        smol.trace("")
    plain = smol.tokenizer("Paris")["input_ids"]
    assert smol.record("Paris").token_ids.tolist() == plain
    without = smol.tokenizer("Paris", add_special_tokens=False)["input_ids"]
    assert smol.record("Paris", add_special_tokens=False).token_ids.tolist() == without
