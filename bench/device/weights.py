"""Real weights: the first layers of the default model on a text, layer by layer against float64.

The file holds the layers, the rows of the embedding that the text needs, and the text. It is made
where the model can be had, and carried to the machine:

    python bench/device_check.py --make-weights out/smollm2.safetensors
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from device.common import KEEP, TINY, Check
from device.correctness import LIMITS
from device.exact import dense, exact, worst
from device.kernels import llama
from device.layer import some_rows
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ifr_fast import Tracer
from ifr_fast.recording.layer_inputs import layer_inputs

LAYERS, TOKENS = 7, 512


def save(model: PreTrainedModel, token_ids: Tensor, path: Path, n_layers: int = LAYERS) -> None:
    """Writes the first layers of a Llama-style model, for one text [T], in bfloat16."""
    known, ids = token_ids.unique(return_inverse=True)
    tensors = {}
    for name, x in model.state_dict().items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= n_layers:
            continue
        x = x[known] if name in ("model.embed_tokens.weight", "lm_head.weight") else x
        tensors[name] = x.to(torch.bfloat16).contiguous().clone()
    config = model.config.to_diff_dict()
    config |= {
        "num_hidden_layers": n_layers,
        "vocab_size": len(known),
        "tie_word_embeddings": False,
    }
    dropped = ("pad_token_id", "bos_token_id", "eos_token_id", "quantization_config")
    config = {name: value for name, value in config.items() if name not in dropped}
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"config": json.dumps(config, default=str)}
    save_file(tensors | {"token_ids": ids}, path, metadata=meta)


def load(path: Path, device: torch.device) -> tuple[PreTrainedModel, Tensor]:
    """The model, in bfloat16, and the text."""
    with safe_open(path, "pt") as file:
        config: dict[str, Any] = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ids = tensors.pop("token_ids")
    drop = ("dtype", "torch_dtype", "architectures", "transformers_version", "model_type")
    config = {name: value for name, value in config.items() if name not in drop}
    of_text = LlamaConfig(**config, attn_implementation="sdpa")
    model = AutoModelForCausalLM.from_config(of_text, dtype=torch.bfloat16)
    model.load_state_dict(tensors)
    return model.to(device).eval(), ids


def run(check: Check) -> None:
    """Appends the worst error of each layer, and the graph of the last position."""
    path = check.weights
    if path is None and check.stand_in:
        path = check.out / "tiny.safetensors"
        ids = torch.arange(12) * 5 % TINY.vocab
        save(LlamaForCausalLM(llama(TINY, 2, 12)), ids, path, 2)
    if path is None:
        raise SystemExit("--weights: --make-weights writes the file where the model can be had")
    model, ids = load(path, check.device)
    tracer = Tracer(model, None, impl="triton")
    recording = tracer.record(ids)
    T, limit = len(ids), LIMITS[torch.bfloat16]
    chosen = torch.tensor(sorted({0, 1, T // 3, T // 2, T - 2, T - 1}))
    for layer in range(len(recording.layers)):
        with torch.inference_mode(), recording.replaying():
            inputs = layer_inputs(recording, layer, torch.arange(T)).inputs
        scores = tracer.kernel.score_attention(inputs, 0.0)
        errors = worst(dense(scores, chosen, T), exact(some_rows(inputs, chosen)))
        right = all(error <= limit for error in errors.values())
        line = {"case": f"layer {layer}", "dtype": "bfloat16", "T": T, "errors": errors}
        check.found(kind="correctness", **line, limit=limit, right=right)
    graph = tracer.trace(recording, threshold=KEEP)
    routes = tracer.trace_all(recording, threshold=KEEP)
    same = len(routes[-1].edges.layer) == len(graph.edges.layer)
    check.found(kind="graph", T=T, edges=len(graph.edges.layer), same_of_all=same)


def make(path: Path) -> None:
    """Writes the file, from the default model."""
    from ifr_fast.benchmark import first_tokens, prose
    from ifr_fast.model.pretrained import load as load_default

    model, tokenizer = load_default()
    save(model, first_tokens(prose(), tokenizer, TOKENS), path)
