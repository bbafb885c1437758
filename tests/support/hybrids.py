"""Tiny random models with linear attention beside softmax attention."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from tiny import VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 52,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
}
_KIMI = {
    "head_dim": None,
    "num_key_value_heads": 6,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "linear_num_heads": 4,
    "linear_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "dense"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}
_STATES = {
    "mamba_n_heads": 6,
    "mamba_d_head": 12,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_GRANITE = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 24,
}
_MAMBA = {"num_heads": 6, "head_dim": 12, "state_size": 8, "n_groups": 2, "chunk_size": 16}
_LIGHTNING = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "block_size": 16,
}
_NEMOTRON = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
    "mamba_num_heads": 6,
    "mamba_head_dim": 12,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "n_routed_experts": 4,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 24,
}
# The configuration's class, and its arguments.
HYBRIDS: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3_next": ("Qwen3NextConfig", _DELTA | _EXPERTS),
    "qwen3_5": ("Qwen3_5TextConfig", _DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", _DELTA | _EXPERTS),
    "olmo_hybrid": ("OlmoHybridConfig", _DELTA),
    "kimi_linear": ("KimiLinearConfig", _KIMI),
    "bamba": ("BambaConfig", _STATES | {"attn_layer_indices": [1]}),
    "granite_hybrid": ("GraniteMoeHybridConfig", _STATES | _GRANITE),
    "mamba2": ("Mamba2Config", _MAMBA),
    "minimax": ("MiniMaxConfig", _LIGHTNING),
    "nemotron_h": ("NemotronHConfig", _NEMOTRON),
}
N_TOKENS = 70  # more than a chunk of the recurrence


def hybrid(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model, its weights scaled up as those of tiny.tiny_model are."""
    config, arguments = HYBRIDS[name]
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    torch.manual_seed(seed)
    made = getattr(transformers, config)(**(_COMMON | arguments))
    model = AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for of, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(20 if re.search("embed", of) else 5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    if dtype != torch.float32:  # grouped products lack float64 and narrow rows
        model.config._experts_implementation = "eager"
    return model.to(dtype).eval()


def hybrid_text(n_tokens: int = N_TOKENS, seed: int = 0) -> Tensor:
    """Random token ids [n_tokens]."""
    return torch.randint(VOCAB, (n_tokens,), generator=torch.Generator().manual_seed(seed))
