"""Weights that are not plain tensors: adapters, tied, offloaded. A model that holds them
is explained as the same model with plain weights is.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from opened import tiny_tracer
from oracle import importances
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from same_graph import assert_agree
from same_model import TEXT, assert_generates_same, assert_same_scores
from tiny import FAMILIES, account, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ifr_fast import Tracer, UnsupportedArchitectureError

# Adapters


def with_lora(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with adapters that matter, one on the output projection, not merged."""
    projections = ["q_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=4, target_modules=projections, init_lora_weights=False)
    model = get_peft_model(tiny_model(family, dtype=dtype), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(3)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next"])
def test_adapters_score_as_their_merged_weights_do(family: str) -> None:
    model = with_lora(family)
    merged = Tracer(copy.deepcopy(model).merge_and_unload())
    tracer = Tracer(model)
    assert_same_scores(tracer, merged)
    assert_same_scores(Tracer(model.get_base_model()), merged)
    with pytest.raises(AssertionError):
        assert_same_scores(tracer, tiny_tracer(family))


def test_lora_matches_the_oracle() -> None:
    model = with_lora("llama")
    base = model.get_base_model()
    layers = [importances(layer) for layer in account(base, TEXT)]
    tracer = Tracer(model)
    assert tracer.model is model
    for scores in tracer.contributions(TEXT, keep=0.0):
        assert_agree(scores, layers[scores.layer])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lora_in_half_precision_keeps_what_it_adds(dtype: torch.dtype) -> None:
    """The sum of weight and adapter has no exact half-precision form, so it is not rounded."""
    model = with_lora("llama", dtype)
    tracer = Tracer(model)
    assert tracer.decoder.dtype == dtype
    assert len(tracer.trace(TEXT, threshold=0.02).edges.layer) > 10
    for block in tracer.decoder.blocks:
        out = block.attention.o_proj
        down, up = (x["default"].weight.double() for x in (out.lora_A, out.lora_B))
        expected = out.base_layer.weight.double() + out.scaling["default"] * up @ down
        found = block.W_O.flatten(0, 1).T.double()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_adapters_that_scale() -> None:
    config = IA3Config(
        target_modules=["k_proj", "v_proj", "o_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    )
    model = get_peft_model(tiny_model("llama"), config)
    assert_same_scores(Tracer(model), Tracer(copy.deepcopy(model).merge_and_unload()))


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_soft_prompts_are_refused(config: Any) -> None:
    model = get_peft_model(tiny_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedArchitectureError, match="more than the model that it wraps"):
        Tracer(model)


def test_a_compiled_model_scores_as_the_plain_one() -> None:
    compiled = Tracer(torch.compile(tiny_model("llama"), backend="eager"))
    assert_same_scores(compiled, tiny_tracer("llama"))


# Weights on other devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "qwen3_next"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_score_as_resident_ones(
    where: str, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, cpu = tiny_model(family, dtype=dtype), torch.device("cpu")
    if where == "cpu":
        cpu_offload(model, execution_device=cpu)
    else:
        disk_offload(model, str(tmp_path), execution_device=cpu)
    assert next(model.parameters()).is_meta
    offloaded, resident = Tracer(model), tiny_tracer(family, dtype)
    assert_same_scores(offloaded, resident, 0.0)
    assert_generates_same(offloaded, resident)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_device_map_over_memory_and_disk(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    names = ["embed_tokens", "rotary_emb", "layers.0", "layers.2", "norm"]
    devices = {f"model.{name}": "cpu" for name in names}
    devices |= {"model.layers.1": "disk", "lm_head": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        device_map=devices,
        offload_folder=str(tmp_path / "offloaded"),
    )
    assert loaded.model.layers[1].self_attn.o_proj.weight.is_meta
    assert not loaded.model.layers[0].self_attn.o_proj.weight.is_meta
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mine, theirs = Tracer(loaded), Tracer(plain)
    assert_same_scores(mine, theirs, 0.0)
    assert_generates_same(mine, theirs)


def tied_llama(tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config: LlamaConfig = FAMILIES["llama"].config()
    config.tie_word_embeddings = tied
    return AutoModelForCausalLM.from_config(config)


def test_tied_weights_score_as_untied_ones() -> None:
    tied, untied = tied_llama(True), tied_llama(False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied.load_state_dict(tied.state_dict())
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    mine, theirs = Tracer(tied), Tracer(untied)
    assert_same_scores(mine, theirs, 0.0)
    assert mine.trace(TEXT).predictions == theirs.trace(TEXT).predictions
