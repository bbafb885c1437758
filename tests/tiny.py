"""Tiny random models of the supported families, and their own account of a text.

Weights are scaled up: at their initial scale attention is uniform and nothing flips.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

VOCAB = 97
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 50,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_COMMON, num_key_value_heads=2),
    "llama-bias": lambda: LlamaConfig(
        **_COMMON, num_key_value_heads=6, head_dim=10, attention_bias=True, mlp_bias=True
    ),
    "mistral": lambda: MistralConfig(**_COMMON, num_key_value_heads=3, sliding_window=7),
    "qwen2": lambda: Qwen2Config(**_COMMON, num_key_value_heads=1),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=36,
        n_layer=3,
        n_head=6,
        n_positions=96,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON),
    "gpt_neox-sequential": lambda: GPTNeoXConfig(**_COMMON, use_parallel_residual=False),
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a family, with non-zero biases and norm weights away from 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6 if "embed" not in name and "wte" not in name else 20)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def tiny_text(n_tokens: int, seed: int = 0) -> Tensor:
    """Random token ids [n_tokens]."""
    return torch.randint(VOCAB, (n_tokens,), generator=torch.Generator().manual_seed(seed))


class LayerAccount(NamedTuple):
    """One layer of an eager run of the model, float64; T positions."""

    resid_pre: Tensor  # [T, D]
    resid_mid: Tensor | None  # [T, D]; None in a parallel block
    resid_post: Tensor  # [T, D]
    ffn: Tensor  # [T, D]
    pattern: Tensor  # [H, T, T]
    v: Tensor  # [T, H, V], repeated to all heads
    W_O: Tensor  # [H, V, D]


def account(model: PreTrainedModel, token_ids: Tensor) -> list[LayerAccount]:
    """What the model itself does, with its own eager attention and by the names of its own
    modules: nothing here goes through ifr_fast.
    """
    kind = model.config.model_type
    seen: dict[str, Tensor] = {}
    if kind == "gpt2":
        layers, names = model.transformer.h, ("attn", "ln_2", "mlp")
    elif kind == "gpt_neox":
        layers, names = model.gpt_neox.layers, ("attention", "post_attention_layernorm", "mlp")
    else:
        layers, names = model.model.layers, ("self_attn", "post_attention_layernorm", "mlp")
    handles = []

    def save(key: str, output: bool):
        def hook(_, args, kwargs, out=None):
            x = out if output else (args[0] if args else kwargs["hidden_states"])
            seen[key] = (x[0] if isinstance(x, tuple) else x)[0].double()

        return hook

    for i, layer in enumerate(layers):
        attention, norm, mlp = (getattr(layer, name) for name in names)
        values = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}.get(kind, "v_proj")
        for key, module, output in (
            (f"{i}.pre", layer, False),
            (f"{i}.post", layer, True),
            (f"{i}.mid", norm, False),
            (f"{i}.ffn", mlp, True),
            (f"{i}.v", getattr(attention, values), True),
        ):
            if output:
                handles.append(module.register_forward_hook(save(key, True), with_kwargs=True))
            else:
                handles.append(module.register_forward_pre_hook(save(key, False), with_kwargs=True))

    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    with torch.no_grad():
        output = model(
            input_ids=token_ids[None],
            attention_mask=torch.ones_like(token_ids)[None],
            output_attentions=True,
            use_cache=False,
        )
    model.train(training)
    model.set_attn_implementation(before)
    for handle in handles:
        handle.remove()

    out = []
    for i, layer in enumerate(layers):
        pattern = output.attentions[i][0].double()
        H, T = pattern.shape[:2]
        D = seen[f"{i}.pre"].shape[-1]
        projected = seen[f"{i}.v"]
        if kind == "gpt2":
            v = projected[:, 2 * D :].view(T, H, -1)
            W_O = layer.attn.c_proj.weight.view(H, -1, D)
        elif kind == "gpt_neox":
            v = projected.view(T, H, 3, -1)[:, :, 2]
            W_O = layer.attention.dense.weight.T.reshape(H, -1, D)
        else:
            n_kv = model.config.num_key_value_heads
            v = projected.view(T, n_kv, -1).repeat_interleave(H // n_kv, dim=1)
            W_O = layer.self_attn.o_proj.weight.T.reshape(H, -1, D)
        parallel = kind == "gpt_neox" and model.config.use_parallel_residual
        out.append(
            LayerAccount(
                seen[f"{i}.pre"],
                None if parallel else seen[f"{i}.mid"],
                seen[f"{i}.post"],
                seen[f"{i}.ffn"],
                pattern,
                v,
                W_O.detach().double(),
            )
        )
    return out
