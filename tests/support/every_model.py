"""A tiny random model of every causal language model that the installed transformers knows.

One generic configuration: whichever of the usual attributes a class has are made small. EXCEPTIONS
holds what a few classes need beside it.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Classes for causal language modeling, and the model types of each.
CLASSES: dict[str, list[str]] = {}
for _type, _name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
    CLASSES.setdefault(_name, []).append(_type)
VOCAB = 97
WINDOW = 6
WIDTH, HEADS, KV_HEADS, HEAD = 32, 4, 2, 8
LAYERS = 2

# Attributes that several classes share, by their meaning.
_SHARED = f"""
{VOCAB} vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size
{VOCAB} pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab
{WIDTH} hidden_size d_model n_embd emb_dim embedding_size input_embedding_size output_embedding_size
{WIDTH} word_embed_proj_dim embedding_dim lru_width backbone_hidden_size hidden_size_global
{WIDTH} cross_attention_hidden_size dim_model_base
{HEADS} num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
{HEADS} encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
{HEADS} swa_num_attention_heads mamba_n_heads mamba_num_heads n_mamba_heads linear_num_value_heads
{HEADS} linear_num_heads
{KV_HEADS} num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads
{KV_HEADS} indexer_kv_heads indexer_n_heads index_n_heads
{HEAD} head_dim v_head_dim attention_head_dim kv_channels dim_head d_head attention_head_size
{HEAD} swa_head_dim global_head_dim mamba_d_head mamba_head_dim linear_head_dim linear_key_head_dim
{HEAD} linear_value_head_dim query_pre_attn_scalar mamba_d_state state_size ssm_state_size
{HEAD} pronunciation_embed_dim shape_embed_dim indexer_head_dim index_head_dim
{HEAD} hidden_size_per_layer_input ple_embed_dim o_lora_rank
{LAYERS} num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
{LAYERS} num_decoder_layers num_encoder_layers num_blocks num_layers_per_stack
48 intermediate_size n_inner ffn_dim dff dim_ff d_inner decoder_ffn_dim encoder_ffn_dim
48 ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size
48 prefix_dense_intermediate_size
16 moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
16 shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size
16 router_hidden_size q_lora_rank
12 kv_lora_rank qk_nope_head_dim
4 num_experts n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim rotary_dim
4 laurel_rank gated_norm_rank d_rel adapter_rank mamba_chunk_size chunk_size zero_expert_num
4 moe_latent_size index_topk indexer_budget hc_lowrank prompt_length num_buckets
4 relative_max_distance
2 index_block_size index_topk_blocks indexer_compress_ratio num_experts_per_tok moe_topk moe_k
2 top_k_experts n_groups linear_conv_kernel_dim
1 expand mamba_expand n_group topk_group n_shared_experts first_k_dense_replace
1 moe_num_shared_experts num_dense_layers
0 num_kv_shared_layers
{WINDOW} sliding_window sliding_window_size window_size attention_window_size local_attention
{WINDOW} keep_window_size attention_chunk_size
96 max_position_embeddings n_positions n_ctx max_seq_len max_target_positions
96 original_max_position_embeddings context_length
"""
_SMALL = {
    name: int(value)
    for value, *names in map(str.split, _SHARED.strip().splitlines())
    for name in names
}

_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
_ASSISTANT = {
    "text_config": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": LAYERS,
    }
}
# Attributes of single classes, in place of the generic ones.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROTARY}},
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "falcon_h1": {"mamba_d_ssm": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "qwen4_exp_text": {"indexer_kv_heads": 1},
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 12)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(name: str) -> PreTrainedConfig:
    """The generic small configuration of a class."""
    config_class = getattr(transformers, name).config_class
    return config_class(**_arguments(config_class, EXCEPTIONS.get(config_class.model_type, {})))


def _arguments(config_class: type[PreTrainedConfig], exceptions: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make a configuration small."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    names = fields | set(config_class.attribute_map)
    found: dict[str, Any] = {}
    for name in sorted(fields):
        if name in _SMALL:
            found[name] = _SMALL[name]
        elif re.search(r"_token_(id|index)$|^(cls|mask|unk)_", name):
            value = getattr(config_class, name, None)
            if isinstance(value, int) and value >= VOCAB:
                found[name] = 3
    if "is_decoder" in names:
        found["is_decoder"] = True
    if "kv_lora_rank" in fields:  # latent attention has no groups
        found["num_key_value_heads"] = HEADS
    for name in fields & {"layer_types", "layers_block_type"}:  # one layer of each kind
        each = list(dict.fromkeys(getattr(config_class(), name) or ()))
        if each:
            found[name] = each if len(each) > 1 else each * LAYERS
            found["num_hidden_layers"] = len(found[name])
    for name, part in config_class.sub_configs.items():
        spec = config_class.sub_configs_defaults.get(name)
        if part is AutoConfig and spec is not None and spec.model_type in CONFIG_MAPPING:
            part = CONFIG_MAPPING[spec.model_type]
        if spec is None or not spec.optional:
            found[name] = _arguments(part, exceptions.get(name, {}))
            found[name]["model_type"] = part.model_type
    return {**found, **{k: v for k, v in exceptions.items() if k not in config_class.sub_configs}}


def every_model(name: str) -> PreTrainedModel:
    """A random float32 model of a class, with attention far from uniform."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(tiny_config(name))
    with torch.no_grad():
        for of, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
                continue
            wide = 1.0 if re.search("embed|wte", of) else 0.7
            fan_in = 1 if wide == 1.0 else min(parameter.shape[-2:])
            nn.init.normal_(parameter, std=wide * fan_in**-0.5)
            if re.search("q_|k_|qkv|query|key|c_attn", of):
                parameter.mul_(1.6)
    return model.eval()
