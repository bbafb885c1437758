"""Residual connections with norms and weights: what is found of them, that its parts are those of
the definition, and which are refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definition import importances_by_definition
from opened import tiny_tracer
from refusals import Parts, assert_refused, attend, feed, llama_with
from same_graph import assert_agree
from tiny import held, tiny_model, tiny_text
from torch import Tensor, nn

from ifr_fast import IfrError, Tracer
from ifr_fast.model.block import Block
from ifr_fast.model.held import Residual
from ifr_fast.model.node_parts import passage_to_mid
from ifr_fast.model.residual import held_norm
from ifr_fast.recording.layer_inputs import LayerRows, layer_inputs
from ifr_fast.recording.recording import Recording
from ifr_fast.survey.sweep import sweep

T = 23
HELD = ["bart", "beam", "bert", "doge", "minimax", "openai-gpt", "opt-post_norm"]
POST_NORM = ["bart", "bert", "openai-gpt", "opt-post_norm"]


def _scaled_before_attention(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = 0.5 * x + attend(layer, x, kwargs)
    return mid + feed(layer, mid)


def _weighted_before_attention(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = layer.extra.bias * x + attend(layer, x, kwargs)
    return 0.7 * (mid + feed(layer, mid))


def _weighted_before_the_ffn(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs)
    return layer.extra.bias * mid + 0.3 * feed(layer, mid)


def _norm_at_the_end(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs)
    return layer.norm(mid + feed(layer, mid))


def _norm_in_the_middle(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = layer.norm(x + attend(layer, x, kwargs))
    return mid + feed(layer, mid)


def _norm_in_the_middle_of_a_scaled_stream(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = layer.norm(-1.5 * x + attend(layer, x, kwargs))
    return mid * 0.3 + feed(layer, mid)


def _norm_before_attention(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    x = layer.norm(x)
    mid = 0.4 * x + attend(layer, x, kwargs)
    return mid + feed(layer, mid)


def _norms_everywhere(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    x = layer.input_layernorm(x)
    mid = layer.norm(layer.extra.bias * x + layer.self_attn(hidden_states=x, **kwargs)[0])
    return layer.post_attention_layernorm(1.2 * mid + layer.mlp(mid))


OPENED = [
    _scaled_before_attention,
    _weighted_before_attention,
    _weighted_before_the_ffn,
    _norm_at_the_end,
    _norm_in_the_middle,
    _norm_in_the_middle_of_a_scaled_stream,
    _norm_before_attention,
    _norms_everywhere,
]


@pytest.mark.parametrize("parts", OPENED)
def test_parts_are_those_of_the_definition(parts: Parts) -> None:
    model, text = llama_with(parts), tiny_text(T)
    with torch.no_grad():
        for parameter in (model.model.layers[1].norm.weight, model.model.layers[1].norm.bias):
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.model.layers[1].extra.bias.add_(1)
    tracer = Tracer(model)
    assert [block.residual is None for block in tracer.decoder.blocks] == [True, False, True]
    expected = importances_by_definition(model, text)
    for mode in ("full", "lean"):
        for scores in tracer.contributions(tracer.record(text, mode=mode), keep=0.0):
            assert_agree(scores, expected[scores.layer])


def _norm_that_no_module_computes(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = F.layer_norm(x + attend(layer, x, kwargs), x.shape[-1:])
    return mid + feed(layer, mid)


def _squashed_stream(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = torch.tanh(x) + attend(layer, x, kwargs)
    return mid + feed(layer, mid)


def _squashed_middle(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = layer.bent(x + attend(layer, x, kwargs))
    return mid + feed(layer, mid)


def _squashed_end(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x + attend(layer, x, kwargs)
    return layer.bent(mid + feed(layer, mid))


def _rotated_stream(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x.roll(1, -1) + attend(layer, x, kwargs)
    return mid + feed(layer, mid)


def _half_of_the_stream(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x * (torch.arange(x.shape[-1]) % 2) + attend(layer, x, kwargs)
    return mid + feed(layer, mid)


def _weighted_by_row(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = x * torch.sigmoid(x.mean(-1, keepdim=True)) + attend(layer, x, kwargs)
    return mid + feed(layer, mid)


def _stream_before_the_norm_again(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    mid = layer.norm(x + attend(layer, x, kwargs))
    return mid + feed(layer, mid) + 0.1 * x


@pytest.mark.parametrize(
    "parts",
    [
        _norm_that_no_module_computes,
        _squashed_stream,
        _squashed_middle,
        _squashed_end,
        _rotated_stream,
        _half_of_the_stream,
        _weighted_by_row,
        _stream_before_the_norm_again,
    ],
)
def test_other_connections_are_refused(parts: Parts) -> None:
    model = llama_with(parts)
    model.model.layers[1].bent = nn.Tanh()
    assert_refused(model, "layers.1")


class Norm(nn.Module):
    """A norm, of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.linspace(0.5, 1.5, 36))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "of all rows":
            return x * (x.square().mean() + 1e-6).rsqrt() * self.weight
        if self.kind == "of the rows before":
            return x * (x.square().mean(-1, keepdim=True).cumsum(-2) + 1e-6).rsqrt() * self.weight
        if self.kind == "of groups":
            groups = x.unflatten(-1, (2, -1))
            return (groups * (groups.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).flatten(-2)
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


@pytest.mark.parametrize("place", [_norm_in_the_middle, _norm_at_the_end, _norm_before_attention])
@pytest.mark.parametrize("kind", ["of all rows", "of the rows before", "of groups", "of a row"])
def test_norms_that_mix_rows_are_refused(place: Parts, kind: str) -> None:
    model = llama_with(place)
    model.model.layers[1].norm = Norm(kind)
    if kind == "of a row":
        Tracer(model)
    else:
        assert_refused(model, "layers.1")


def rows_of(recording: Recording, layer: int, rows: Tensor) -> LayerRows:
    with torch.inference_mode(), recording.decoder.replaying():
        return layer_inputs(recording, layer, rows)


@pytest.mark.parametrize("family", HELD)
@pytest.mark.parametrize("mode", ["full", "lean"])
def test_what_a_layer_passes_on_is_linear(family: str, mode: str) -> None:
    """The part of the stream is the map of a passage, applied to the stream; the parts and the
    constant make the node.
    """
    tracer = tiny_tracer(family, torch.float64)
    recording = tracer.record(tiny_text(T), mode=mode)
    rows = torch.tensor([0, 3, 4, T - 1])
    for layer, block in enumerate(tracer.decoder.blocks):
        inputs, post, _ = rows_of(recording, layer, rows)
        resid_pre = recording.layers[layer].resid_pre[rows]
        with torch.inference_mode():
            to_mid = passage_to_mid(block, resid_pre, inputs.row_scale)
        torch.testing.assert_close(to_mid(resid_pre), inputs.resid_pre, rtol=0, atol=1e-6)
        assert post is not None
        torch.testing.assert_close(post.passage(inputs.y), post.residual, rtol=0, atol=1e-6)
        both = torch.stack([resid_pre, inputs.y], dim=1)
        torch.testing.assert_close(to_mid(both)[:, 0], inputs.resid_pre, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", POST_NORM)
def test_a_held_norm_is_the_models_own(family: str) -> None:
    tracer = tiny_tracer(family, torch.float64)
    x, part = torch.randn(2, 5, 36, dtype=torch.float64)
    for block in tracer.decoder.blocks:
        assert block.residual is not None
        for norm in (block.residual.mid_norm, block.residual.post_norm):
            assert norm is not None
            out = norm.site(x)
            made = norm.factors(x, out)[:, None] * norm.linear(part)
            torch.testing.assert_close(made, held(norm.site, x, part), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(norm.bias, norm.site.bias)


def test_modules_that_are_no_norm() -> None:
    x = torch.randn(7, 36)
    with torch.no_grad():
        for module in (nn.Tanh(), nn.Linear(36, 36), nn.Linear(36, 20), nn.Softmax(-1)):
            assert held_norm(module, x, module(x)) is None
        norm = nn.LayerNorm(36)
        found = held_norm(norm, x, norm(x))
        assert found is not None
        assert found.centered
        assert held_norm(norm, x, norm(x) + 1e-2) is None  # it makes something else


def tampered(block: Block, name: str) -> Block:
    """The block with one of its norms or weights changed by a tenth, in some coordinates."""
    assert block.residual is not None
    of = getattr(block.residual, name)
    weight = (of if isinstance(of, Tensor) else of.weight).clone()
    weight[::3] *= 1.1
    changed = weight if isinstance(of, Tensor) else of._replace(weight=weight)
    return block._replace(residual=block.residual._replace(**{name: changed}))


@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, "mid_norm") for family in [*POST_NORM, "minimax"]),
        *((family, "post_norm") for family in POST_NORM),
        *((family, "pre_weight") for family in ("beam", "doge", "minimax")),
    ],
)
def test_a_residual_part_that_is_tampered_with_does_not_close(
    family: str, name: str, mode: str
) -> None:
    tracer = Tracer(tiny_model(family))
    blocks = list(tracer.decoder.blocks)
    blocks[1] = tampered(blocks[1], name)
    tracer.trace(tiny_text(T))
    tracer.decoder.blocks = blocks
    with pytest.raises(IfrError, match="at layer 1 the parts"):
        tracer.trace_all(tracer.record(tiny_text(T), mode=mode))


