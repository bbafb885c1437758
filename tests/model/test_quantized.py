"""Quantized weights: scored as the dequantized model is, or refused where activations are rounded
too. Stand-ins behave as packages do; the packages themselves are tested where they are installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import TOLERANCE, importances
from same_graph import assert_agree
from same_model import TEXT, assert_generates_same, assert_same_scores
from tiny import account, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ifr_fast import Tracer, UnsupportedArchitectureError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_layers(model: PreTrainedModel, make: Callable[[nn.Linear], nn.Module]) -> PreTrainedModel:
    """The model with another module in place of each linear one in its layers."""
    for parent in list(model.get_decoder().modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, make(child))
    return model


# Weights packed into a tensor's subclass


class Int8Weight(Tensor):
    """A weight of int8 and a scale for each output; only `linear` can read it."""

    quantized: Tensor
    scale: Tensor

    @staticmethod
    def of(weight: Tensor) -> Int8Weight:
        scale = weight.abs().amax(1, keepdim=True) / 127
        made = Tensor._make_wrapper_subclass(Int8Weight, weight.shape, dtype=weight.dtype)
        made.quantized, made.scale = (weight / scale).round().to(torch.int8), scale
        return made

    def dequantize(self) -> Tensor:
        return self.quantized.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            args = [x.dequantize() if isinstance(x, Int8Weight) else x for x in args]
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a quantized weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "olmo2", "gptj"])
def test_quantized_weights_score_as_dequantized_ones(family: str, dtype: torch.dtype) -> None:
    model, dequantized = tiny_model(family, dtype=dtype), tiny_model(family, dtype=dtype)
    for quantized, plain in zip(model.modules(), dequantized.modules(), strict=True):
        if isinstance(quantized, nn.Linear):
            weight = Int8Weight.of(quantized.weight.detach())
            plain.weight = nn.Parameter(weight.dequantize())
            quantized.weight = nn.Parameter(weight, requires_grad=False)
            quantized.weight.quantized, quantized.weight.scale = weight.quantized, weight.scale
    mine, theirs = Tracer(model), Tracer(dequantized)
    assert_same_scores(mine, theirs, 0.0)
    assert_generates_same(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_torchao_weights_score_as_dequantized_ones(bits: int, dtype: torch.dtype) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="expected: torchao is optional")
    from torchao.quantization.granularity import PerGroup

    config = (
        torchao.Int8WeightOnlyConfig()
        if bits == 8
        else torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(18))
    )

    def in_layers(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features == 36

    model, dequantized = tiny_model("llama", dtype=dtype), tiny_model("llama", dtype=dtype)
    for each in (model, dequantized):
        torchao.quantize_(each, config, filter_fn=in_layers)
    for module in dequantized.modules():
        if isinstance(module, nn.Linear) and module.in_features == 36:
            module.weight = nn.Parameter(module.weight.dequantize().to(dtype))
    # In bfloat16 the two models' own activations differ by rounding.
    tolerance = TOLERANCE if dtype == torch.float32 or bits == 4 else 0.05
    assert_same_scores(Tracer(model), Tracer(dequantized), tolerance)


def test_activations_rounded_before_the_output_projection_are_refused() -> None:
    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            scale = x.abs().amax(-1, keepdim=True) / 127
            return super().forward((x / scale.clamp(min=1e-9)).round() * scale)

    model = tiny_model("llama")
    out = model.model.layers[1].self_attn.o_proj
    rounded = Rounded(out.in_features, out.out_features, bias=False)
    rounded.weight = out.weight
    model.model.layers[1].self_attn.o_proj = rounded
    with pytest.raises(UnsupportedArchitectureError, match=r"layers\.1 .*relative error"):
        Tracer(model)


# Weights packed into buffers


class _NoRule(torch.autograd.Function):
    """A product without a rule for forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T


class Packed(nn.Module):
    """int8 weights in a buffer. They are laid out anew at their first use, and the product has no
    derivative in forward mode: it raises, or (drops) it gives a tensor without a tangent.
    """

    packed: Tensor
    scale: Tensor
    drops = False
    n_uses = 0

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantize(self) -> Tensor:
        packed = self.packed.T if self.n_uses else self.packed
        return packed.to(self.scale.dtype) * self.scale

    def activation(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        weight = self.dequantize()
        if not self.n_uses:
            self.packed = self.packed.T.contiguous()
        self.n_uses += 1
        x = self.activation(x)
        y = x.data @ weight.T if self.drops else _NoRule.apply(x, weight)
        return y if self.bias is None else y + self.bias


class PackedDropping(Packed):
    drops = True


class PackedInOneDtype(Packed):
    """It keeps its scale out of sight, and so in its own dtype, and refuses inputs of others."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.__dict__["scale"] = self._buffers.pop("scale")


class PackedFloat8(nn.Linear):
    """float8 weights, a floating dtype in which nothing is computed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), False)

    def forward(self, x: Tensor) -> Tensor:
        return _NoRule.apply(x, self.weight.to(x.dtype))


