"""Generation, token by token, each with the route graph of the prediction that chose it.

1. Record the prompt's forward pass. Its keys and values begin a store that grows with the text.
2. A new token is run through the model alone, its attention reading the store: a decode step. As
   the pass leaves a layer, the new row of that layer is scored, its keys and values still at
   hand, and what it was scored from is forgotten.
3. What a node (layer, position) is made of never changes once it is scored, so it is scored once
   in all of a generation. A step's graph is what its last-layer node reaches over the nodes
   known; rows of the prompt that none has reached before are scored from the recording.

So a route costs a row of each layer, not a pass. Between two tokens the model is as it was.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from . import capture
from .capture import AttentionCall, LayerCall, LazyMask
from .errors import IfrError, UnsupportedArchitectureError
from .graph import (
    EdgeKind,
    Granularity,
    LayerTable,
    Node,
    NodeKind,
    RouteGraph,
    grow_layer,
    in_order,
)
from .kernels.contract import EdgeList, LayerInputs
from .model import Block, evaluating, gate_rows, probe_tokens, row_scales
from .recording import Recording
from .scoring import LayerScores, check_closure, score_layer, score_rows
from .tokens import token_strings

if TYPE_CHECKING:
    from .tracer import Tracer

_ROOM = 1024  # tokens that a store has room for at first, at most, beyond the prompt

ChooseToken = Callable[[Tensor, Tensor], int]  # token ids [T], logits [vocab] -> the next


class GenerationStep(NamedTuple):
    """A token that was generated."""

    token_id: int
    token: str
    probability: float  # that the model gave it, before temperature, top_k, top_p
    graph: RouteGraph  # of the prediction that chose it, made at the position before it


def chooser(
    *,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    logits_processor: LogitsProcessorList | None,
    generator: torch.Generator | None,
) -> ChooseToken:
    """How the next token is chosen, in transformers' terms and order. Raises ValueError."""
    if not do_sample and (temperature != 1 or top_k is not None or top_p is not None):
        raise ValueError("do_sample: temperature, top_k and top_p need do_sample=True")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0, at most 1, got {top_p}")
    processors = LogitsProcessorList(logits_processor or [])
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        processors.append(TopPLogitsWarper(float(top_p)))

    def choose(token_ids: Tensor, logits: Tensor) -> int:
        scores = processors(token_ids[None].to(logits.device), logits[None].float())[0]
        if not do_sample:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))

    return choose


class _Past:
    """Keys and values of a layer, with room for more; doubled when it is used up."""

    def __init__(self, k: Tensor, v: Tensor, room: int) -> None:
        """k, v: [H_kv, T, K], [H_kv, T, V]; room for so many more."""
        self._length = k.shape[1]
        self._k, self._v = (self._grown(x, self._length + room) for x in (k, v))

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """[H_kv, T, K], [H_kv, T, V]"""
        return self._k[:, : self._length], self._v[:, : self._length]

    @staticmethod
    def _grown(x: Tensor, room: int) -> Tensor:
        out = x.new_empty(x.shape[0], room, x.shape[2])
        out[:, : x.shape[1]] = x
        return out

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All of [H_kv, S, K], [H_kv, S, V], with those of one more token at the end."""
        if self._length == self._k.shape[1]:
            self._k, self._v = (self._grown(x, 2 * self._length) for x in (self._k, self._v))
        self._k[:, self._length], self._v[:, self._length] = k[:, 0], v[:, 0]
        self._length += 1
        return self.held


class _NodeEdges(NamedTuple):
    """What a layer adds to a graph that reaches it at one position."""

    edges: np.ndarray[Any, Any]  # [E, 5] float64: an EdgeTable's columns
    heads: np.ndarray[Any, Any]  # [M, 5] float64: a HeadEdgeTable's columns
    unattributed: list[Node]
    below: list[int]  # positions of the layer below that it leads to


class _Row:
    """One layer's new row, as the pass goes through it."""

    resid_pre: Tensor  # [1, D]
    call: LayerCall
    attention: AttentionCall
    window: int | None
    z: Tensor  # [1, H, V]
    mid: Tensor  # [1, D]
    resid_post: Tensor  # [1, D]


