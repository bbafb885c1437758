"""Tracer: text -> RouteGraph (paper section 2; docs/design.md section 3).

1. Record one forward pass: the residual stream, keys and values of every layer.
2. Start at the node (last layer, post, position).
3. For each layer, from the top: score the rows that have been reached, and those alone. Each
   node is the sum of its parts; the importance of a part is its share of their proximities.
4. Keep the edges above the threshold. Their sources are the rows to score in the layer below.
5. What is left at the bottom is the prediction's route graph.

Several positions are so many nodes to start at.

For all positions at once, every row of a layer is scored, and a position's graph is what its node
reaches over the edges kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    NamedTuple,
    NoReturn,
    SupportsIndex,
    TypeAlias,
    TypeVar,
    overload,
)

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import capture
from .batching import Batch, as_texts, batches, is_batch
from .checkpoint import Checkpoint
from .drilldown import (
    NeuronScores,
    NodeLens,
    PromotedTokens,
    contribution_map,
    ffn_output,
    head_output,
    lenses,
    neuron_output,
    neuron_scores,
    promoted_tokens,
)
from .graph import (
    Granularity,
    Grown,
    Node,
    NodeKind,
    Prediction,
    RouteGraph,
    Routes,
    Span,
    as_index,
    assemble,
    check_threshold,
    grow_layer,
)
from .lens import likeliest
from .memory import parse_bytes
from .model import Decoder, evaluating
from .neurons import NeuronBases
from .plan import LONG, Place, Plan, Sizes, Speed, make_plan, measure_speed, room_now
from .prefill import is_chunkable
from .progress import progress
from .recording import (
    Recording,
    RecordingMode,
    load,
    record,
    record_in_chunks,
    record_to_file,
    record_together,
)
from .scoring import LayerScores, check_closure, choose_impl, score_layer
from .tokens import Text, encode, token_strings

if TYPE_CHECKING:
    import os

    from transformers import LogitsProcessorList

    from .generation import GenerationStep

# One position, negative from the end, or several.
Position: TypeAlias = "SupportsIndex | slice | Iterable[SupportsIndex]"

Result = TypeVar("Result")

_HEAD_ROWS = 64  # whose logits are formed at once


class Tracer:
    """Explains the predictions of one model.

    model: any Hugging Face decoder in memory, inside PEFT or not. tokenizer: its own, or None to
    work on token ids.
    impl: "auto", "reference", "eager", "cpu" or "triton"; also by $IFR_FAST_IMPL.
    max_memory: of the model's device, its weights included, as in "8GB"; default: what is free.

    Raises `UnsupportedArchitectureError` where the model's parts cannot be shown to add up.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        impl: str = "auto",
        max_memory: int | str | None = None,
    ) -> None:
        self.max_memory = None if max_memory is None else parse_bytes(max_memory)
        self.decoder = Decoder(model)
        self.impl = choose_impl(impl, self.decoder.device, self.decoder.dtype)
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | None = None,
        *,
        impl: str = "auto",
        max_memory: int | str | None = None,
        **kwargs: Any,
    ) -> Tracer:
        """Opens a Hub name or a local directory; without one, the default model.

        The default, SmolLM2-135M-Instruct, is fetched and converted on first use. Other keyword
        arguments go to `AutoModelForCausalLM.from_pretrained`.
        """
        from .pretrained import load

        model, tokenizer = load(name, **kwargs)
        return cls(model, tokenizer, impl=impl, max_memory=max_memory)

    @overload
    def record(  # type: ignore[overload-overlap]  # a tensor may be an index, says its type
        self,
        text: Batch,
        *,
        mode: RecordingMode | str | None = ...,
        add_special_tokens: bool | None = ...,
        batch_size: int | None = ...,
    ) -> list[Recording]: ...
    @overload
    def record(
        self,
        text: Text | Recording,
        *,
        mode: RecordingMode | str | None = ...,
        path: str | os.PathLike[str] | None = ...,
        add_special_tokens: bool | None = ...,
    ) -> Recording: ...
    def record(
        self,
        text: Text | Recording | Batch,
        *,
        mode: RecordingMode | str | None = None,
        path: str | os.PathLike[str] | None = None,
        add_special_tokens: bool | None = None,
        batch_size: int | None = None,
    ) -> Recording | list[Recording]:
        """One forward pass over a text. `mode` is chosen by `plan` unless given.

        path: a lean recording is made in this file, mapped into memory. Where the file is there, of
        the same text, it is read, or gone on with if it is unfinished: an interrupted run is
        resumed by the same call.

        Of several texts (see `trace`), a list of recordings, which share memory.

        Raises MemoryBudgetError where it would not fit, and FormatError where the file holds
        something else.
        """
        if is_batch(text):
            if path is not None:
                raise ValueError("path: expected a single text, got several")
            return self._each(text, self._own, batch_size, -1, add_special_tokens, mode)
        return self._record_one(text, mode, path, add_special_tokens)

    def _record_one(
        self,
        text: Text | Recording,
        mode: RecordingMode | str | None = None,
        path: str | os.PathLike[str] | None = None,
        add_special_tokens: bool | None = None,
    ) -> Recording:
        if isinstance(text, Recording):
            return self._own(text)
        return self._record(self._encode(text, add_special_tokens), -1, mode, path)

    def load_recording(self, path: str | os.PathLike[str]) -> Recording:
        """What `Recording.save`, or `record` with a path, has left: mapped into memory, no copy.

        Raises FormatError for a file that is truncated, foreign, unfinished, or of another model.
        """
        return load(path, self.decoder)

    def _own(self, recording: Recording) -> Recording:
        if recording.decoder is not self.decoder:
            raise ValueError("text: this Recording was made by another Tracer")
        return recording

    def _encode(self, text: Text, add_special_tokens: bool | None) -> Tensor:
        token_ids = encode(text, self.tokenizer, add_special_tokens)
        self._check_tokens(token_ids)
        return token_ids

    def _record(
        self,
        token_ids: Tensor,
        position: int,
        mode: RecordingMode | str | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> Recording:
        mode = _check_mode(mode)
        if path is not None and mode == RecordingMode.FULL:
            raise ValueError("path: only lean recordings are made in a file; save a full one")
        strings = token_strings(token_ids, self.tokenizer)
        decoder = self.decoder
        if path is not None and not is_chunkable(decoder):
            return record_to_file(decoder, token_ids, strings, path, position)
        plan = self._plan(
            len(token_ids),
            mode=mode,
            place=None if path is None else Place.FILE,
            path=path,
        )
        if plan.chunk_rows is None:
            return record(decoder, token_ids, strings, plan.mode, position)
        place = {Place.DEVICE: decoder.device, Place.HOST: torch.device("cpu"), Place.FILE: None}
        return record_in_chunks(
            decoder, token_ids, strings, position, place=place[plan.place], path=path
        )

    def plan(
        self,
        n_tokens: int,
        *,
        mode: RecordingMode | str | None = None,
        path: str | os.PathLike[str] | None = None,
        max_memory: int | str | None = None,
    ) -> Plan:
        """Memory and time to expect of recording `n_tokens`: full where that fits, else lean, in
        chunks where it is long; else in host memory, or in a file mapped into memory.

        mode, path: as `record` would be given them. max_memory: in place of the tracer's. The time
        is from one layer, measured once.

        Raises MemoryBudgetError where nothing fits.
        """
        plan = self._plan(
            n_tokens,
            mode=_check_mode(mode),
            place=None if path is None else Place.FILE,
            max_memory=None if max_memory is None else parse_bytes(max_memory),
            path=path,
        )
        return replace(plan, seconds=self._speed.seconds(self.decoder, n_tokens))

    @functools.cached_property
    def _speed(self) -> Speed:
        return measure_speed(self.decoder)

    @functools.cached_property
    def _sizes(self) -> Sizes:
        return Sizes.of(self.decoder)

    def _plan(
        self,
        n_tokens: int,
        *,
        mode: RecordingMode | None = None,
        place: Place | None = None,
        max_memory: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> Plan:
        sizes = self._sizes
        room = room_now(
            sizes.device,
            sizes.weights_bytes + sizes.maps_bytes,
            self.max_memory if max_memory is None else max_memory,
            None if path is None else str(Path(path).absolute().parent),
        )
        if path is not None and Path(path).exists():  # its blocks are its own already
            room = room._replace(disk=None)
        return make_plan(sizes, n_tokens, room, mode=mode, place=place)

    def _each(
        self,
        batch: Batch,
        use: Callable[[Recording], Result],
        batch_size: int | None,
        position: Position,
        add_special_tokens: bool | None,
        mode: RecordingMode | str | None = None,
    ) -> list[Result]:
        """What `use` makes of the recording of each text of a batch, in order. position: one at
        which it will look, of each text.
        """
        if batch_size is not None and as_index("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        texts = []
        for i, text in enumerate(as_texts(batch)):
            try:
                texts.append(self._encode(text, add_special_tokens))
            except ValueError as error:
                raise ValueError(f"text {i}: {str(error).removeprefix('text: ')}") from error
        positions = [max(spanned(position, None, len(text))) for text in texts]
        found: dict[int, Result] = {}
        for together in batches(self.decoder, [len(text) for text in texts], batch_size):
            recordings = self._record_together(
                [texts[i] for i in together], [positions[i] for i in together], mode
            )
            for i, recording in zip(together, recordings, strict=True):
                found[i] = use(recording)
        return [found[i] for i in range(len(texts))]

    def _record_together(
        self, texts: list[Tensor], positions: list[int], mode: RecordingMode | str | None
    ) -> list[Recording]:
        if len(texts) == 1:
            return [self._record(texts[0], positions[0], mode)]
        mode = _check_mode(mode) or self._plan(len(texts) * len(texts[0])).mode
        strings = [token_strings(text, self.tokenizer) for text in texts]
        return record_together(self.decoder, texts, strings, mode, positions)

    @overload
    def trace(  # type: ignore[overload-overlap]
        self,
        text: Batch,
        *,
        position: Position = ...,
        position_weights: Sequence[float] | Tensor | None = ...,
        threshold: float = ...,
        granularity: Granularity = ...,
        add_special_tokens: bool | None = ...,
        batch_size: int | None = ...,
    ) -> list[RouteGraph]: ...
    @overload
    def trace(
        self,
        text: Text | Recording,
        *,
        position: Position = ...,
        position_weights: Sequence[float] | Tensor | None = ...,
        threshold: float = ...,
        granularity: Granularity = ...,
        add_special_tokens: bool | None = ...,
    ) -> RouteGraph: ...
    @torch.inference_mode()
    def trace(
        self,
        text: Text | Recording | Batch,
        *,
        position: Position = -1,
        position_weights: Sequence[float] | Tensor | None = None,
        threshold: float = 0.04,
        granularity: Granularity = "token",
        add_special_tokens: bool | None = None,
        batch_size: int | None = None,
    ) -> RouteGraph | list[RouteGraph]:
        """The route graph of the prediction made at `position` (negative from the end).

        Several texts give a list of graphs, in order: a list of strings, of token-id lists or
        tensors, or of conversations, or what a tokenizer returns for several texts, padded on
        either side. (A list of ints is one text, and so is a list of chat messages.) They run
        `batch_size` at a time, by default as many as make a pass worth it, those of like
        length together; models outside transformers' attention interface run them one by one.

        position: also a slice or several positions, whose predictions are explained by one graph,
        the union of theirs. Importances in it are their mean, or their mean by
        `position_weights`, one number of at least 0 for each (a position given twice adds up).
        threshold: edges of at most this importance are dropped. granularity: "token" compares
        an attention edge summed over heads, "head" each head's by itself.
        """
        threshold = check_options(threshold, granularity)
        if is_batch(text):

            def one(recording: Recording) -> RouteGraph:
                return self.trace(
                    recording,
                    position=position,
                    position_weights=position_weights,
                    threshold=threshold,
                    granularity=granularity,
                )

            return self._each(text, one, batch_size, position, add_special_tokens)
        if isinstance(text, Recording):
            recording = self._own(text)
            starts = spanned(position, position_weights, len(text))
        else:
            token_ids = self._encode(text, add_special_tokens)
            starts = spanned(position, position_weights, len(token_ids))
            recording = self._record(token_ids, max(starts))
        T, positions = len(recording), list(starts)
        n_layers = self.decoder.n_layers

        reached = torch.zeros(T, dtype=torch.bool, device=recording.resid_final.device)
        reached[positions] = True
        with self._replaying(recording):
            grown = grow(
                lambda layer, rows: score_layer(recording, layer, rows, threshold, self.impl),
                n_layers,
                reached,
                threshold,
                granularity,
            )
        predictions = self._predict(recording, positions)
        single = len(positions) == 1
        return assemble(
            grown,
            [block.parallel for block in self.decoder.blocks],
            tokens=recording.tokens,
            token_ids=recording.token_ids,
            position=positions[-1],
            threshold=threshold,
            granularity=granularity,
            n_layers=n_layers,
            n_heads=self.decoder.n_heads,
            predictions=predictions[-1],
            span=None if single else Span(positions, list(starts.values()), predictions),
        )

    @overload
    def trace_all(  # type: ignore[overload-overlap]
        self,
        text: Batch,
        *,
        threshold: float = ...,
        granularity: Granularity = ...,
        add_special_tokens: bool | None = ...,
        batch_size: int | None = ...,
    ) -> list[Routes]: ...
    @overload
    def trace_all(
        self,
        text: Text | Recording,
        *,
        threshold: float = ...,
        granularity: Granularity = ...,
        checkpoint: str | os.PathLike[str] | None = ...,
        add_special_tokens: bool | None = ...,
    ) -> Routes: ...
    @torch.inference_mode()
    def trace_all(
        self,
        text: Text | Recording | Batch,
        *,
        threshold: float = 0.04,
        granularity: Granularity = "token",
        checkpoint: str | os.PathLike[str] | None = None,
        add_special_tokens: bool | None = None,
        batch_size: int | None = None,
    ) -> Routes | list[Routes]:
        """The route graphs of every position's prediction: every layer scored once, for all.

        checkpoint: a folder that keeps each layer's scores, and from which the same call goes on
        after an interruption. Raises FormatError where it is another trace's.

        Of several texts (see `trace`), a list of them.
        """
        threshold = check_options(threshold, granularity)
        if is_batch(text):
            if checkpoint is not None:
                raise ValueError("checkpoint: expected a single text, got several")
            return self._each(
                text,
                lambda recording: self.trace_all(
                    recording, threshold=threshold, granularity=granularity
                ),
                batch_size,
                -1,
                add_special_tokens,
            )
        recording = self._record_one(text, add_special_tokens=add_special_tokens)
        rows = torch.arange(len(recording))
        tables = []
        kept = None if checkpoint is None else Checkpoint.of(checkpoint, recording, threshold)
        closures = {}
        L = self.decoder.n_layers
        shown = progress("scoring", L) if len(recording) > LONG else nullcontext(lambda _: None)
        with self._replaying(recording), shown as show:
            for layer in range(L):
                table = None if kept is None else kept.load(layer, recording.resid_final.device)
                if table is None:
                    scores = score_layer(recording, layer, rows, threshold, self.impl)
                    table = scores.table(recording.resid_final.device)
                    if kept is None:
                        closures[layer] = scores.closure
                    else:
                        check_closure({layer: scores.closure})
                        kept.save(layer, table)
                tables.append(table)
                show(layer + 1)
        if closures:
            check_closure(closures)
        return Routes(
            tokens=recording.tokens,
            token_ids=recording.token_ids,
            threshold=threshold,
            granularity=granularity,
            layers=tables,
            predict=functools.partial(self._predict, _HeadOnly.of(recording)),
            scored_threshold=threshold,
        )

    def generate(
        self,
        prompt: Text | Recording,
        *,
        max_new_tokens: int = 32,
        threshold: float = 0.04,
        granularity: Granularity = "token",
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generator: torch.Generator | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        add_special_tokens: bool | None = None,
    ) -> Iterator[GenerationStep]:
        """Continues a text: yields each new token with the graph of the prediction that chose it.

        The prompt's keys and values are reused, so a token costs a decode step and no second
        forward pass; its graph is that of `trace` of the same text. Between two tokens, and when
        the iterator is dropped, the model is as it was.

        Without `do_sample` the most probable token is taken. Sampling is that of transformers:
        `logits_processor`, then temperature, top_k, top_p; the model's own generation_config is
        not asked for them. generator: of the random numbers, else torch's own (`manual_seed`).
        It ends after `max_new_tokens`, where the model's context ends, or with one of
        `eos_token_id` (default: the model's own; an empty list: never), which is yielded too.
        """
        from .generation import chooser, steps, stop_tokens

        threshold = check_options(threshold, granularity)
        if as_index("max_new_tokens", max_new_tokens) < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        choose = chooser(
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            logits_processor=logits_processor,
            generator=generator,
        )
        stop = stop_tokens(self.model, eos_token_id)
        text = (
            self._own(prompt)
            if isinstance(prompt, Recording)
            else self._encode(prompt, add_special_tokens)
        )
        return steps(self, text, choose, stop, max_new_tokens, threshold, granularity)

    def contributions(
        self,
        text: Text | Recording,
        *,
        rows: Iterable[int] | Tensor | None = None,
        layers: Iterable[int] | None = None,
        keep: float = 0.01,
        add_special_tokens: bool | None = None,
    ) -> Iterator[LayerScores]:
        """The importances of all parts at `rows` of each of `layers`, top layer first.

        Edges above `keep` are listed; totals count all of them. Default: every row and layer.
        """
        if not 0 <= keep <= 1:
            raise ValueError(f"keep: expected a number from 0 to 1, got {keep}")
        wanted = indices("layers", layers, self.decoder.n_layers)
        recording = self._record_one(text, add_special_tokens=add_special_tokens)
        chosen = torch.tensor(indices("rows", rows, len(recording)))
        return self._contributions(recording, chosen, wanted[::-1], keep)

    def _contributions(
        self, recording: Recording, rows: Tensor, layers: list[int], keep: float
    ) -> Iterator[LayerScores]:
        for layer in layers:
            with torch.inference_mode(), self._replaying(recording):
                scores = score_layer(recording, layer, rows, keep, self.impl)
                check_closure({layer: scores.closure})
            yield scores

    def contribution_map(
        self,
        text: Text | Recording,
        *,
        layer: int,
        head: int | None = None,
        add_special_tokens: bool | None = None,
    ) -> Tensor:
        """[T, T] float32: what a head carries from each source (column) to each target (row), as
        importance in the target; without `head`, all heads of the layer together.
        """
        layer = index_within("layer", layer, self.decoder.n_layers)
        if head is not None:
            head = index_within("head", head, self.decoder.n_heads)
        recording = self._record_one(text, add_special_tokens=add_special_tokens)
        return contribution_map(recording, layer, head, self.impl)

    @overload
    def logit_lens(
        self,
        text: Text | Recording,
        nodes: Node,
        *,
        k: int = ...,
        add_special_tokens: bool | None = ...,
    ) -> NodeLens: ...
    @overload
    def logit_lens(
        self,
        text: Text | Recording,
        nodes: Iterable[Node],
        *,
        k: int = ...,
        add_special_tokens: bool | None = ...,
    ) -> list[NodeLens]: ...
    def logit_lens(
        self,
        text: Text | Recording,
        nodes: Node | Iterable[Node],
        *,
        k: int = 10,
        add_special_tokens: bool | None = None,
    ) -> NodeLens | list[NodeLens]:
        """What the model would predict if a node were its last: the k likeliest tokens, and every
        token's logit and rank. Final norm and head are the model's own.

        nodes: one `Node`, or several, which give a list; (layer, kind, position) will do, negative
        from the end. Of an `ffn` node, what the FFN adds is read.
        """
        if as_index("k", k) < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        if not isinstance(nodes, Iterable):
            raise ValueError(f"nodes: expected a node or several, got {nodes!r}")
        single = isinstance(nodes, tuple) and len(nodes) == 3 and isinstance(nodes[1], str)
        given: list[Any] = [nodes] if single else list(nodes)
        if not given:
            raise ValueError("nodes: is empty; expected at least one node")
        recording = self._record_one(text, add_special_tokens=add_special_tokens)
        wanted = [self._node(node, len(recording)) for node in given]
        found = lenses(recording, wanted, k, self.tokenizer)
        return found[0] if single else found

    def _node(self, given: Any, n_tokens: int) -> Node:
        try:
            layer, kind, position = given
            kind = NodeKind(kind)
        except (TypeError, ValueError):
            raise ValueError(
                "nodes: expected (layer, kind, position) with a kind of "
                f"{', '.join(NodeKind)}, got {given!r}"
            ) from None
        layer = index_within("nodes: layer", layer, self.decoder.n_layers)
        if kind == NodeKind.EMBED and layer != 0:
            raise ValueError(f"nodes: an embed is at layer 0, got {layer}")
        return Node(layer, kind, index_within("nodes: position", position, n_tokens))

    def promoted_tokens(
        self,
        text: Text | Recording,
        *,
        layer: int,
        position: SupportsIndex = -1,
        head: int | None = None,
        source: int | None = None,
        neuron: int | None = None,
        k: int = 10,
        add_special_tokens: bool | None = None,
    ) -> PromotedTokens:
        """The tokens whose logits a part of the stream at `position` raises and lowers most: the
        layer's FFN block, or one `neuron` of it, or one `head`, or only what a head brings from
        position `source`.

        The final norm is held at what it was there, so that the logits of all parts add up.
        Raises UnsupportedArchitectureError for a neuron where the FFN has no basis of neurons.
        """
        if as_index("k", k) < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        if neuron is not None and head is not None:
            raise ValueError("neuron: give it, or head, not both")
        if source is not None and head is None:
            raise ValueError("source: goes with head")
        layer = index_within("layer", layer, self.decoder.n_layers)
        if head is not None:
            head = index_within("head", head, self.decoder.n_heads)
        recording = self._record_one(text, add_special_tokens=add_special_tokens)
        at = index_within("position", position, len(recording))
        if source is not None:
            source = index_within("source", source, len(recording))
            if source > at:
                raise ValueError(f"source: expected a position up to {at}, got {source}")
        if head is not None:
            part = head_output(recording, layer, head, at, source)
        elif neuron is not None:
            part = neuron_output(recording, layer, as_index("neuron", neuron), at, self._bases)
        else:
            part = ffn_output(recording, layer, at)
        return promoted_tokens(recording, part, at, k, self.tokenizer)

    def neurons(
        self,
        text: Text | Recording,
        *,
        layer: int,
        position: Position = -1,
        kind: NodeKind | str = NodeKind.POST,
        add_special_tokens: bool | None = None,
    ) -> NeuronScores:
        """The importance of each neuron of a layer's FFN block, at one or several positions: as
        parts of `post`, in place of the FFN's output, or (kind="ffn") of that output itself.

        Raises UnsupportedArchitectureError where the FFN has no basis of neurons, as in a mixture
        of experts.
        """
        if kind not in (NodeKind.POST, NodeKind.FFN):
            raise ValueError(f"kind: expected 'post' or 'ffn', got {kind!r}")
        layer = index_within("layer", layer, self.decoder.n_layers)
        recording = self._record_one(text, add_special_tokens=add_special_tokens)
        rows = torch.tensor(list(spanned(position, None, len(recording))))
        return neuron_scores(recording, layer, rows, NodeKind(kind), self._bases, self.impl)

    @functools.cached_property
    def _bases(self) -> NeuronBases:
        return NeuronBases(self.decoder)

    @contextmanager
    def _replaying(self, recording: Recording) -> Iterator[None]:
        """Within, layers can be replayed where the recording needs it."""
        if not recording.is_replayed:
            yield
            return

        def outside(_: capture.AttentionCall) -> NoReturn:
            raise AssertionError("attention asked outside of a replay")

        model = self.decoder.model
        with evaluating(model), self.decoder.attention_through(model, outside):
            yield

    def _check_tokens(self, token_ids: Tensor) -> None:
        limit, vocab = self.decoder.max_length, self.decoder.vocab_size
        if limit is not None and len(token_ids) > limit:
            raise ValueError(
                f"text: has {len(token_ids)} tokens, the model's context holds {limit}"
            )
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab:
            raise ValueError(f"text: token ids must be from 0 to {vocab - 1}")

    @torch.inference_mode()
    def _predict(
        self, recording: Recording | _HeadOnly, positions: list[int]
    ) -> list[list[Prediction]]:
        """The likeliest next tokens after each of `positions`."""
        found = []
        for begin in range(0, len(positions), _HEAD_ROWS):
            if positions == [recording.position]:
                logits = recording.logits[None]
            else:
                states = recording.states[positions[begin : begin + _HEAD_ROWS]]
                logits = self.decoder.head(states.to(self.decoder.device))
            found += self.likeliest(logits)
        return found

    def likeliest(self, logits: Tensor) -> list[list[Prediction]]:
        """The tokens that each row of `logits` [R, vocab] makes most probable."""
        return likeliest(logits, self.tokenizer)


def _check_mode(mode: RecordingMode | str | None) -> RecordingMode | None:
    if mode is not None and mode not in list(RecordingMode):
        raise ValueError(f"mode: expected 'full' or 'lean', got {mode!r}")
    return None if mode is None else RecordingMode(mode)


class _HeadOnly(NamedTuple):
    """What predictions need of a Recording, so that the rest of it can be freed."""

    states: Tensor
    position: int
    logits: Tensor

    @staticmethod
    def of(recording: Recording) -> _HeadOnly:
        return _HeadOnly(recording.states, recording.position, recording.logits)


def grow(
    score: Callable[[int, Tensor], LayerScores],
    n_layers: int,
    reached: Tensor,
    threshold: float,
    granularity: Granularity,
) -> list[Grown]:
    """Routes from the `reached` [T] bool positions down, a layer's step each, top layer first.

    score: scores a layer at rows [R], with its edges above `threshold`.
    """
    grown, closures = [], {}
    for layer in reversed(range(n_layers)):
        rows = reached.cpu().nonzero().squeeze(1)  # the layer's one read by the host
        if len(rows) == 0:
            break
        scores = score(layer, rows)
        closures[layer] = scores.closure
        table = scores.table(reached.device)
        step, reached = grow_layer(layer, table, reached, threshold, granularity)
        grown.append(step)
    check_closure(closures)
    return grown


def check_options(threshold: float, granularity: str) -> float:
    """The threshold as a float. Raises ValueError where one of the two is none."""
    if granularity not in ("token", "head"):
        raise ValueError(f"granularity: expected 'token' or 'head', got {granularity!r}")
    return check_threshold(threshold)


def spanned(
    position: Position, weights: Sequence[float] | Tensor | None, n_tokens: int
) -> dict[int, float]:
    """The positions that `position` names in a text of `n_tokens`, ascending, and their weights,
    which sum to 1. Raises ValueError where there is none, or the weights are no such thing.
    """
    if isinstance(position, slice):
        chosen = list(range(n_tokens)[position])
    elif isinstance(position, Iterable) and not (
        isinstance(position, Tensor | np.ndarray) and position.ndim == 0
    ):
        chosen = [index_within("position", i, n_tokens) for i in position]
    else:
        chosen = [index_within("position", position, n_tokens)]
    if not chosen:
        raise ValueError(f"position: {position!r} names none of {n_tokens} tokens")
    given = [1.0] * len(chosen) if weights is None else [float(w) for w in weights]
    if len(given) != len(chosen):
        raise ValueError(
            f"position_weights: expected one for each of {len(chosen)} positions, got {len(given)}"
        )
    total = math.fsum(given)
    if min(given) < 0 or not 0 < total < math.inf:
        raise ValueError("position_weights: expected numbers of at least 0, and not all of them 0")
    starts = dict.fromkeys(sorted(chosen), 0.0)
    for i, weight in zip(chosen, given, strict=True):
        starts[i] += weight / total
    return starts


def indices(name: str, given: Iterable[int] | Tensor | None, n: int) -> list[int]:
    """Ascending; all of n where None. Raises ValueError where there are none or they are others."""
    if given is None:
        return list(range(n))
    if not isinstance(given, Iterable):
        raise ValueError(f"{name}: expected indices, several, got {given!r}")
    several = given.tolist() if isinstance(given, Tensor) else given
    chosen = sorted({index_within(name, i, n) for i in several})
    if not chosen:
        raise ValueError(f"{name}: is empty; expected at least one index")
    return chosen


def index_within(name: str, i: SupportsIndex, n: int) -> int:
    """0 to n - 1, where negative ones count from the end. Raises ValueError for all others."""
    try:
        index = as_index(name, i)
    except ValueError:
        raise ValueError(f"{name}: expected an int from {-n} to {n - 1}, got {i!r}") from None
    if not -n <= index < n:
        raise ValueError(f"{name}: expected {-n} to {n - 1}, got {index}")
    return index % n
