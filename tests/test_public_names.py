"""The names that other tools call: none of them may vanish."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
from tiny import tiny_model

from ifr_fast import Tracer

PUBLIC = {
    "ifr_fast": """
        EdgeKind FormatError GenerationStep IfrError LayerScores MemoryBudgetError NodeKind Plan
        Recording RouteGraph Routes Span Tracer UnsupportedArchitectureError __version__
    """,
    "ifr_fast.Tracer": """
        contribution_map contributions from_pretrained generate likeliest load_recording
        logit_lens neurons plan promoted_tokens record trace trace_all
    """,
    "ifr_fast.RouteGraph": """
        compare edges ffn_importance granularity head_edges head_importance load n_heads
        n_layers node_importance parallel plot position predictions prune reach routes_from save
        save_neuronpedia span starts steps threshold to_arrow to_dot to_graphml to_html to_json
        to_networkx to_neuronpedia to_pandas to_parquet token_ids token_importance tokens top_paths
        top_routes unattributed
    """,
    "ifr_fast.Routes": """
        at ffn_importance granularity head_frequency head_importance layers load n_heads
        n_layers predict reach save scored_threshold threshold token_ids tokens
    """,
    "ifr_fast.Plan": """
        added_bytes available_bytes chunk_rows full_bytes kv_bytes lean_bytes lines maps_bytes
        mode n_tokens place recording_bytes scoring_bytes seconds total_bytes weights_bytes
        working_bytes
    """,
    "ifr_fast.Recording": """
        checked_rows decoder is_replayed layers logits mode nbytes position resid_final
        resid_post save states token_ids tokens
    """,
    "ifr_fast.circuits": """
        Activations Agreement Components Curves Effects Interval Observed Prompt Selection
        Settings Survival Task ablate ablated_logits agreement agreement_with
        attention_selection attention_weights auc components contrastive greater_than
        intervening ioi make_report mean_activations mean_interval membership observe patch
        precision_at published_circuit random_selection rank_correlation restarting roc_curve
        run selected survival token_faithfulness zero_activations
    """,
    "ifr_fast.survey": """
        Problem Source State Survey Table survey
    """,
    "ifr_fast.compat.flashtrace": """
        FlashTrace IFRAggregate IFRLayerResult MultiHopIFRResult STOP_TOKENS TokenScore
        TraceResult load_model_and_tokenizer
    """,
    "ifr_fast.compat.llm_transparency_tool": """
        ModelInfo TransformerLensTransparentLlm TransparentLlm apply_threshold_and_renormalize
        build_full_graph build_paths_to_predictions get_attention_contributions
        get_contributions get_contributions_with_one_off_part get_decomposed_mlp_contributions
        get_mlp_contributions install
    """,
    "ifr_fast.compat.transformer_lens": """
        Cache CachedRun
    """,
    "ifr_fast.compat.eap_ig": """
        Edge Graph Node attribute score_components
    """,
    "ifr_fast.kernels.contract": """
        AttentionScores EdgeList FFNScores LayerInputs visible
    """,
    "ifr_fast.kernels.breakpoints": """
        breakpoints column_norms signs value_space_signs
    """,
    "ifr_fast.kernels.reference": """
        attention_pattern proximity score_attention score_ffn
    """,
    "ifr_fast.kernels.eager": """
        score_attention score_ffn
    """,
    "ifr_fast.kernels.neurons": """
        neuron_proximities
    """,
    "ifr_fast.kernels.cpu.kernel": """
        Counters StepLayer StepScores isas pool score_attention score_attention_counted
        score_ffn unavailable
    """,
    "ifr_fast.kernels.triton.kernel": """
        score_attention score_ffn
    """,
    "ifr_fast.LayerScores": """
        layer rows residual ffn ffn_residual head_total token_edges head_edges unattributed
        ffn_unattributed keep
    """,
}


@pytest.mark.parametrize("home", PUBLIC)
def test_public_names_are_there(home: str) -> None:
    owner, _, name = home.rpartition(".")
    try:
        target = importlib.import_module(home)
    except ModuleNotFoundError:
        target = getattr(importlib.import_module(owner), name)
    there = set(dir(target))
    if dataclasses.is_dataclass(target):
        there |= {field.name for field in dataclasses.fields(target)}
    assert set(PUBLIC[home].split()) - there == set()


def test_a_tracer_has_its_public_attributes() -> None:
    tracer = Tracer(tiny_model("llama"))
    assert {"model", "tokenizer", "impl", "decoder", "max_memory"} <= set(vars(tracer))
