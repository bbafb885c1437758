"""The face of the LM Transparency Tool (facebookresearch/llm-transparency-tool) on this engine.

The same functions, shapes and node names; no tensor of [pos, key_pos, head, D] exists unless it is
read. A `TransparentLlm` computes as this project does unless it is made with `parity=True`, which
is the published tool's own arithmetic (docs/compat-llm-transparency-tool.md lists the
differences). `install` puts all of it in the place of an installed llm_transparency_tool.
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
