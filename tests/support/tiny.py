"""Tiny random models of the supported families, and the activations of their own eager runs.

Weights are scaled up, since attention is uniform at their initial scale.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from paths import DOCS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

MODELS_PAGE = DOCS / "models.md"
VOCAB = 97
WINDOW = 7
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 50,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_EXPERTS = {
    "intermediate_size": 52,  # grouped products need multiples of 16 bytes
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}
_DEEPSEEK_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "intermediate_size": 52,
    "num_key_value_heads": 6,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 32,
    "pad_token_id": 0,
}
_ALTERNATING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_GEMMA4 = {
    "intermediate_size": 52,
    "head_dim": 8,
    "global_head_dim": 12,
    "sliding_window": WINDOW,
}
_FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _config(name: str, common: dict[str, Any] = _COMMON, **options: Any) -> Callable[..., Any]:
    return lambda: getattr(transformers, f"{name}Config")(**{**common, **options})


class Family(NamedTuple):
    """A supported family: its tiny configuration, and the names of its parts."""

    title: str
    shows: str  # the tested properties, for docs/models.md
    config: Callable[[], PreTrainedConfig]
    layers: str = "model.layers"
    attention: str = "self_attn"
    mid: str | None = "post_attention_layernorm"  # reads resid_mid; None: a parallel block
    out: str = "o_proj"  # the output projection
    values: str | None = None  # the projection to v, of attention outside the interface
    split: Callable[[Tensor], Tensor] | None = None  # its output [T, *] -> v [T, H, V]
    made_by: tuple[int, ...] | None = None  # of each layer's keys and values, where some are shared
    after_mid: bool = False  # `mid` is a norm that makes resid_mid of what it reads
    last: str | None = None  # a norm that makes the layer's output
    # Of a layer, its stream and a part of that: what is passed on of the part to the output of
    # attention, and to that of the FFN.
    to_mid: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    to_post: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    # The factor of the stream when a layer is left.
    scale: Callable[[nn.Module], float] = lambda layer: getattr(layer, "layer_scalar", 1.0)


def _share(n: int) -> float:
    """The factor of Beam's stream at its n-th addition."""
    return ((n - 1) / n) ** 0.5