@pytest.mark.parametrize("family", [*POST_NORM, "minimax"])
def test_norms_changed_after_opening_are_noticed(family: str) -> None:
    model = tiny_model(family)
    tracer = Tracer(model)
    tracer.trace(tiny_text(T))
    of = tracer.decoder.blocks[1].residual
    assert of is not None
    norms = [norm for norm in (of.mid_norm, of.post_norm) if norm is not None]
    for norm in norms:
        with torch.no_grad():
            own = norm.site.weight.clone()
            norm.site.weight[::2] *= 1.05
        with pytest.raises(IfrError, match="at layer 1 the parts"):
            tracer.trace_all(tiny_text(T))
        with torch.no_grad():
            norm.site.weight.copy_(own)
    tracer.trace(tiny_text(T))


@pytest.mark.parametrize(
    ("family", "name"),
    [("doge", "post_attention_residual"), ("gemma4", "layer_scalar"), ("doge", "input_residual")],
)
@pytest.mark.parametrize("unit", [False, True])
def test_weights_of_the_stream_changed_after_opening_are_noticed(
    family: str, name: str, unit: bool
) -> None:
    """Also where they were 1 when the model was opened, so that nothing showed of them."""
    model = tiny_model(family)
    weight = getattr(model.model.layers[1], name)
    with torch.no_grad():
        if unit:
            weight.fill_(1)
        tracer = Tracer(model)
        tracer.trace(tiny_text(T))
        weight.mul_(1.3)
    for mode in ("full", "lean"):
        with pytest.raises(IfrError, match="at layer 1 the parts"):
            tracer.trace_all(tracer.record(tiny_text(T), mode=mode))
    with pytest.raises(IfrError, match="at layer 1 the parts"):
        tracer.trace(tiny_text(T))
    with pytest.raises(IfrError, match="at layer 1 the parts"):
        sweep(tracer.decoder, [tiny_text(T)], 0.02, tracer.kernel)


def test_plain_layers_have_no_residual() -> None:
    for family in ("llama", "gpt2", "gemma2", "granite", "olmo2", "phi"):
        assert all(block.residual is None for block in tiny_tracer(family).decoder.blocks)
    of = Residual()
    x = torch.randn(3, 8)
    assert torch.equal(of.passed(x), x)
