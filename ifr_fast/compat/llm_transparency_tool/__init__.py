"""The LM Transparency Tool (facebookresearch/llm-transparency-tool) on this engine.

Functions, shapes and node names are the tool's. No tensor of [pos, key_pos, head, D] is formed
until it is read. A `TransparentLlm` computes as the rest of this project; with `parity=True` it
uses the published tool's own arithmetic (docs/compat-llm-transparency-tool.md lists the
differences). `install` replaces the functions of an installed llm_transparency_tool.
"""

from __future__ import annotations

from .contributions import (
    apply_threshold_and_renormalize,
    get_attention_contributions,
    get_contributions,
    get_contributions_with_one_off_part,
    get_decomposed_mlp_contributions,
    get_mlp_contributions,
)
from .graph import build_full_graph, build_paths_to_predictions
from .installation import install
from .model import TransparentLlm
from .reading import ModelInfo

TransformerLensTransparentLlm = TransparentLlm

__all__ = [
    "ModelInfo",
    "TransformerLensTransparentLlm",
    "TransparentLlm",
    "apply_threshold_and_renormalize",
    "build_full_graph",
    "build_paths_to_predictions",
    "get_attention_contributions",
    "get_contributions",
    "get_contributions_with_one_off_part",
    "get_decomposed_mlp_contributions",
    "get_mlp_contributions",
    "install",
]
