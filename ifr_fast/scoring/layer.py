"""Rows of a recorded layer -> LayerScores: checks shapes and calls the kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.contract import AttentionScores, FFNScores, LayerInputs
from ..model.block import Block
from ..model.node_parts import PostParts
from ..recording.layer_inputs import LayerRows, block_rows, layer_inputs
from ..recording.recording import Recording
from .closure import check_closure, closure_of
from .implementations import Kernel, kernel_of
from .scores import LayerScores, joined


def score_layer(
    recording: Recording, layer: int, rows: Tensor, keep: float, kernel: Kernel
) -> LayerScores:
    """Scores `rows` [R] (int64, CPU, strictly ascending) of a layer; edges above `keep`.

    Tensors that the recording lacks are replayed; then rows are scored in row blocks.
    """
    block = recording.decoder.blocks[layer]

    def score(some: Tensor) -> LayerScores:
        return score_rows(block, layer_inputs(recording, layer, some), keep, kernel)

    size = block_rows(recording.decoder.device)
    if not recording.is_replayed or len(rows) <= size:
        return score(rows)
    return joined([score(some) for some in rows.split(size)], rows)


def score_layers(
    recording: Recording, rows: Tensor, layers: list[int], keep: float, kernel: Kernel
) -> Iterator[LayerScores]:
    """Scores `rows` of some layers, one after another; edges above `keep`."""
    for layer in layers:
        with torch.inference_mode(), recording.replaying():
            scores = score_layer(recording, layer, rows, keep, kernel)
            check_closure({layer: scores.closure})
        yield scores


def score_rows(block: Block, rows: LayerRows, keep: float, kernel: Kernel) -> LayerScores:
    """Scores the rows of a block. Raises ValueError for a wrong shape in `rows.inputs`."""
    inputs, post, bias = rows
    _check_shapes(inputs)
    scores = with_heads(kernel_of(kernel, inputs).score_attention(inputs, keep), block.model_heads)
    closure = closure_of(inputs, scores.linear, bias)
    if post is None:
        assert scores.ffn is not None
        ffn, ffn_residual, ffn_unattributed = scores.ffn, None, None
    else:
        of_ffn = score_post(post, kernel)
        closure = closure if post.error is None else closure.maximum(post.error)
        ffn, ffn_residual = of_ffn.ffn, of_ffn.residual.float()
        ffn_unattributed = of_ffn.unattributed
    return LayerScores(
        block.layer,
        inputs.rows,
        keep,
        scores.residual.float(),
        ffn.float(),
        ffn_residual,
        scores.head_total.float(),
        scores.unattributed,
        ffn_unattributed,
        scores.edges,
        closure,
        block.value_layer,
    )


def with_heads(scores: AttentionScores, n_heads: int) -> AttentionScores:
    """The scores with columns of 0 for heads that other layers have beyond this one's."""
    missing = n_heads - scores.head_total.shape[1]
    if missing <= 0:
        return scores
    edges = scores.edges
    return scores._replace(
        head_total=torch.nn.functional.pad(scores.head_total, (0, missing)),
        edges=edges._replace(head_weight=torch.nn.functional.pad(edges.head_weight, (0, missing))),
    )


def score_post(post: PostParts, kernel: Kernel) -> FFNScores:
    """Importances of the parts of `resid_post`."""
    if post.given_ffn is None:
        return kernel.score_ffn(post.residual, post.y)
    from ..kernels.given_ffn import score_given_ffn

    return score_given_ffn(post.residual, post.given_ffn, post.y)


def _check_shapes(inputs: LayerInputs) -> None:
    (R, H, K), (S, H_kv, V), D = inputs.q.shape, inputs.v.shape, inputs.y.shape[1]
    expected = {
        "rows": (R,),
        "resid_pre": (R, D),
        "y": (R, D),
        "k": (S, H_kv, K),
        "W_O": (H, V, D),
        "row_scale": (R,),
        "value_gate": (R, H, V),
        "sinks": (H,),
        "alibi_slopes": (H,),
        "log_sum_exp": (R, H),
        "ffn": (R, D),
        "offset": (R,),
    }
    for name, shape in expected.items():
        x = getattr(inputs, name)
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    if H % H_kv:
        raise ValueError(f"q: its {H} heads are not a multiple of the {H_kv} key/value heads")
