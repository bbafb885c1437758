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
import functools
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
from .capture import AttentionCall, LayerCall
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
from .kernels.contract import AttentionScores, EdgeList, LayerInputs
from .model import Block, all_evaluating, gate_rows, probe_tokens, row_scales
from .recording import LayerRecording, Recording
from .scoring import (
    AttendRow,
    Kernel,
    LayerScores,
    cat_on,
    check_closed,
    check_closure,
    closure_rows,
    load_kernel,
    row_attention,
    score_layer,
)
from .tokens import token_strings

if TYPE_CHECKING:
    from .tracer import Tracer

_ROOM = 1024  # tokens that a store has room for at first, at most, beyond the prompt

_Floats = np.ndarray[Any, np.dtype[np.float64]]
_Ints = np.ndarray[Any, np.dtype[np.int64]]
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


class _Nodes:
    """All nodes (layer, position) known, and what each adds to a graph that reaches it."""

    def __init__(self, n_layers: int) -> None:
        self.at: list[dict[int, int]] = [{} for _ in range(n_layers)]  # position -> node
        self.below: list[list[int]] = []  # positions of the layer below that a node leads to
        self.flagged: dict[int, list[Node]] = {}  # unattributed ones among a node's
        self.edges = _Lists()  # an EdgeTable's columns
        self.heads = _Lists()  # a HeadEdgeTable's columns


class _Lists:
    """Lists [n, 5] of float64 end to end, one for each node."""

    def __init__(self) -> None:
        self._rows: _Floats = np.empty((1024, 5))
        self._ends: list[int] = [0]

    def extend(self, rows: _Floats, counts: _Ints) -> None:
        """More lists, end to end, and how long each is."""
        begin = self._ends[-1]
        end = begin + len(rows)
        if end > len(self._rows):
            grown = np.empty((2 * end, 5))
            grown[:begin] = self._rows[:begin]
            self._rows = grown
        self._rows[begin:end] = rows
        self._ends += (begin + counts.cumsum()).tolist()

    def of(self, nodes: list[int]) -> _Floats:
        """The lists of some nodes, end to end."""
        begins = np.array([self._ends[i] for i in nodes], dtype=np.int64)
        counts = np.array([self._ends[i + 1] for i in nodes], dtype=np.int64) - begins
        ends = counts.cumsum()
        return self._rows[np.arange(counts.sum()) + np.repeat(begins - ends + counts, counts)]


