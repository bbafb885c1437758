"""The parts that are found in a layer, and the layers whose parts do not add up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from opened import tiny_tracer
from oracle import assert_graph_agrees, importances
from refusals import Parts, assert_refused, attend, feed, llama_with
from same_graph import assert_agree, assert_same_bits
from tiny import CONFIGS, VOCAB, account, tiny_model, tiny_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GraniteConfig, PreTrainedModel

from ifr_fast import Tracer, UnsupportedArchitectureError
from ifr_fast.model.opening import open_decoder

EVERY = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def output_projection(model: PreTrainedModel, layer: int) -> Tensor:
    """The weight of a layer's output projection as [H * V, D]."""
    match model.config.model_type:
        case "gpt2":
            return model.transformer.h[layer].attn.c_proj.weight
        case "gpt_neox":
            return model.gpt_neox.layers[layer].attention.dense.weight.T
        case _:
            return model.model.layers[layer].self_attn.o_proj.weight.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_probed_output_map_is_the_modules_own_weight(family: str, dtype: torch.dtype) -> None:
    tracer = tiny_tracer(family, dtype)
    model, decoder = tracer.model, tracer.decoder
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
    config = GraniteConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        residual_multiplier=0.3,
    )
    model = AutoModelForCausalLM.from_config(config)
    for block in open_decoder(model).blocks:
        expected = 0.3 * block.attention.o_proj.weight.T
        torch.testing.assert_close(block.W_O.reshape(-1, 24), expected, atol=1e-6, rtol=1e-6)


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


def _as_it_is(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs)
    return mid + feed(layer, mid)


def _adapter_of_x(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs)
    return mid + feed(layer, mid) + layer.extra(x)


def _adapter_before_mid(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs) + layer.extra(x)
    return mid + feed(layer, mid)