class Generation:
    """A text that grows, and the nodes of it that have been scored."""

    def __init__(
        self,
        tracer: Tracer,
        recording: Recording,
        threshold: float,
        granularity: Granularity,
        n_ahead: int,
    ) -> None:
        self._tracer, self._decoder = tracer, tracer.decoder
        self._room = min(n_ahead, _ROOM)
        self._threshold, self._granularity = threshold, granularity
        self.token_ids = recording.token_ids
        self.tokens = list(recording.tokens)
        self._begin(recording)

    def _begin(self, recording: Recording) -> None:
        self._nodes: list[dict[int, _NodeEdges]] = [{} for _ in self._decoder.blocks]
        self._past, layers = [], []
        for x in recording.layers:
            past = _Past(x.k.transpose(0, 1), x.v.transpose(0, 1), self._room)
            k, v = (held.transpose(0, 1) for held in past.held)
            self._past.append(past)
            layers.append(dataclasses.replace(x, k=k, v=v))
        self._recording = dataclasses.replace(recording, layers=layers)
        self._windows = [
            block.window if recorded.window is None else recorded.window
            for block, recorded in zip(self._decoder.blocks, recording.layers, strict=True)
        ]
        self._of_module = {block.attention: block for block in self._decoder.blocks}
        self._rotary = self._decoder.rotary_regime(len(recording))

    @torch.inference_mode()
    def first_logits(self) -> Tensor:
        """[vocab] of the prompt's next token."""
        recording = self._recording
        if recording.position == len(recording) - 1:
            return recording.logits
        return self._decoder.head(recording.states[-1:])[0]

    @torch.inference_mode()
    def append(self, token_id: int) -> Tensor:
        """Adds a token to the text: a decode step, in which its row of each layer is scored.

        Returns the logits [vocab] of the token after it.
        """
        position = len(self.token_ids)
        self.token_ids = torch.cat([self.token_ids, torch.tensor([token_id])])
        self.tokens += token_strings(self.token_ids[-1:], self._tracer.tokenizer)
        if self._decoder.rotary_regime(position + 1) != self._rotary:
            # Every key would be another in a text of this length.
            self._begin(self._tracer.record(self.token_ids))
            return self.first_logits()
        scored, logits = self._decode(token_id, position)
        check_closure({scores.layer: scores.closure for scores in scored})
        self._keep(scored)
        return logits

    def _decode(self, token_id: int, position: int) -> tuple[list[LayerScores], Tensor]:
        decoder = self._decoder
        rows = [_Row() for _ in decoder.blocks]
        scored: list[LayerScores] = []

        def answer(call: AttentionCall) -> Tensor:
            layer = self._of_module[call.module].layer
            row, recorded = rows[layer], self._recording.layers[layer]
            k, v = self._past[layer].append(call.k[0], call.v[0])
            row.window = _crossed(self._windows[layer], k.shape[1])
            row.attention = call._replace(
                k=k[None], v=v[None], mask=_mask(row.window, k.device),
                alibi_slopes=recorded.alibi_slopes,
            )  # fmt: skip
            z = _attend(row.attention, row.window)
            row.z = z[0]
            return z

        def watch(block: Block) -> list[torch.utils.hooks.RemovableHandle]:
            row = rows[block.layer]

            def keep_call(hidden: Tensor, call: LayerCall) -> None:
                row.resid_pre, row.call = hidden[0], call

            def keep_mid(x: Tensor) -> None:
                found = x.reshape(1, -1)
                row.mid = row.resid_pre + found if block.parallel else found

            def leave(x: Tensor) -> None:
                row.resid_post = x[0]
                if block.gate_site is None:
                    scored.append(self._score_row(block, row, position))

            site, on = (
                (block.attention, capture.on_output)
                if block.mid_site is None
                else (block.mid_site, capture.on_input)
            )
            return [
                capture.on_layer_call(block.module, keep_call),
                on(site, keep_mid),
                capture.on_output(block.module, leave),
            ]

        with evaluating(decoder.model), decoder.attention_through(decoder.model, answer):
            handles = [handle for block in decoder.blocks for handle in watch(block)]
            with capture.hooks(*handles):
                _, logits = decoder.step(token_id, position)
            for block in decoder.blocks:  # which run again for their gates
                if block.gate_site is not None:
                    scored.append(self._score_row(block, rows[block.layer], position))
        return scored, logits

    def _score_row(self, block: Block, row: _Row, position: int) -> LayerScores:
        call, gate, scale = row.attention, None, None
        if block.gate_site is not None:
            gate = gate_rows(block, row.call, row.resid_pre, torch.tensor([0]))
        if block.row_scaled:
            scale = row_scales(block, row.resid_pre, row.mid, row.z, gate)
        inputs = LayerInputs(
            rows=torch.tensor([position]),
            resid_pre=row.resid_pre,
            y=row.resid_post if block.parallel else row.mid,
            q=call.q[0].transpose(0, 1),
            k=call.k[0].transpose(0, 1),
            v=call.v[0].transpose(0, 1),
            W_O=block.W_O,
            scale=call.scale,
            row_scale=scale,
            value_gate=gate,
            window=row.window,
            softcap=call.softcap,
            sinks=call.sinks,
            alibi_slopes=call.alibi_slopes,
            ffn=row.resid_post - row.mid if block.parallel else None,
        )
        resid_post = None if block.parallel else row.resid_post
        impl = self._tracer.impl
        return score_rows(block, inputs, resid_post, torch.tensor([0]), self._threshold, impl)

    @torch.inference_mode()
    def graph(self, logits: Tensor) -> RouteGraph:
        """Of the prediction `logits` [vocab], made at the end of the text so far."""
        decoder, end = self._decoder, len(self.token_ids)
        reached, closures = {end - 1}, {}
        found: list[_NodeEdges] = []
        with ExitStack() as stack:
            replaying = False
            for layer in reversed(range(decoder.n_layers)):
                nodes = self._nodes[layer]
                missing = sorted(t for t in reached if t not in nodes)
                if missing:
                    if not replaying:
                        stack.enter_context(self._tracer._replaying(self._recording))
                        replaying = True
                    rows = torch.tensor(missing)
                    scores = score_layer(
                        self._recording, layer, rows, self._threshold, self._tracer.impl
                    )
                    closures[layer] = scores.closure
                    self._keep([scores])
                here = [nodes[t] for t in reached]
                found += here
                reached = set(itertools.chain.from_iterable(node.below for node in here))
        if closures:
            check_closure(closures)
        edges, heads = (
            torch.from_numpy(np.concatenate([node[column] for node in found] or [np.empty((0, 5))]))
            for column in (0, 1)
        )
        return in_order(
            edges.T,
            heads.T,
            [flagged for node in found for flagged in node.unattributed],
            [block.parallel for block in decoder.blocks],
            tokens=list(self.tokens),
            token_ids=self.token_ids,
            position=end - 1,
            threshold=self._threshold,
            granularity=self._granularity,
            n_layers=decoder.n_layers,
            n_heads=decoder.n_heads,
            predictions=self._tracer.likeliest(logits[None])[0],
        )

    def _keep(self, scored: list[LayerScores]) -> None:
        """Makes nodes of what was scored."""
        for parallel in (False, True):
            of_kind = [s for s in scored if (s.ffn_residual is None) == parallel]
            if of_kind:
                self._keep_alike(of_kind)

    def _keep_alike(self, scored: list[LayerScores]) -> None:
        """The same of blocks that are all sequential or all parallel: as one table, whose rows
        are nodes.
        """
        device = self._recording.resid_final.device
        layers = torch.cat([torch.full((len(s.rows),), s.layer) for s in scored])
        positions = torch.cat([s.rows for s in scored])
        n_nodes = len(layers)
        grown, _ = grow_layer(
            0,
            _one_table(scored, device),
            torch.ones(max(n_nodes, len(self.token_ids)), dtype=torch.bool, device=device),
            self._threshold,
            self._granularity,
        )
        layer_of, position_of = layers.numpy(), positions.numpy()
        parts, passes = [], np.zeros(n_nodes, dtype=bool)
        parallel = scored[0].ffn_residual is None
        for step in grown.steps:
            kept = step.kept.nonzero().squeeze(1)
            node, source = step.target[kept].cpu().numpy(), step.source[kept].cpu().numpy()
            if step.kind != EdgeKind.ATTENTION:
                source = position_of[node]
                if parallel or step.kind == EdgeKind.RESIDUAL_MID:
                    passes[node] = True
            kind = np.full(len(node), int(step.kind))
            weight = step.weight[kept].float().cpu().numpy()
            parts.append(
                (node, np.stack([layer_of[node], kind, position_of[node], source, weight], 1))
            )
        entry, head = (x.cpu().numpy() for x in grown.head_kept.nonzero(as_tuple=True))
        attention = grown.steps[-1]
        node = attention.target.cpu().numpy()[entry]
        source = attention.source.cpu().numpy()[entry]
        weight = grown.head_weight.float().cpu().numpy()[entry, head]
        heads = np.stack([layer_of[node], head, position_of[node], source, weight], 1)
        of_heads = _split(node, heads, n_nodes)
        of_edges = _split(
            np.concatenate([node for node, _ in parts]),
            np.concatenate([columns for _, columns in parts]),
            n_nodes,
        )
        flagged: list[list[Node]] = [[] for _ in range(n_nodes)]
        for is_mid, _, flags in grown.unattributed:
            place = NodeKind.MID if is_mid else NodeKind.POST
            for i in flags.nonzero().squeeze(1).tolist():
                flagged[i].append(Node(int(layer_of[i]), place, int(position_of[i])))
        for i, (layer, position) in enumerate(
            zip(layers.tolist(), positions.tolist(), strict=True)
        ):
            edges = of_edges[i]
            below = edges[edges[:, 1] == EdgeKind.ATTENTION, 3].astype(np.int64).tolist()
            if passes[i]:
                below.append(position)
            self._nodes[layer][position] = _NodeEdges(edges, of_heads[i], flagged[i], below)


