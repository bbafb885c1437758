"""Scores of a component graph, from recordings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...model.hooks import StopForward, hooked, in_this_thread
from ...model.node_parts import Passage, passage_to_mid
from ...recording.layer_inputs import layer_inputs
from ...recording.recording import Recording
from ...tokens import Text, encode
from ...tracer import Tracer
from .graph import Graph

METHOD = "information-flow-routes"
_ELEMENTS = 1 << 22  # numbers of all nodes' outputs that are held at once


def score_components(
    tracer: Tracer,
    texts: Iterable[Text | Recording],
    *,
    prepend_bos: bool = False,
    positions: bool = False,
    add_special_tokens: bool | None = None,
) -> Graph:
    """The component graph of a model, with the mean scores over some texts and an empty circuit.

    prepend_bos: put the tokenizer's BOS token before each text that does not begin with it.
    positions: count learned position embeddings as part of `input`.
    """
    graph = Graph.from_model(tracer)
    graph.scores.copy_(
        _mean_scores(graph, tracer, texts, prepend_bos, positions, add_special_tokens)
    )
    return graph


def attribute(
    model: Tracer,
    graph: Graph,
    dataloader: Iterable[Any],
    metric: Any = None,
    method: str = METHOD,
    intervention: str = "patching",
    aggregation: str = "sum",
    ig_steps: int | None = None,
    intervention_dataloader: Any = None,
    quiet: bool = False,
) -> None:
    """Fills `graph.scores`, as EAP-IG's `attribute` does with `information-flow-routes`.

    model: a Tracer in place of a HookedTransformer. dataloader: yields (clean, corrupted, label),
    where clean is a list of texts, to which BOS is added. aggregation: "mean" divides by d_model,
    as in EAP-IG. metric, intervention, ig_steps, intervention_dataloader and quiet have no effect;
    they belong to other methods.
    """
    if method != METHOD:
        raise ValueError(f"method: expected {METHOD!r}, got {method!r}")
    if aggregation not in ("sum", "mean"):
        raise ValueError(f"aggregation: expected 'sum' or 'mean', got {aggregation!r}")
    if graph.cfg != Graph.from_model(model).cfg:
        raise ValueError("graph: was made of another model")
    scores = _mean_scores(graph, model, _clean_texts(dataloader), True, False, None)
    graph.scores.copy_(scores / graph.cfg["d_model"] if aggregation == "mean" else scores)


def _clean_texts(dataloader: Iterable[Any]) -> Iterator[Any]:
    for clean, *_ in dataloader:
        if isinstance(clean, str):  # otherwise its characters would be the texts
            raise ValueError(
                f"dataloader: expected batches (clean, corrupted, label) with a list of texts in "
                f"clean, got {clean!r}"
            )
        yield from clean


def _mean_scores(
    graph: Graph,
    tracer: Tracer,
    texts: Iterable[Text | Recording],
    prepend_bos: bool,
    positions: bool,
    add_special_tokens: bool | None,
) -> Tensor:
    """The mean scores [n_forward, n_backward] float64 over texts."""
    total, n_texts = torch.zeros(graph.scores.shape, dtype=torch.float64), 0
    for text in texts:
        if not isinstance(text, Recording):
            text = encode(text, tracer.tokenizer, add_special_tokens)
            bos = None if tracer.tokenizer is None else tracer.tokenizer.bos_token_id
            if prepend_bos and bos is not None and int(text[0]) != bos:
                text = torch.cat([torch.tensor([bos]), text])
        total += _scores(graph, tracer.record(text), positions)
        n_texts += 1
    if n_texts == 0:
        raise ValueError("texts: is empty; expected at least one text")
    return total / n_texts


@torch.inference_mode()
def _scores(graph: Graph, recording: Recording, positions: bool) -> Tensor:
    """The mean scores [n_forward, n_backward] float64 over one text's positions."""
    decoder, T = recording.decoder, len(recording)
    N, H, D = graph.n_forward, graph.cfg["n_heads"], graph.cfg["d_model"]
    embedded = recording.layers[0].resid_pre
    tokens = embedded if positions else embedded - _without_tokens(recording)
    total = torch.zeros(graph.scores.shape, dtype=torch.float64)
    device, wide = decoder.device, torch.promote_types(decoder.dtype, torch.float32)
    with decoder.replaying():
        for rows in torch.arange(T).split(max(1, _ELEMENTS // (N * D))):
            parts = torch.empty(len(rows), N, D, dtype=wide, device=device)
            parts[:, 0] = tokens[rows.to(tokens.device)]
            done = 1
            for layer in range(decoder.n_layers):
                column = layer * (3 * H + 1)
                node = _layer(recording, layer, rows)
                shares = _shares(parts[:, :done], node.pre.to(device))
                total[:done, column : column + 3 * H] += shares[:, None]
                parts[:, :done] = node.to_mid(parts[:, :done])
                parts[:, done : done + H] = node.heads
                before = done if node.mid is None else done + H
                if node.mid is not None:
                    shares = _shares(parts[:, :before], node.mid.to(device))
                total[:before, column + 3 * H] += shares
                parts[:, : done + H] = node.to_post(parts[:, : done + H])
                parts[:, done + H] = node.ffn
                done += H + 1
                scale = decoder.blocks[layer].stream_scale
                if scale != 1:  # the layer multiplies all that the stream holds
                    parts[:, :done] *= scale
            total[:, -1] += _shares(parts, recording.resid_final[rows].to(device, wide))
    return total / T


class _Layer(NamedTuple):
    """R rows of one layer, in float32 or wider."""

    pre: Tensor  # [R, D]
    heads: Tensor  # [R, H, D] output of each head
    mid: Tensor | None  # [R, D]; None in a parallel block
    ffn: Tensor  # [R, D] output of the FFN block
    to_mid: Passage  # of resid_pre's parts
    to_post: Passage  # of resid_mid's parts


def _layer(recording: Recording, layer: int, rows: Tensor) -> _Layer:
    from ...kernels.contract import visible
    from ...kernels.rows import attention_pattern, block_of

    block = recording.decoder.blocks[layer]
    inputs, post, _ = layer_inputs(recording, layer, rows)
    recorded = recording.layers[layer].resid_pre
    pre = recorded[rows.to(recorded.device)].to(inputs.y.device)
    to_mid = passage_to_mid(block, pre, inputs.row_scale)
    wide = torch.promote_types(inputs.y.dtype, torch.float32)
    inputs = block_of(inputs, slice(None)).to(wide)
    mask = visible(rows, len(inputs.k), inputs.window).to(inputs.v.device)
    alpha = attention_pattern(inputs, mask)  # [H, R, S]
    H, H_kv = len(alpha), inputs.v.shape[1]
    grouped = alpha.reshape(H_kv, H // H_kv * len(rows), -1)
    z = (grouped @ inputs.v.transpose(0, 1)).view(H, len(rows), -1)  # [H, R, V]
    if inputs.value_gate is not None:
        z = z * inputs.value_gate.transpose(0, 1)
    heads = torch.bmm(z, inputs.W_O).transpose(0, 1)
    if inputs.row_scale is not None:
        heads = heads * inputs.row_scale[:, None, None]
    if post is None:
        assert inputs.ffn is not None
        return _Layer(pre, heads, None, inputs.ffn, to_mid, Passage())
    return _Layer(pre, heads, inputs.y, post.ffn, to_mid, post.passage)


def _shares(parts: Tensor, y: Tensor) -> Tensor:
    """Importances of parts [R, n, D] in y [R, D], summed over rows: [n] float64, on the CPU."""
    y = y[:, None]
    # The difference is taken in each coordinate: a difference of two norms would lose small
    # coordinates beside a few huge ones.
    farther = torch.sub(parts, y).abs_().sub_(y.abs())
    proximity = farther.sum(-1).neg_().clamp_(min=0).double()
    total = proximity.sum(-1, keepdim=True)
    shares = torch.where(total > 0, proximity / total, 1 / parts.shape[1])
    return shares.sum(0).cpu()


def _without_tokens(recording: Recording) -> Tensor:
    """The input [T, D] of the first layer with every token's embedding zero: that of positions."""
    decoder = recording.decoder
    found: list[Tensor] = []

    def stop(_: Any, hidden: Tensor, __: Any) -> Tensor:
        found.append(hidden[0])
        raise StopForward

    embedding = decoder.model.get_input_embeddings()
    zero = embedding.register_forward_hook(in_this_thread(lambda _, __, x: torch.zeros_like(x)))
    with (
        decoder.replaying(),
        decoder.overriding_layers(stop),
        hooked(zero),
        suppress(StopForward),
    ):
        decoder.forward(recording.token_ids)
    return found[0]