def _attention_into_the_end(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    attention = attend(layer, x, kwargs)
    mid = x + attention
    return mid + feed(layer, mid) + 0.1 * attention


def _attention_times_gate(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs) * torch.sigmoid(layer.extra(x))
    return mid + feed(layer, mid)


def _squashed_attention(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + torch.tanh(attend(layer, x, kwargs))
    return mid + feed(layer, mid)


def _neighbour_mixed_in(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs)
    post = mid + feed(layer, mid)
    return post + 0.1 * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def _neighbours_adapter(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs)
    before = torch.cat([torch.zeros_like(mid[:, :1]), mid[:, :-1]], dim=1)
    return mid + feed(layer, mid) + layer.extra(before)


def _attention_by_an_adapter(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    attention = attend(layer, x, kwargs)
    mid = x + attention
    return mid + feed(layer, mid) + layer.extra(attention)


def _four_branches(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs)
    others = (layer.extra(mid) + layer.extra_2(mid) + layer.norm(mid)) * 0.3
    return mid + feed(layer, mid) + others


def _branch_or_stream(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    """0.5 * mid + the identity's output, or 1.5 * mid + the FFN's."""
    mid = x + attend(layer, x, kwargs)
    return 0.5 * mid + layer.identity(mid + feed(layer, mid))


def test_a_layer_may_be_written_differently() -> None:
    text = tiny_text(9)
    expected = tiny_tracer("llama").trace(text, threshold=0.02)
    mine = Tracer(llama_with(_as_it_is))
    assert_same_bits(mine.trace(text, threshold=0.02), expected)


@pytest.mark.parametrize(
    "parts",
    [
        _adapter_of_x,
        _adapter_before_mid,
        _attention_into_the_end,
        _attention_times_gate,
        _squashed_attention,
        _neighbour_mixed_in,
        _neighbours_adapter,
        _attention_by_an_adapter,
        _four_branches,
        _branch_or_stream,
    ],
)
def test_layers_with_other_parts_are_refused(parts: Parts) -> None:
    assert_refused(llama_with(parts), "layers.1")


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (_adapter_of_x, "reads the stream before attention"),
        (_attention_by_an_adapter, "reads the stream before attention, or attention itself"),
        (_neighbours_adapter, "reads other positions"),
        (_four_branches, "nor a sum of at most 3"),
    ],
)
def test_a_refused_branch_is_told_why(parts: Parts, why: str) -> None:
    assert_refused(llama_with(parts), "layers.1", why)


class Sum(NamedTuple):
    """A layer that adds more than one branch to a multiple of the stream."""

    parts: Parts
    branches: list[str]  # names of the submodules, in the order of their calls
    scale: float = 1.0


def _scaled_residual(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs)
    return 0.55 * mid + feed(layer, mid)


def _scaled_output(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    return _as_it_is(layer, x, kwargs) * -1.7


def _adapter_of_mid(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs)
    return mid + layer.extra(mid) + 0.4 * feed(layer, mid)


def _two_ffns(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs)
    post = layer.identity(mid + feed(layer, mid))  # holds the stream, and is no branch
    return (post + layer.extra(post)) * 0.07


def _three_branches(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs)
    post = mid + feed(layer, mid)
    post = post + 0.3 * layer.extra(post.tanh())
    return (post + layer.norm(layer.extra_2(post)) * 2) * 1.3


SUMS = {
    "scaled residual": Sum(_scaled_residual, ["mlp"], 0.55),
    "scaled output": Sum(_scaled_output, ["mlp"], -1.7),
    "adapter": Sum(_adapter_of_mid, ["extra", "mlp"]),
    "two FFNs, scaled": Sum(_two_ffns, ["mlp", "extra"], 0.07),
    "three branches, scaled": Sum(_three_branches, ["mlp", "extra", "norm"], 1.3),
}


@EVERY
@pytest.mark.parametrize("name", SUMS)
def test_all_that_is_added_after_attention_is_one_part(name: str, dtype: torch.dtype) -> None:
    of = SUMS[name]
    model = llama_with(of.parts)
    layer = model.model.layers[1]
    layer.layer_scalar = of.scale  # for the oracle
    tracer = Tracer(copy.deepcopy(model).to(dtype).eval())
    block = tracer.decoder.blocks[1]
    sites = [block.module.get_submodule(branch) for branch in of.branches]
    assert [branch.site for branch in block.branches] == sites
    assert block.stream_scale == pytest.approx(of.scale, rel=1e-6)
    assert [other.stream_scale for other in tracer.decoder.blocks[::2]] == [1, 1]
    if dtype != torch.float32:
        return
    text = tiny_text(9)
    layers = [importances(layer) for layer in account(model, text)]
    for granularity in ("token", "head"):
        graph = tracer.trace(text, threshold=0.02, granularity=granularity)
        assert_graph_agrees(graph, layers)
    for scores in tracer.contributions(text, keep=0.0):
        assert_agree(scores, layers[scores.layer])


def test_an_argument_of_a_layer_that_mixes_tokens_is_refused() -> None:
    """Gemma 4's layers read an embedding of the row's token, which no other token may change."""
    model = tiny_model("gemma4")
    own = model.model.project_per_layer_inputs

    def mixed(*args: Any) -> Tensor:
        x = own(*args)
        return x + 0.1 * x.roll(1, dims=1)

    model.model.project_per_layer_inputs = mixed
    assert_refused(model, "calls a layer with an argument that mixes several tokens")


@pytest.mark.parametrize("where", ["attention", "scaled"])
def test_parallel_layers_with_other_parts_are_refused(where: str) -> None:
    """The output of an adapter that reads x is no bias of the attention module."""
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
        return output - 0.5 * hidden_states

    module.forward = forward
    assert_refused(model, "layers.1")


def test_a_parallel_layer_may_have_several_branches() -> None:
    model = tiny_model("gpt_neox")
    layer = model.gpt_neox.layers[1]
    torch.manual_seed(1)
    layer.extra = nn.Linear(36, 36)

    class Layer(type(layer)):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(hidden_states, *args, **kwargs) + self.extra(hidden_states)

    layer.__class__ = Layer
    text = tiny_text(9)
    layers = [importances(layer) for layer in account(model, text)]
    for scores in Tracer(model).contributions(text, keep=0.0):
        assert_agree(scores, layers[scores.layer])


class Changed(nn.Module):
    """An FFN that adds `more` to the output of another, in all runs but the first `n_right`."""

    def __init__(self, ffn: nn.Module, more: Callable[[Tensor], Tensor], n_right: int = 0) -> None:
        super().__init__()
        self.ffn, self.more, self.left = ffn, more, n_right

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        return self.ffn(x) + self.more(x) if self.left < 0 else self.ffn(x)


@EVERY
def test_a_layer_whose_next_run_differs_is_refused(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    layer = model.model.layers[1]
    # The first three runs are the plain one and two watched ones.
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
    message = r"besides attention, it mixes positions by mlp \(Changed\)"
    with pytest.raises(UnsupportedArchitectureError, match=message):
        Tracer(model)