def _one_table(scored: list[LayerScores], device: torch.device) -> LayerTable:
    """Several layers' scores as one, with a row for each of their rows in turn."""

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([x.to(device) for x in parts])

    starts = list(itertools.accumulate((len(s.rows) for s in scored), initial=0))
    edges = [s.attention.edges for s in scored]
    parallel = scored[0].ffn_residual is None
    return LayerTable(
        torch.arange(starts[-1], device=device),
        joined([s.residual for s in scored]),
        joined([s.ffn for s in scored]),
        None if parallel else joined([s.ffn_residual for s in scored]),  # type: ignore[misc]
        EdgeList(
            joined([e.row + start for e, start in zip(edges, starts[:-1], strict=True)]),
            joined([e.source for e in edges]),
            joined([e.weight for e in edges]),
            joined([e.head_weight for e in edges]),
        ),
        joined([s.unattributed for s in scored]),
        None if parallel else joined([s.ffn_unattributed for s in scored]),  # type: ignore[misc]
    )


def _split(of: np.ndarray[Any, Any], rows: np.ndarray[Any, Any], n: int) -> list[Any]:
    """The rows of each of n owners; `of` says whose each is."""
    order = of.argsort(kind="stable")
    bounds = np.searchsorted(of[order], np.arange(1, n))
    return np.split(rows[order], bounds)