class _Layer:
    """A layer's keys and values, with room for more that is doubled when it is used up; and its
    newest row, as the pass goes through it.
    """

    resid_pre: Tensor  # [1, D]
    layer_call: LayerCall
    call: AttentionCall  # of the new row, with its own key and value alone
    q: Tensor  # [1, H, K]
    k: Tensor  # [S, H_kv, K], all there are
    v: Tensor  # [S, H_kv, V]
    window: int | None  # that its keys have crossed
    z: Tensor  # [1, H, V]
    weights: Tensor | None  # [1, H, S] if attention left them
    mid: Tensor  # [1, D]
    resid_post: Tensor  # [1, D]
    inputs: LayerInputs  # that its row was scored from
    scores: AttentionScores

    def __init__(
        self, block: Block, recorded: LayerRecording, room: int, attend_row: AttendRow | None
    ) -> None:
        self.block = block
        self.W_O = _where_it_lies(block)
        self._attend_row = attend_row
        self._window = block.window if recorded.window is None else recorded.window
        self._alibi_slopes = recorded.alibi_slopes
        self._length = len(recorded.k)
        room += self._length
        self._k, self._v = _with_room(recorded.k, room), _with_room(recorded.v, room)

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """All keys and values: [S, H_kv, K], [S, H_kv, V]."""
        return self._k[: self._length], self._v[: self._length]

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention output [1, 1, H, V] of a new row, whose key and value are kept."""
        if self._length == len(self._k):
            self._k, self._v = (_with_room(x, 2 * self._length) for x in (self._k, self._v))
        self._k.narrow(0, self._length, 1).copy_(call.k.squeeze(2))
        self._v.narrow(0, self._length, 1).copy_(call.v.squeeze(2))
        self._length += 1
        self.window = _crossed(self._window, self._length)
        self.call, self.q = call, call.q.squeeze(2)
        self.k, self.v = k, v = self.held
        if self._attend_row is not None:
            self.z, self.weights = self._attend_row(
                self.q, k, v, call.scale, window=self.window, softcap=call.softcap,
                sinks=call.sinks, alibi_slopes=self._alibi_slopes,
            )  # fmt: skip
            return self.z[None]
        z = _attend(
            call._replace(
                k=k.transpose(0, 1)[None], v=v.transpose(0, 1)[None],
                mask=capture.causal_mask(self.window, k.device), alibi_slopes=self._alibi_slopes,
            ),
            self.window,
        )  # fmt: skip
        self.z, self.weights = z[0], None
        return z

    def score(self, kernel: Kernel, row: Tensor, keep: float) -> None:
        """Scores the new row, at position row [1]."""
        block, call, gate, scale = self.block, self.call, None, None
        if block.gate_site is not None:
            gate = gate_rows(block, self.layer_call, self.resid_pre, torch.tensor([0]))
        if block.row_scaled:
            scale = row_scales(block, self.resid_pre, self.mid, self.z, gate)
        self.inputs = LayerInputs(
            rows=row,
            resid_pre=self.resid_pre,
            y=self.resid_post if block.parallel else self.mid,
            q=self.q,
            k=self.k,
            v=self.v,
            W_O=self.W_O,
            scale=call.scale,
            row_scale=scale,
            value_gate=gate,
            window=self.window,
            softcap=call.softcap,
            sinks=call.sinks,
            alibi_slopes=self._alibi_slopes,
            ffn=self.resid_post - self.mid if block.parallel else None,
            weights=self.weights,
        )
        self.scores = kernel.score_attention(self.inputs, keep)


def _with_room(x: Tensor, room: int) -> Tensor:
    """A copy of keys or values [T, H_kv, K] with room for so many, a head's in one piece."""
    out = x.new_empty(x.shape[1], room, x.shape[2]).transpose(0, 1)
    out[: len(x)] = x
    return out


def _where_it_lies(block: Block) -> Tensor:
    """W_O of a block: the model's own weight where it is nothing else. Having just multiplied by
    that, the model leaves it in the processor's cache.
    """
    H, V, D = block.W_O.shape
    for weight in block.attention.parameters():
        if weight.shape == (D, H * V) and weight.dtype == block.W_O.dtype:
            view = weight.detach().view(D, H, V).permute(1, 2, 0)
            if view.device == block.W_O.device and torch.equal(view, block.W_O):
                return view
    return block.W_O