class PackedInt8Activations(Packed):
    def activation(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return (x / scale).round() * scale


class PackedFloat8Activations(Packed):
    def activation(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 448
        return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


class PackedNarrowActivations(Packed):
    def activation(self, x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype)


def dequantized(family: str, dtype: torch.dtype) -> PreTrainedModel:
    def plain(linear: nn.Linear) -> nn.Linear:
        linear.weight = nn.Parameter(Packed(linear).dequantize())
        return linear

    return with_layers(tiny_model(family, dtype=dtype), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [Packed, PackedDropping, PackedInOneDtype])
@pytest.mark.parametrize("family", ["llama-bias", "qwen3_next", "gemma2"])
def test_packed_weights_score_as_dequantized_ones(
    family: str, kind: type[Packed], dtype: torch.dtype
) -> None:
    model = with_layers(tiny_model(family, dtype=dtype), kind)
    mine, theirs = Tracer(model), Tracer(dequantized(family, dtype))
    for ours, others in zip(mine.decoder.blocks, theirs.decoder.blocks, strict=True):
        torch.testing.assert_close(
            ours.W_O.double(), others.W_O.double(), rtol=torch.finfo(dtype).eps, atol=1e-7
        )
    if dtype == torch.float32:
        assert_same_scores(mine, theirs)
        assert_generates_same(mine, theirs)
    for again, ours in zip(Tracer(model).decoder.blocks, mine.decoder.blocks, strict=True):
        assert torch.equal(again.W_O, ours.W_O)


def test_packed_weights_match_the_oracle() -> None:
    tracer = Tracer(with_layers(tiny_model("llama"), Packed))
    layers = [importances(x) for x in account(dequantized("llama", torch.float32), TEXT)]
    for scores in tracer.contributions(TEXT, keep=0.0):
        assert_agree(scores, layers[scores.layer])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8_weights_are_read_exactly(dtype: torch.dtype) -> None:
    model = with_layers(tiny_model("llama", dtype=dtype), PackedFloat8)
    for block in Tracer(model).decoder.blocks:
        weight = block.attention.o_proj.weight.to(block.W_O.dtype)
        assert torch.equal(block.W_O.flatten(0, 1).T, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [PackedInt8Activations, PackedFloat8Activations])
def test_quantized_activations_are_refused(kind: type[Packed], dtype: torch.dtype) -> None:
    model = with_layers(tiny_model("llama", dtype=dtype), kind)
    with pytest.raises(
        UnsupportedArchitectureError,
        match=rf"layers\.0 .*self_attn\.o_proj \({kind.__name__}\) rounds .*model\.dequantize",
    ):
        Tracer(model)


def test_activations_in_a_narrower_dtype_are_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"rounds what it reads, .*narrower"):
        Tracer(with_layers(tiny_model("llama"), PackedNarrowActivations))


def test_weights_that_inference_mode_cannot_use_are_refused() -> None:
    class Broken(Packed):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_inference_mode_enabled():
                raise RuntimeError("Cannot set version_counter for inference tensor")
            return super().forward(x)

    with pytest.raises(UnsupportedArchitectureError, match=r"\(Broken\) cannot be used"):
        Tracer(with_layers(tiny_model("llama"), Broken))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [Packed, PackedDropping, PackedInOneDtype])
def test_neurons_of_packed_weights_are_refused(kind: type[Packed], dtype: torch.dtype) -> None:
    tracer = Tracer(with_layers(tiny_model("llama", dtype=dtype), kind))
    with pytest.raises(
        UnsupportedArchitectureError, match=rf"packed weights \({kind.__name__}\).*dequantize"
    ):
        tracer.neurons(TEXT, layer=1)


def test_a_packed_projection_is_left_as_it_was() -> None:
    model = with_layers(tiny_model("llama", dtype=torch.bfloat16), PackedInOneDtype)
    Tracer(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


# The packages themselves


def model_for_packages(dtype: torch.dtype) -> PreTrainedModel:
    """Widths that are multiples of 64, which some kernels need."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 97}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


def bitsandbytes_4bit(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="expected: bitsandbytes is optional")
    made = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        quant_type="nf4",
        compute_dtype=linear.weight.dtype,
    )
    made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    made.support_avx512bf16_for_cpu = False  # that kernel computes in bfloat16
    return made.to("cpu")


def bitsandbytes_8bit(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="expected: bitsandbytes is optional")
    made = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
    )
    made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def hqq_4bit(linear: nn.Linear) -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize", reason="expected: hqq is optional")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
    return hqq.HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")


def quanto_8bit(linear: nn.Linear) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto", reason="expected: optimum-quanto is optional")
    model = nn.Sequential(linear)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [bitsandbytes_4bit, hqq_4bit, quanto_8bit])
def test_packages_weights_score_as_dequantized_ones(
    make: Callable[[nn.Linear], nn.Module], dtype: torch.dtype
) -> None:
    def plain(linear: nn.Linear) -> nn.Linear:
        packed = make(copy.deepcopy(linear)).eval()
        with torch.no_grad():
            weight = packed(torch.eye(linear.in_features, dtype=dtype)[None])[0].T.contiguous()
        linear.weight = nn.Parameter(weight)
        return linear

    mine = Tracer(with_layers(model_for_packages(dtype), make).eval())
    theirs = Tracer(with_layers(model_for_packages(dtype), plain))
    for ours, others in zip(mine.decoder.blocks, theirs.decoder.blocks, strict=True):
        assert torch.equal(ours.W_O, others.W_O)
    assert_same_scores(mine, theirs, TOLERANCE if dtype == torch.float32 else 0.05)


def test_packages_quantized_activations_are_refused() -> None:
    model = with_layers(model_for_packages(torch.bfloat16), bitsandbytes_8bit).eval()
    with pytest.raises(UnsupportedArchitectureError, match=r"rounds .*model\.dequantize"):
        Tracer(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchao_activations_are_refused(dtype: torch.dtype) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="expected: torchao is optional")
    model = model_for_packages(dtype)
    torchao.quantize_(model.model, torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(UnsupportedArchitectureError, match=r"rounds .*model\.dequantize"):
        Tracer(model)