def _crossed(window: int | None, n_tokens: int) -> int | None:
    return None if window is None or window >= n_tokens else window


def _mask(window: int | None, device: torch.device) -> LazyMask:
    """What was seen to be the model's mask when it was recorded."""

    def function(_: Any, __: Any, rows: Tensor, keys: Tensor) -> Tensor:
        seen = keys <= rows
        return seen if window is None else seen & (keys > rows - window)

    return LazyMask(function, device)


def _attend(call: AttentionCall, window: int | None) -> Tensor:
    """Attention output [1, 1, H, V] of the query of the last token, q [1, H, 1, K]."""
    S = call.k.shape[2]
    if call.softcap is None and call.sinks is None and call.alibi_slopes is None:
        begin = 0 if window is None else S - window
        # The heads that share a key are so many rows that read it, unmasked.
        q = call.q.reshape(1, call.k.shape[1], -1, call.q.shape[-1])
        z = nn.functional.scaled_dot_product_attention(
            q, call.k[:, :, begin:], call.v[:, :, begin:], scale=call.scale
        )
        return z.reshape(1, 1, call.q.shape[1], -1)
    return capture.attend_rows(call, call.q, torch.tensor([S - 1], device=call.q.device))


def stop_tokens(model: Any, given: int | Iterable[int] | None) -> set[int]:
    """The ids that end a generation: those given, or the model's own."""
    if given is None:
        config = getattr(model, "generation_config", None)
        given = getattr(config, "eos_token_id", None)
    if given is None:
        return set()
    return set(given) if isinstance(given, Iterable) else {int(given)}