FAMILIES = {
    "llama": Family("Llama", "grouped-query attention", _config("Llama", num_key_value_heads=2)),
    "llama-bias": Family(
        "Llama with biases",
        "biases of all projections, wide heads",
        _config("Llama", num_key_value_heads=6, head_dim=10, attention_bias=True, mlp_bias=True),
    ),
    "mistral": Family(
        "Mistral",
        "sliding window",
        _config("Mistral", num_key_value_heads=3, sliding_window=WINDOW),
    ),
    "mixtral": Family(
        "Mixtral",
        "mixture of experts, sliding window",
        _config(
            "Mixtral",
            num_key_value_heads=3,
            sliding_window=WINDOW,
            num_local_experts=4,
            intermediate_size=52,
        ),
    ),
    "qwen2": Family("Qwen2", "biases of q, k, v", _config("Qwen2", num_key_value_heads=1)),
    "qwen2_moe": Family(
        "Qwen2-MoE",
        "mixture of experts with a shared one",
        _config("Qwen2Moe", num_key_value_heads=2, shared_expert_intermediate_size=24, **_EXPERTS),
    ),
    "qwen3": Family(
        "Qwen3", "norms of q and k", _config("Qwen3", num_key_value_heads=2, head_dim=10)
    ),
    "qwen3_moe": Family(
        "Qwen3-MoE",
        "norms of q and k, mixture of experts",
        _config("Qwen3Moe", num_key_value_heads=2, head_dim=10, **_EXPERTS),
    ),
    "qwen3_next": Family(
        "Qwen3-Next, softmax layers",
        "output gates, mixture of experts",
        _config(
            "Qwen3Next",
            num_key_value_heads=2,
            head_dim=8,
            layer_types=["full_attention"] * 3,
            shared_expert_intermediate_size=24,
            **_EXPERTS,
        ),
    ),
    "gemma": Family(
        "Gemma", "multi-query attention", _config("Gemma", num_key_value_heads=1, head_dim=10)
    ),
    "gemma2": Family(
        "Gemma 2",
        "soft-capped scores, norms before and after, alternating windows",
        _config(
            "Gemma2",
            num_key_value_heads=2,
            head_dim=10,
            attn_logit_softcapping=5.0,
            query_pre_attn_scalar=10,
            **_ALTERNATING,
        ),
        mid="pre_feedforward_layernorm",
    ),
    "gemma3": Family(
        "Gemma 3",
        "norms before and after, norms of q and k, alternating windows",
        _config("Gemma3Text", num_key_value_heads=2, head_dim=10, **_ALTERNATING),
        mid="pre_feedforward_layernorm",
    ),
    "gemma4": Family(
        "Gemma 4",
        "wider heads in layers without a window, per-layer embeddings, layer scalars",
        _config(
            "Gemma4Text",
            num_key_value_heads=2,
            hidden_size_per_layer_input=10,
            vocab_size_per_layer_input=VOCAB,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            **_GEMMA4,
        ),
        mid="pre_feedforward_layernorm",
    ),
    "gemma4-moe": Family(
        "Gemma 4 with experts",
        "experts beside a dense FFN, values that share the keys' projection, fewer KV heads in "
        "layers without a window",
        _config(
            "Gemma4Text",
            num_key_value_heads=3,
            num_global_key_value_heads=2,
            attention_k_eq_v=True,
            hidden_size_per_layer_input=0,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=20,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            **_GEMMA4,
        ),
        mid="pre_feedforward_layernorm",
    ),
    "gemma4_shared": Family(
        "Gemma 4, shared keys",
        "keys and values shared between layers, norms before and after",
        _config(
            "Gemma4Text",
            num_hidden_layers=5,
            num_key_value_heads=2,
            num_global_key_value_heads=2,
            head_dim=10,
            global_head_dim=10,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2 + ["full_attention"],
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=10,
            vocab_size_per_layer_input=VOCAB,
            pad_token_id=0,
        ),
        mid="pre_feedforward_layernorm",
        made_by=(0, 1, 2, 1, 1),
    ),
    "phi": Family(
        "Phi",
        "parallel block, partial rotary",
        _config("Phi", partial_rotary_factor=0.34),
        mid=None,
        out="dense",
    ),
    "phi3": Family(
        "Phi-3",
        "fused projections, sliding window",
        _config("Phi3", num_key_value_heads=2, sliding_window=WINDOW, pad_token_id=0),
    ),
    "gpt2": Family(
        "GPT-2",
        "learned positions",
        _config("GPT2", _GPT),
        layers="transformer.h",
        attention="attn",
        mid="ln_2",
        out="c_proj",
    ),
    "gpt_bigcode": Family(
        "GPT-BigCode (StarCoder)",
        "multi-query attention",
        _config("GPTBigCode", _GPT, multi_query=True),
        layers="transformer.h",
        attention="attn",
        mid="ln_2",
        out="c_proj",
    ),
    "gpt_neo": Family(
        "GPT-Neo",
        "outside the interface; local attention",
        _config(
            "GPTNeo",
            {},
            vocab_size=VOCAB,
            hidden_size=36,
            num_layers=3,
            num_heads=6,
            attention_types=[[["global", "local", "local"], 1]],
            window_size=WINDOW,
            intermediate_size=50,
            max_position_embeddings=96,
            bos_token_id=0,
            eos_token_id=1,
        ),
        layers="transformer.h",
        attention="attn.attention",
        mid="ln_2",
        out="out_proj",
        values="v_proj",
        split=lambda x: x.view(len(x), 6, -1),
    ),
    "gptj": Family(
        "GPT-J",
        "outside the interface; parallel block",
        _config("GPTJ", _GPT, rotary_dim=4),
        layers="transformer.h",
        attention="attn",
        mid=None,
        out="out_proj",
        values="v_proj",
        split=lambda x: x.view(len(x), 6, -1),
    ),
    "gpt_neox": Family(
        "GPT-NeoX",
        "parallel block",
        _config("GPTNeoX"),
        layers="gpt_neox.layers",
        attention="attention",
        mid=None,
        out="dense",
    ),
    "gpt_neox-sequential": Family(
        "GPT-NeoX, sequential",
        "sequential block",
        _config("GPTNeoX", use_parallel_residual=False),
        layers="gpt_neox.layers",
        attention="attention",
        out="dense",
    ),
    "opt": Family(
        "OPT",
        "rows merged with the batch",
        _config(
            "OPT",
            {},
            vocab_size=VOCAB,
            hidden_size=36,
            num_hidden_layers=3,
            num_attention_heads=6,
            ffn_dim=50,
            max_position_embeddings=96,
            word_embed_proj_dim=36,
        ),
        layers="model.decoder.layers",
        mid="final_layer_norm",
        out="out_proj",
    ),
    "bloom": Family(
        "BLOOM",
        "outside the interface; ALiBi",
        _config("Bloom", {}, vocab_size=VOCAB, hidden_size=36, n_layer=3, n_head=6),
        layers="transformer.h",
        attention="self_attention",
        out="dense",
        values="query_key_value",
        split=lambda x: x.view(len(x), 6, 3, -1)[:, :, 2],
    ),
    "mpt": Family(
        "MPT",
        "outside the interface; ALiBi",
        _config(
            "Mpt",
            {},
            vocab_size=VOCAB,
            d_model=36,
            n_layers=3,
            n_heads=6,
            max_seq_len=96,
            expansion_ratio=2,
        ),
        layers="transformer.blocks",
        attention="attn",
        mid="norm_2",
        out="out_proj",
        values="Wqkv",
        split=lambda x: x.chunk(3, dim=-1)[2].view(len(x), 6, -1),
    ),
    "falcon": Family(
        "Falcon",
        "outside the interface; parallel block, multi-query attention",
        _config("Falcon", _FALCON, bias=False),
        layers="transformer.h",
        attention="self_attention",
        mid=None,
        out="dense",
        values="query_key_value",
        split=lambda x: x.view(len(x), 8, -1)[:, -1:].expand(-1, 6, -1),
    ),
    "falcon-new": Family(
        "Falcon, new decoder",
        "outside the interface; two norms, grouped-query attention",
        _config("Falcon", _FALCON, new_decoder_architecture=True, num_kv_heads=2),
        layers="transformer.h",
        attention="self_attention",
        mid=None,
        out="dense",
        values="query_key_value",
        split=lambda x: x.view(len(x), 2, 5, -1)[:, :, -1].repeat_interleave(3, dim=1),
    ),
    "codegen": Family(
        "CodeGen",
        "outside the interface; parallel block",
        _config("CodeGen", _GPT, n_embd=32, n_head=4, rotary_dim=4),
        layers="transformer.h",
        attention="attn",
        mid=None,
        out="out_proj",
        values="qkv_proj",
        split=lambda x: x.view(len(x), 4, 3, -1)[:, :, 1].reshape(len(x), 4, -1),
    ),
    "cohere": Family(
        "Cohere", "parallel block", _config("Cohere", num_key_value_heads=2), mid=None
    ),
    "cohere2": Family(
        "Cohere 2",
        "parallel block, alternating windows",
        _config("Cohere2", num_key_value_heads=2, **_ALTERNATING),
        mid=None,
    ),
    "olmo": Family("OLMo", "norms without weights", _config("Olmo", num_key_value_heads=2)),
    "olmo2": Family(
        "OLMo 2", "norms after only", _config("Olmo2", num_key_value_heads=2), mid="mlp"
    ),
    "olmo3": Family(
        "OLMo 3",
        "norms after only, alternating windows",
        _config("Olmo3", num_key_value_heads=2, **_ALTERNATING),
        mid="mlp",
    ),
    "olmoe": Family(
        "OLMoE",
        "mixture of experts",
        _config(
            "Olmoe",
            num_key_value_heads=2,
            intermediate_size=52,
            num_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    "stablelm": Family("StableLM", "partial rotary", _config("StableLm", num_key_value_heads=2)),
    "stablelm-parallel": Family(
        "StableLM, parallel",
        "parallel block",
        _config("StableLm", num_key_value_heads=2, use_parallel_residual=True),
        mid=None,
    ),
    "starcoder2": Family(
        "StarCoder2",
        "sliding window",
        _config("Starcoder2", num_key_value_heads=2, sliding_window=WINDOW),
    ),
    "granite": Family(
        "Granite",
        "multipliers of embeddings, scores, residuals, logits",
        _config(
            "Granite",
            num_key_value_heads=2,
            residual_multiplier=0.6,
            attention_multiplier=0.2,
            embedding_multiplier=0.2,
            logits_scaling=2.0,
        ),
    ),
    "glm4": Family(
        "GLM-4",
        "norms before and after, partial rotary",
        _config("Glm4", num_key_value_heads=2, head_dim=8, pad_token_id=0),
    ),
    "smollm3": Family(
        "SmolLM3",
        "layers without rotary",
        _config("SmolLM3", num_key_value_heads=2, no_rope_layer_interval=2, pad_token_id=0),
    ),
    "nemotron": Family(
        "Nemotron", "partial rotary", _config("Nemotron", num_key_value_heads=2, head_dim=6)
    ),
    "deepseek_v3": Family(
        "DeepSeek-V3",
        "latent attention, mixture of experts",
        _config(
            "DeepseekV3",
            intermediate_size=52,
            num_key_value_heads=6,
            q_lora_rank=12,
            kv_lora_rank=10,
            qk_rope_head_dim=4,
            qk_nope_head_dim=6,
            v_head_dim=8,
            **_DEEPSEEK_EXPERTS,
        ),
    ),
    "deepseek_v32": Family(
        "DeepSeek-V3.2, up to its index_topk tokens",
        "latent attention, a choice of keys that chooses all",
        _config("DeepseekV32", **_LATENT, **_DEEPSEEK_EXPERTS),
    ),
    "glm_moe_dsa": Family(
        "GLM-MoE-DSA, up to its index_topk tokens",
        "latent attention, a choice of keys that chooses all",
        _config("GlmMoeDsa", **_LATENT, **_DEEPSEEK_EXPERTS),
    ),
    "afmoe": Family(
        "AFMoE",
        "output gates, norms before and after, alternating windows, mixture of experts",
        _config(
            "Afmoe",
            num_key_value_heads=2,
            head_dim=6,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            num_dense_layers=1,
            **_ALTERNATING,
        ),
        mid="pre_mlp_layernorm",
    ),
    "laguna": Family(
        "Laguna",
        "gates that are made after attention, mixture of experts",
        _config(
            "Laguna",
            num_key_value_heads=2,
            head_dim=6,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
        ),
    ),
    "glm4_moe": Family(
        "GLM-4-MoE",
        "mixture of experts",
        _config(
            "Glm4Moe",
            intermediate_size=52,
            num_key_value_heads=2,
            head_dim=6,
            **_DEEPSEEK_EXPERTS,
        ),
    ),
    "gpt_oss": Family(
        "GPT-OSS",
        "attention sinks, mixture of experts, alternating windows",
        _config(
            "GptOss",
            intermediate_size=52,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **_ALTERNATING,
        ),
    ),
    "exaone4": Family(
        "EXAONE 4",
        "norms after only, norms of q and k, alternating windows",
        _config("Exaone4", num_key_value_heads=2, **_ALTERNATING),
        mid="mlp",
    ),
    "persimmon": Family(
        "Persimmon",
        "norms of q and k",
        _config("Persimmon", partial_rotary_factor=0.34),
        out="dense",
    ),
    "helium": Family(
        "Helium", "grouped-query attention", _config("Helium", num_key_value_heads=2, head_dim=6)
    ),
    "seed_oss": Family(
        "Seed-OSS", "biases of q, k, v", _config("SeedOss", num_key_value_heads=2, head_dim=6)
    ),
    "bert": Family(
        "BERT",
        "norms of the whole stream after attention and FFN",
        _config("Bert", is_decoder=True),
        layers="bert.encoder.layer",
        attention="attention",
        mid="output.LayerNorm",
        out="output.dense",
        after_mid=True,
        last="output.LayerNorm",
    ),
    "bart": Family(
        "BART",
        "norms of the whole stream after attention and FFN",
        _config(
            "Bart",
            {},
            vocab_size=VOCAB,
            d_model=36,
            decoder_layers=3,
            decoder_attention_heads=6,
            decoder_ffn_dim=50,
            max_position_embeddings=96,
            forced_eos_token_id=None,
        ),
        layers="model.decoder.layers",
        mid="self_attn_layer_norm",
        out="out_proj",
        after_mid=True,
        last="final_layer_norm",
    ),
    "openai-gpt": Family(
        "GPT",
        "outside the interface; norms of the whole stream after attention and FFN",
        _config("OpenAIGPT", _GPT),
        layers="transformer.h",
        attention="attn",
        mid="ln_1",
        out="c_proj",
        values="c_attn",
        split=lambda x: x.chunk(3, dim=-1)[2].view(len(x), 6, -1),
        after_mid=True,
        last="ln_2",
    ),
    "opt-post_norm": Family(
        "OPT-350m",
        "rows merged with the batch; norms of the whole stream after attention and FFN",
        _config(
            "OPT",
            {},
            vocab_size=VOCAB,
            hidden_size=36,
            num_hidden_layers=3,
            num_attention_heads=6,
            ffn_dim=50,
            max_position_embeddings=96,
            word_embed_proj_dim=36,
            do_layer_norm_before=False,
        ),
        layers="model.decoder.layers",
        mid="self_attn_layer_norm",
        out="out_proj",
        after_mid=True,
        last="final_layer_norm",
    ),
    "doge": Family(
        "Doge, up to its keep_window_size tokens",
        "weights on the residual stream",
        _config("Doge", num_key_value_heads=2, keep_window_size=96),
        to_mid=lambda layer, _, part: layer.input_residual.detach() * part,
        to_post=lambda layer, _, part: layer.post_attention_residual.detach() * part,
    ),
    "beam": Family(
        "Beam",
        "a residual stream that is scaled by depth, norms after",
        _config("Beam", num_key_value_heads=2, head_dim=6),
        mid="pre_feedforward_layernorm",
        to_mid=lambda layer, _, part: _share(layer.attn_residual_add_idx) * part,
        scale=lambda layer: _share(layer.mlp_residual_add_idx),
    ),
    "minimax": Family(
        "MiniMax, softmax layers",
        "a norm of the stream in place of the stream, scaled; mixture of experts",
        _config(
            "MiniMax",
            intermediate_size=52,
            num_key_value_heads=2,
            head_dim=6,
            num_local_experts=4,
            layer_types=["full_attention"] * 3,
            full_attn_alpha_factor=1.3,
            full_attn_beta_factor=0.8,
            mlp_alpha_factor=0.7,
            mlp_beta_factor=1.2,
        ),
        after_mid=True,
        to_mid=lambda layer, x, part: 1.3 * held(layer.input_layernorm, x, part),
        scale=lambda _: 0.7,
    ),
}
# Families that are tested with every combination of options.
CONFIGS = (
    "llama",
    "llama-bias",
    "mistral",
    "qwen2",
    "gpt2",
    "gpt_neox",
    "gpt_neox-sequential",
)


class Refusal(NamedTuple):
    """A family that is refused, and the reason."""

    title: str
    reason: str  # for docs/models.md
    config: Callable[[], PreTrainedConfig]
    message: str  # a pattern that the error matches


REFUSALS = {
    "falcon-alibi": Refusal(
        "Falcon with ALiBi",
        "its position bias is rounded to bfloat16, so not linear in the distance",
        _config("Falcon", _FALCON, alibi=True, num_attention_heads=12, parallel_attn=False),
        r"FalconAttention adds a position bias .* not linear in the distance",
    ),
    "llama4": Refusal(
        "Llama 4, beyond its attention chunk",
        "attention in chunks, neither causal nor a sliding window",
        _config(
            "Llama4Text",
            pad_token_id=0,
            num_key_value_heads=2,
            head_dim=8,
            attention_chunk_size=8,
            num_local_experts=2,
            intermediate_size_mlp=40,
        ),
        "Llama4TextAttention reads keys other than all past ones",
    ),
    "lfm2": Refusal(
        "LFM2, and other mixtures with convolutions",
        "a convolution reads other positions without weights",
        _config("Lfm2", num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"]),
        r"layer model\.layers\.0 mixes positions by conv \(Lfm2ShortConv\)",
    ),
    "mamba": Refusal(
        "Mamba, Jamba, FalconMamba, RecurrentGemma, RWKV",
        "its states decay by other numbers in each channel, so that no weight of a head says how "
        "much of its output came from which position",
        _config("Mamba", {}, vocab_size=VOCAB, hidden_size=36, num_hidden_layers=2),
        r"no softmax attention .*layer backbone\.layers\.0 mixes positions by mixer \(MambaMixer",
    ),
    "deepseek_v32-sparse": Refusal(
        "DeepSeek-V3.2 and GLM-MoE-DSA, beyond their index_topk tokens",
        "each row reads keys of its own choice",
        _config("DeepseekV32", **{**_LATENT, "index_topk": 8}, **_DEEPSEEK_EXPERTS),
        r"Attention reads keys that it chooses from the text, by indexer \(DeepseekV32Indexer\)",
    ),
    "xmod": Refusal(
        "X-MOD",
        "an adapter between two norms of the whole stream",
        _config("Xmod", is_decoder=True, default_language="en_XX", pad_token_id=0),
        r"layers?\.0 .*its output is made by a submodule that is no norm of resid_mid plus",
    ),
    "cpmant": Refusal(
        "CPM-Ant, ProphetNet",
        "their layers run on rows that are no token's",
        _config(
            "CpmAnt",
            {},
            vocab_size=VOCAB,
            hidden_size=36,
            num_attention_heads=6,
            dim_head=6,
            dim_ff=50,
            num_hidden_layers=2,
            prompt_length=4,
        ),
        r"layer cpmant\.encoder\.layers\.0 is run on 15 rows at 11 tokens",
    ),
    "gemma3n": Refusal(
        "Gemma 3n",
        "four residual streams at once",
        _config(
            "Gemma3nText",
            pad_token_id=0,
            num_key_value_heads=2,
            head_dim=6,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB,
            laurel_rank=4,
            num_kv_shared_layers=0,
            activation_sparsity_pattern=[0.0] * 3,
        ),
        r"states of shape \(4, 1, 11, 36\)",
    ),
}


def config_of(family: str) -> PreTrainedConfig:
    """The configuration of a family; the test is skipped where transformers is older than it."""
    try:
        return (FAMILIES.get(family) or REFUSALS[family]).config()
    except AttributeError as error:
        if "module transformers has no attribute" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__}: {error}")


# Refused too, and tested where quantized weights are.
QUANTIZED = [
    (
        "quantized activations (bitsandbytes' int8, torchao's dynamic ones)",
        "they are rounded before the output projection; open `model.dequantize()`",
    ),
    ("quanto's int4", "its weights cannot be used in torch.inference_mode"),
]


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a family, with non-zero biases and norm weights away from 1."""
    torch.manual_seed(seed)
    config = config_of(family)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(20 if re.search("embed|wte", name) else 6)
                parameter.mul_(2 if re.search("q_|k_|qkv|query|c_attn", name) else 1)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(0.5 + torch.rand(()))
    model.tiny_family = family
    if dtype != torch.float32:  # grouped products lack float64 and narrow rows
        model.config._experts_implementation = "eager"
    return model.to(dtype)


def tiny_text(n_tokens: int, seed: int = 0) -> Tensor:
    """Random token ids [n_tokens]."""
    return torch.randint(VOCAB, (n_tokens,), generator=torch.Generator().manual_seed(seed))


class LayerAccount(NamedTuple):
    """One layer of an eager run of the model, float64; T positions."""

    resid_pre: Tensor  # [T, D]
    resid_mid: Tensor | None  # [T, D]; None in a parallel block
    resid_post: Tensor  # [T, D]
    ffn: Tensor  # [T, D] all that is added to resid_mid; resid_post = scale * (resid_mid + ffn)
    pattern: Tensor  # [H, T, T]
    v: Tensor  # [T, H, V], repeated to all heads
    W_O: Tensor  # [H, V, D]
    gate: Tensor | None  # [T, H, V] factor of the attention output
    after: Tensor | None  # [T, D] factor of the output projection's output, by a norm or a number
    scale: float = 1.0  # factor of the whole stream
    made_by: int | None = None  # the layer from whose resid_pre v was made; None: this one
    # How parts [..., T, D] of resid_pre are passed on to resid_mid, and of resid_mid to resid_post,
    # where it is not as they are.
    to_mid: Callable[[Tensor], Tensor] | None = None
    to_post: Callable[[Tensor], Tensor] | None = None
    to_out: Callable[[Tensor], Tensor] | None = None  # parts of the FFN's output likewise

    @property
    def unscaled(self) -> Tensor:
        """[T, D]: resid_post before its factor."""
        return self.resid_post / self.scale


def held(norm: nn.Module, x: Tensor, part: Tensor) -> Tensor:
    """What a norm makes of a part [..., D] of its input x, with the statistics of x [..., D]."""
    eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    if isinstance(norm, nn.LayerNorm):
        part, x = part - part.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
    return part / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight.detach()


def account(model: PreTrainedModel, token_ids: Tensor) -> list[LayerAccount]:
    """The model's activations in float64, from its own eager attention and by the names of its own
    modules: nothing here goes through ifr_fast.
    """
    family = FAMILIES[getattr(model, "tiny_family", model.config.model_type)]
    model = copy.deepcopy(model).double().eval()
    # The setter would refuse this for attention outside the interface.
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"  # grouped products lack float64
    layers = model.get_submodule(family.layers)
    seen: dict[tuple[str, int], Tensor] = {}
    handles = []

    def save(key: tuple[str, int], x: Any) -> None:
        x = x[0] if isinstance(x, tuple | list) else x
        seen[key] = x.double().reshape(len(token_ids), -1).clone()

    def before(key: str, i: int, module: nn.Module) -> None:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            save((key, i), args[0] if args else kwargs["hidden_states"])

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(key: str, i: int, module: nn.Module) -> None:
        handles.append(module.register_forward_hook(lambda _, __, x: save((key, i), x)))

    patterns: dict[int, Tensor] = {}
    attentions = [layer.get_submodule(family.attention) for layer in layers]
    for i, (layer, attention) in enumerate(zip(layers, attentions, strict=True)):
        before("pre", i, layer)
        after("post", i, layer)
        if family.mid is not None:
            of = attention if family.attention == "attention" and family.after_mid else layer
            before("mid", i, of.get_submodule(family.mid))
            after("normed", i, of.get_submodule(family.mid))
        if family.last is not None:
            before("last", i, layer.get_submodule(family.last))
        after("attention", i, attention)
        before("gated", i, attention.get_submodule(family.out))
        after("out", i, attention.get_submodule(family.out))
        if family.values is not None:
            after("v", i, attention.get_submodule(family.values))
        handles.append(
            attention.register_forward_hook(lambda _, __, x, i=i: patterns.update({i: x[1][0]}))
        )

    source = sys.modules[type(attentions[0]).__module__]
    eager = getattr(source, "eager_attention_forward", None)

    def seeing_values(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kw: Any):
        v_of_head = v[0].transpose(0, 1)
        repeated = v_of_head.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        of = next(i for i, attention in enumerate(attentions) if module in attention.modules())
        save(("v", of), repeated)
        return eager(module, q, k, v, *args, **kw)

    if eager is not None:
        source.eager_attention_forward = seeing_values
    try:
        with torch.no_grad():
            model(
                input_ids=token_ids[None],
                attention_mask=torch.ones_like(token_ids)[None],
                output_attentions=True,
                use_cache=False,
            )
    finally:
        if eager is not None:
            source.eager_attention_forward = eager
        for handle in handles:
            handle.remove()

    accounts = []
    for i in range(len(layers)):
        pattern = patterns[i].double()
        H, T = pattern.shape[:2]
        v = seen["v", i]
        v = v.view(T, H, -1) if family.split is None else family.split(v)
        pre, post = seen["pre", i], seen["post", i]
        mid = seen.get(("mid", i))
        to_mid = None
        if family.to_mid is not None:
            to_mid = partial(family.to_mid, layers[i], pre)
        passed = pre if to_mid is None else to_mid(pre)
        attended = seen["attention", i] if mid is None else mid - passed
        scale = float(family.scale(layers[i]))
        z = torch.einsum("htj,jhv->thv", pattern, v)
        of = LayerAccount(
            pre,
            mid,
            post,
            post / scale - (pre + attended if mid is None else mid),
            pattern,
            v,
            _out_map(attentions[i].get_submodule(family.out), H * v.shape[-1]).view(
                H, -1, pre.shape[-1]
            ),
            _quotient(seen["gated", i].view(z.shape), z),
            _quotient(attended, seen["out", i]),
            scale,
            None if family.made_by is None else family.made_by[i],
        )
        of = of._replace(to_mid=to_mid)
        if family.after_mid or family.to_post is not None:
            of = _behind_norms(family, layers[i], attentions[i], of, seen, i)
        accounts.append(of)
    return accounts


@torch.no_grad()
def _behind_norms(
    family: Family,
    layer: nn.Module,
    attention: nn.Module,
    of: LayerAccount,
    seen: dict[tuple[str, int], Tensor],
    i: int,
) -> LayerAccount:
    """The account of a layer with norms and weights on its residual connection."""
    if family.after_mid:
        inside = attention if family.attention == "attention" else layer
        norm, summed = inside.get_submodule(family.mid), seen["mid", i]
        W_O = of.W_O if of.after is None else of.W_O * of.after[0, 0]
        factor = held(norm, summed, summed)[:, :1] / held(norm, summed[:1], summed)[:, :1]
        before = (lambda part: part) if of.to_mid is None else of.to_mid
        of = of._replace(
            resid_mid=seen["normed", i],
            to_mid=lambda part: held(norm, summed, before(part)),
            W_O=held(norm, summed[:1], W_O),
            after=factor.expand_as(summed),
        )
    mid = of.resid_mid
    if family.to_post is not None:
        to_post = partial(family.to_post, layer, mid)
        return of._replace(to_post=to_post, ffn=of.resid_post - to_post(mid))
    if family.last is None:
        return of._replace(ffn=of.unscaled - mid)
    last, whole = layer.get_submodule(family.last), seen["last", i]
    to_out = partial(held, last, whole)
    return of._replace(to_post=to_out, to_out=to_out, ffn=to_out(whole - mid))


@torch.no_grad()
def _out_map(out: nn.Module, width: int) -> Tensor:
    """The matrix [width, D] of an output projection, adapters included."""
    eye = torch.eye(width, dtype=next(out.parameters()).dtype)
    return (out(eye[None]) - out(torch.zeros_like(eye)[None]))[0].double()


def _quotient(x: Tensor, y: Tensor) -> Tensor | None:
    """x / y; None if it is 1."""
    return None if torch.allclose(x, y, rtol=1e-5, atol=1e-4) else x / y


def model_tables() -> list[str]:
    """The tables of supported and refused families in docs/models.md."""

    def table(*rows: tuple[str, str]) -> str:
        return "".join(f"| {first} | {second} |\n" for first, second in rows)

    head = ("---", "---")
    supported = [(family.title, family.shows) for family in FAMILIES.values()]
    refused = [(refusal.title, refusal.reason) for refusal in REFUSALS.values()] + QUANTIZED
    return [
        table(("family", "tested with"), head, *supported),
        table(("refused", "because"), head, *refused),
    ]


def main() -> None:
    """Rewrites the tables in docs/models.md; each replaces the table with the same head."""
    text = MODELS_PAGE.read_text()
    for table in model_tables():
        first = re.escape(table.splitlines()[0])
        text, n = re.subn(rf"{first}\n(\|.*\n)*", lambda _, table=table: table, text)
        assert n == 1, first
    MODELS_PAGE.write_text(text)


if __name__ == "__main__":
    main()
