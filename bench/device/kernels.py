"""One layer: the forward pass, all positions and few, each kernel beside its prediction."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from device.common import KEEP, Check
from device.layer import random_layer, some_rows
from gpu_model.attribution import route_rows
from gpu_model.counts_model import Counts
from gpu_model.forward import forward_seconds
from gpu_model.shapes import Model
from transformers import LlamaConfig, LlamaModel

from ifr_fast.kernels.contract import LayerInputs
from ifr_fast.kernels.triton import kernel

COUNTS = Path(__file__).parents[1] / "gpu_model" / "counts.json"


def run(check: Check) -> None:
    """Appends times for each length and number of rows, each kernel's at once."""
    counts = Counts(json.loads(COUNTS.read_text()))
    for T in check.lengths or ([20] if check.stand_in else [2048, 8192]):
        forward = check.milliseconds(forward_of(check, T), 5)
        one = check.model._replace(L=1, vocab=1)
        expected = 1e3 * forward_seconds(one, T, check.target)
        check.found(kind="forward", T=T, ms=forward, predicted=expected)
        inputs = random_layer(check.model, T, T, check.device, torch.bfloat16)
        score(check, inputs, forward)
        for R in (2,) if check.stand_in else route_rows(counts):
            few = some_rows(inputs, torch.arange(T - min(R, T), T))
            score(check, few._replace(log_sum_exp=None), forward)
        del inputs


def score(check: Check, inputs: LayerInputs, forward: float) -> None:
    """Times the scoring of a layer's rows."""
    R, T = len(inputs.rows), len(inputs.k)
    predicted = check.predicted(inputs)
    job = partial(kernel.score_attention, inputs, KEEP)
    ms = check.milliseconds(job)
    line = {"T": T, "rows": R, "light": predicted.light, "heavy": predicted.heavy}
    check.found(
        kind="scoring",
        **line,
        ms=ms,
        predicted=predicted.total,
        forward=forward,
        units=ms / forward,
    )
    for name, took in check.of_kernels(job).items():
        expected, by = predicted.kernels[name]
        line = {"T": T, "rows": R, "kernel": name.removesuffix("_kernel"), "bound": by}
        check.found(kind="kernel", **line, ms=took, predicted=expected)


def forward_of(check: Check, T: int) -> partial[object]:
    """A job that runs one decoder layer of the model's shape."""
    layers = llama(check.model, 1, T)
    with torch.device(check.device):
        model = LlamaModel(layers).to(torch.bfloat16).eval()
    hidden = torch.randn(1, T, check.model.D, device=check.device, dtype=torch.bfloat16)
    return partial(inferred, model, hidden)


@torch.inference_mode()
def inferred(model: LlamaModel, hidden: torch.Tensor) -> object:
    return model(inputs_embeds=hidden, use_cache=False).last_hidden_state


def llama(m: Model, n_layers: int, T: int) -> LlamaConfig:
    """A configuration of the model's shape, with a small vocabulary."""
    return LlamaConfig(
        vocab_size=min(m.vocab, 4096),
        hidden_size=m.D,
        num_hidden_layers=n_layers,
        num_attention_heads=m.H,
        num_key_value_heads=m.H_kv,
        head_dim=m.V,
        intermediate_size=m.ffn,
        max_position_embeddings=T,
        initializer_range=m.D**-0.5,
        attn_implementation="sdpa",
    )