def steps(
    tracer: Tracer,
    text: Tensor | Recording,
    choose: ChooseToken,
    stop: set[int],
    max_new_tokens: int,
    threshold: float,
    granularity: Granularity,
) -> Iterator[GenerationStep]:
    """Token after token, until one of `stop`, as many as asked for, or the context's end.

    text: token ids [T], or their recording.
    """
    decoder = tracer.decoder
    _check_steps(tracer)
    recording = _record_ahead(tracer, text, max_new_tokens)
    generation = Generation(tracer, recording, threshold, granularity, max_new_tokens)
    del text, recording  # whose keys and values the generation has in its own store
    logits = generation.first_logits()
    for i in range(max_new_tokens):
        if not bool(torch.isfinite(logits).all()):
            raise IfrError("text: the model's logits are not finite; try a wider torch_dtype")
        token_id = choose(generation.token_ids, logits)
        (token,) = token_strings(torch.tensor([token_id]), tracer.tokenizer)
        probability = float(logits.float().softmax(-1)[token_id])
        yield GenerationStep(token_id, token, probability, generation.graph(logits))
        full = decoder.max_length is not None and len(generation.token_ids) >= decoder.max_length
        if token_id in stop or i + 1 == max_new_tokens or full:
            return
        logits = generation.append(token_id)


def _record_ahead(tracer: Tracer, text: Tensor | Recording, n_ahead: int) -> Recording:
    """A recording of a text that `n_ahead` tokens will follow.

    Where masks are tensors they show nothing of rows that do not exist yet, so the text is
    recorded with that many more tokens behind it, which change nothing before them, and cut.
    """
    if tracer.decoder.attention_through is capture.attention_through:
        return tracer.record(text)
    token_ids = text.token_ids if isinstance(text, Recording) else text
    T, limit = len(token_ids), tracer.decoder.max_length
    n_ahead = n_ahead if limit is None else min(n_ahead, limit - T)
    longer = tracer.record(torch.cat([token_ids, token_ids[-1:].expand(n_ahead)]))

    def cut(x: Tensor | None) -> Any:
        return None if x is None else x[:T]

    layers = [
        dataclasses.replace(
            x,
            **{
                name: cut(getattr(x, name))
                for name in ("resid_pre", "k", "v", "q", "resid_mid", "z")
            },
        )
        for x in longer.layers
    ]
    return dataclasses.replace(
        longer,
        token_ids=token_ids,
        tokens=longer.tokens[:T],
        layers=layers,
        resid_final=longer.resid_final[:T],
        states=longer.states[:T],
    )


def _check_steps(tracer: Tracer) -> None:
    """Raises UnsupportedArchitectureError where a decode step gives other logits than a whole
    pass; once for each model, on a short probe.
    """
    decoder = tracer.decoder
    token_ids = probe_tokens(decoder)
    if decoder.steps_checked or len(token_ids) < 2:
        return
    expected = tracer.record(token_ids).logits.float()
    begun = Generation(tracer, _record_ahead(tracer, token_ids[:-1], 1), 1.0, "token", 1)
    got = begun.append(int(token_ids[-1])).float()
    norm = torch.linalg.vector_norm
    error = float(norm(got - expected) / norm(expected))
    if not error <= max(1e-3, 8 * torch.finfo(decoder.dtype).eps):
        raise UnsupportedArchitectureError(
            f"model: {type(decoder.model).__name__} cannot generate here: one token run on its "
            f"own gives other logits than the whole text (relative error {error:.1e})"
        )
    decoder.steps_checked = True