class _Alike(NamedTuple):
    """Layers that are all sequential or all parallel: their rows make one table."""

    layers: list[_Layer]
    numbers: list[int]  # of the layers
    bias: Tensor  # [L, D]

    @staticmethod
    def of(layers: list[_Layer], device: torch.device) -> _Alike:
        """All of these, whose biases go to `device`."""
        blocks = [x.block for x in layers]
        bias = torch.stack([block.bias.to(device) for block in blocks])
        return _Alike(layers, [block.layer for block in blocks], bias)


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
        self._kernel = load_kernel(tracer.impl)
        self._room = min(n_ahead, _ROOM)
        self._threshold, self._granularity = threshold, granularity
        self.token_ids = recording.token_ids
        self.tokens = list(recording.tokens)
        self._begin(recording)

    def _begin(self, recording: Recording) -> None:
        decoder = self._decoder
        attend_row = row_attention(self._tracer.impl, recording.layers[0].k.dtype)
        self._nodes = _Nodes(decoder.n_layers)
        self._layers, recorded = [], []
        for block, x in zip(decoder.blocks, recording.layers, strict=True):
            layer = _Layer(block, x, self._room, attend_row)
            k, v = layer.held
            self._layers.append(layer)
            recorded.append(dataclasses.replace(x, k=k, v=v))
        self._recording = dataclasses.replace(recording, layers=recorded)
        self._alike = [
            _Alike.of(layers, recording.resid_final.device)
            for parallel in (False, True)
            if (layers := [x for x in self._layers if x.block.parallel == parallel])
        ]
        devices = {recording.resid_final.device, *(x.W_O.device for x in self._layers)}
        self._on_one_device = len(devices) == 1
        self._modules = list(decoder.model.modules())
        self._of_module = {layer.block.attention: layer for layer in self._layers}
        self._rotary = decoder.rotary_regime(len(recording))

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
        logits = self._decode(token_id, position)
        for alike in self._alike:
            self._keep_row(alike, position)
        return logits

    def _decode(self, token_id: int, position: int) -> Tensor:
        """A decode step, in which the new row of each layer is scored."""
        decoder, row = self._decoder, torch.tensor([position])

        def answer(call: AttentionCall) -> Tensor:
            return self._of_module[call.module].attend(call)

        def watch(i: int, layer: _Layer) -> list[torch.utils.hooks.RemovableHandle]:
            block = layer.block

            def score() -> None:
                if block.gate_site is None:
                    layer.score(self._kernel, row, self._threshold)

            def enter(hidden: Tensor, call: LayerCall) -> None:
                layer.resid_pre, layer.layer_call = hidden[0], call
                if i > 0:
                    self._layers[i - 1].resid_post = hidden[0]

            def keep_mid(x: Tensor) -> None:
                found = x.reshape(1, -1)
                layer.mid = layer.resid_pre + found if block.parallel else found
                if not block.parallel:  # keys, values and W_O are still in the cache
                    score()

            def leave(x: Tensor) -> None:
                layer.resid_post = x[0]
                if block.parallel:
                    score()

            site, on = (
                (block.attention, capture.on_output)
                if block.mid_site is None
                else (block.mid_site, capture.on_input)
            )
            handles = [capture.on_layer_call(block.module, enter), on(site, keep_mid)]
            if block.parallel or i + 1 == len(self._layers):
                handles.append(capture.on_output(block.module, leave))
            return handles

        with (
            all_evaluating(self._modules),
            decoder.attention_through(decoder.model, answer),
        ):
            handles = [handle for i, layer in enumerate(self._layers) for handle in watch(i, layer)]
            with capture.hooks(*handles):
                _, logits = decoder.step(token_id, position)
            for layer in self._layers:  # which run again for their gates
                if layer.block.gate_site is not None:
                    layer.score(self._kernel, row, self._threshold)
        return logits

    def _keep_row(self, alike: _Alike, position: int) -> None:
        """Makes nodes of the row that was scored last, in layers that are alike."""
        layers, device = alike.layers, self._recording.resid_final.device
        inputs, scores = [x.inputs for x in layers], [x.scores for x in layers]
        cat = torch.cat if self._on_one_device else functools.partial(cat_on, device)
        y, linear = cat([x.y for x in inputs]), cat([x.linear for x in scores])
        ffn, ffn_residual, ffn_unattributed = None, None, None
        if layers[0].block.parallel:
            ffn = cat([x.ffn for x in inputs if x.ffn is not None])
            of_ffn = cat([x.ffn for x in scores if x.ffn is not None])
        else:
            resid_post = cat([x.resid_post for x in layers])
            ffn_residual, of_ffn, ffn_unattributed = self._kernel.score_ffn(y, resid_post)
            ffn_residual = ffn_residual.float()
        resid_pre = cat([x.resid_pre for x in inputs])
        check_closed(closure_rows(y, resid_pre, ffn, alike.bias, linear), alike.numbers)
        source = cat([x.edges.source for x in scores])
        rows = torch.arange(len(layers), device=device)
        counts = torch.tensor([x.edges.source.shape[0] for x in scores], device=device)
        table = LayerTable(
            rows,
            cat([x.residual for x in scores]).float(),
            of_ffn.float(),
            ffn_residual,
            EdgeList(
                rows.repeat_interleave(counts, output_size=len(source)),
                source,
                cat([x.edges.weight for x in scores]),
                cat([x.edges.head_weight for x in scores]),
            ),
            cat([x.unattributed for x in scores]),
            ffn_unattributed,
        )
        self._keep(table, np.array(alike.numbers), np.full(len(layers), position))

    @torch.inference_mode()
    def graph(self, logits: Tensor) -> RouteGraph:
        """Of the prediction `logits` [vocab], made at the end of the text so far."""
        decoder, end = self._decoder, len(self.token_ids)
        reached, closures, nodes = {end - 1}, {}, self._nodes
        found: list[int] = []
        with ExitStack() as stack:
            replaying = False
            for layer in reversed(range(decoder.n_layers)):
                at = nodes.at[layer]
                missing = sorted(t for t in reached if t not in at)
                if missing:
                    if not replaying:
                        stack.enter_context(self._tracer._replaying(self._recording))
                        replaying = True
                    rows = torch.tensor(missing)
                    scores = score_layer(
                        self._recording, layer, rows, self._threshold, self._tracer.impl
                    )
                    closures[layer] = scores.closure
                    table = _table(scores, self._recording.resid_final.device)
                    self._keep(table, np.full(len(missing), layer), np.array(missing))
                here = [at[t] for t in reached]
                found += here
                reached = set(itertools.chain.from_iterable(nodes.below[i] for i in here))
        if closures:
            check_closure(closures)
        return in_order(
            torch.from_numpy(nodes.edges.of(found)).T,
            torch.from_numpy(nodes.heads.of(found)).T,
            [flagged for i in found for flagged in nodes.flagged.get(i, ())],
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

    def _keep(self, table: LayerTable, layer_of: _Ints, position_of: _Ints) -> None:
        """Makes nodes of the rows [N] of a table. layer_of, position_of: [N], where they stand."""
        device, n, nodes = table.rows.device, len(layer_of), self._nodes
        reached = torch.ones(max(n, len(self.token_ids)), dtype=torch.bool, device=device)
        grown, _ = grow_layer(0, table, reached, self._threshold, self._granularity)
        parts: list[tuple[np.ndarray[Any, Any], ...]] = []
        below: list[list[int]] = [[] for _ in range(n)]
        for step in grown.steps:
            kept = step.kept.nonzero().squeeze(1)
            node, source = _numpy(step.target[kept]), _numpy(step.source[kept])
            if step.kind == EdgeKind.ATTENTION:
                for i, j in zip(node.tolist(), source.tolist(), strict=True):
                    below[i].append(j)
            else:
                source = position_of[node]
                if table.ffn_residual is None or step.kind == EdgeKind.RESIDUAL_MID:
                    for i in node.tolist():
                        below[i].append(int(position_of[i]))
            kind = np.full(len(node), int(step.kind))
            parts.append((node, kind, source, _numpy(step.weight[kept].float())))
        entry, head = grown.head_kept.nonzero(as_tuple=True)
        attention = grown.steps[-1]
        of_heads = [_numpy(attention.target[entry]), _numpy(head), _numpy(attention.source[entry])]
        of_heads.append(_numpy(grown.head_weight[entry, head].float()))
        first = len(nodes.below)
        nodes.below += below
        of_edges = [np.concatenate(x) for x in zip(*parts, strict=True)]
        for lists, columns in ((nodes.edges, of_edges), (nodes.heads, of_heads)):
            target, which, source, weight = columns
            rows = np.stack([layer_of[target], which, position_of[target], source, weight], 1)
            order = target.argsort(kind="stable")
            lists.extend(rows[order], np.bincount(target, minlength=n))
        for is_mid, _, flags in grown.unattributed:
            place = NodeKind.MID if is_mid else NodeKind.POST
            for i in flags.nonzero().squeeze(1).tolist():
                flagged = Node(int(layer_of[i]), place, int(position_of[i]))
                nodes.flagged.setdefault(first + i, []).append(flagged)
        for i, (layer, position) in enumerate(
            zip(layer_of.tolist(), position_of.tolist(), strict=True)
        ):
            nodes.at[layer][position] = first + i


def _table(scores: LayerScores, device: torch.device) -> LayerTable:
    """A layer's scores as a table whose rows are nodes."""

    def move(x: Tensor | None) -> Any:
        return None if x is None else x.to(device)

    return LayerTable(
        torch.arange(len(scores.rows), device=device),
        move(scores.residual),
        move(scores.ffn),
        move(scores.ffn_residual),
        EdgeList(*map(move, scores.attention.edges)),
        move(scores.unattributed),
        move(scores.ffn_unattributed),
    )


def _numpy(x: Tensor) -> np.ndarray[Any, Any]:
    return x.cpu().numpy()


def _crossed(window: int | None, n_tokens: int) -> int | None:
    return None if window is None or window >= n_tokens else window


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
