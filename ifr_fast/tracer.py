"""Tracer: text -> RouteGraph (paper section 2; docs/design.md section 3).

1. Record one forward pass: the residual stream, keys and values of every layer.
2. Start at the node (last layer, post, position).
3. For each layer, from the top: score the rows that have been reached, and those alone. Each
   node is the sum of its parts; the importance of a part is its share of their proximities.
4. Keep the edges above the threshold. Their sources are the rows to score in the layer below.
5. The edges kept are the prediction's route graph.

The graph of several positions starts at all of their nodes. For all positions at once, every row of
a layer is scored, and a position's graph is the part that its node reaches over the edges kept.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import (
    Position,
    check_count,
    check_fraction,
    check_options,
    index_within,
    indices,
    spanned,
)
from .drilldown.lens import (
    NodeLens,
    PartChoice,
    PromotedTokens,
    lenses,
    listed_nodes,
    node_within,
    promoted_tokens,
)
from .drilldown.neuron_basis import NeuronBases
from .drilldown.neurons import NeuronScores, check_neuron_kind, neuron_scores
from .drilldown.parts import contribution_map
from .graph.tables import Granularity, Node, NodeKind, Prediction
from .model.opening import open_decoder
from .recording.files import load
from .recording.memory import parse_bytes
from .recording.plan import Plan
from .recording.predictions import likeliest
from .recording.recorder import Recorder
from .recording.recording import Recording, RecordingMode
from .routes.all_positions import Routes
from .routes.route_graph import RouteGraph
from .routes.tracing import trace_all_positions, trace_recording
from .scoring.implementations import check_recurrences, choose_impl, load_kernel
from .scoring.layer import score_layers
from .scoring.scores import LayerScores
from .tokens import Batch, Text

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

    from .generation.steps import GenerationStep


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
        self.decoder = open_decoder(model)
        self.impl = choose_impl(impl, self.decoder.device, self.decoder.dtype)
        check_recurrences(self.impl, impl, self.decoder.has_recurrences)
        self.model = model
        self.tokenizer = tokenizer
        self.kernel = load_kernel(self.impl, bounded=self.max_memory is not None)
        self._recorder = Recorder(self.decoder, tokenizer, self.max_memory)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | None = None,
        *,
        impl: str = "auto",
        max_memory: int | str | None = None,
        **kwargs: Any,
    ) -> Tracer:
        """Opens a Hub name, a directory of a model or a PEFT adapter, or a GGUF file; without one,
        the default model, SmolLM2-135M-Instruct, which is fetched and converted on first use. Other
        keyword arguments go to `AutoModelForCausalLM.from_pretrained`.
        """
        from .model.pretrained import load

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

        path: a lean recording is made in this file, mapped into memory. A file that holds the same
        text is read, or completed if it is unfinished: the same call resumes an interrupted run.
        Several texts (see `trace`) give a list of recordings, which share memory.

        Raises MemoryBudgetError where it would not fit, and FormatError where the file holds
        something else.
        """
        if self._recorder.is_batch(text, batch_size):
            if path is not None:
                raise ValueError("path: expected a single text, got several")
            own = self._recorder.own
            return self._recorder.each(text, own, batch_size, -1, add_special_tokens, mode)
        return self._recorder.record(text, mode, path, add_special_tokens)

    def load_recording(self, path: str | os.PathLike[str]) -> Recording:
        """The recording that `Recording.save`, or `record` with a path, left in a file: mapped into
        memory, not copied.

        Raises FormatError for a file that is truncated, foreign, unfinished, or of another model.
        """
        return load(path, self.decoder)

    def plan(
        self,
        n_tokens: int,
        *,
        mode: RecordingMode | str | None = None,
        path: str | os.PathLike[str] | None = None,
        max_memory: int | str | None = None,
    ) -> Plan:
        """The memory and the time that recording `n_tokens` would take. The recording is full where
        that fits, else lean, in chunks where it is long; else in host memory, or in a mapped file.

        mode, path: as for `record`. max_memory: in place of the tracer's. The time is estimated
        from one layer, measured once.

        Raises MemoryBudgetError where nothing fits.
        """
        return self._recorder.plan(n_tokens, mode, path, max_memory)

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
        tensors, or of conversations, or the result of a tokenizer for several texts, padded on
        either side. (A list of ints is one text, and so are a list of chat messages, a dict of
        `messages`, `tools` and `continue_final_message`, and a tensor of one row.) Texts of
        similar length run together, `batch_size` at a time, by default up to 8,192 tokens a pass;
        models outside transformers' attention interface run them one by one.

        position: also a slice or several positions, which one graph then explains: the union of
        their graphs. Its importances are the mean of theirs, weighted by `position_weights`, one
        number of at least 0 for each (the weights of a repeated position are added).
        threshold: edges of at most this importance are dropped. granularity: "token" compares
        an attention edge summed over heads, "head" each head's by itself.
        """
        threshold = check_options(threshold, granularity)

        def one(recording: Recording) -> RouteGraph:
            starts = spanned(position, position_weights, len(recording))
            options = (threshold, granularity, self.kernel, self.tokenizer)
            return trace_recording(recording, starts, *options)

        if self._recorder.is_batch(text, batch_size):
            return self._recorder.each(text, one, batch_size, position, add_special_tokens)
        return one(self._recorder.record_at(text, position, position_weights, add_special_tokens))

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
        """The route graphs of every position's prediction: every layer is scored once, for all.

        checkpoint: a folder that keeps each layer's scores; the same call resumes from it after an
        interruption. Raises FormatError where the folder is another trace's.
        Several texts (see `trace`) give a list of Routes.
        """
        threshold = check_options(threshold, granularity)

        def one(recording: Recording) -> Routes:
            options = (threshold, granularity, self.kernel, self.tokenizer, checkpoint)
            return trace_all_positions(recording, *options)

        if self._recorder.is_batch(text, batch_size):
            if checkpoint is not None:
                raise ValueError("checkpoint: expected a single text, got several")
            return self._recorder.each(text, one, batch_size, -1, add_special_tokens)
        return one(self._recorder.record(text, add_special_tokens=add_special_tokens))

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
        `logits_processor`, then temperature, top_k, top_p; the model's generation_config is
        ignored. generator: the source of random numbers, by default torch's own (`manual_seed`).
        Generation ends after `max_new_tokens`, where the model's context ends, or with one of
        `eos_token_id` (default: the model's own; an empty list: never), which is yielded too.
        """
        from .generation.sampling import chooser, stop_tokens
        from .generation.steps import steps

        threshold = check_options(threshold, granularity)
        check_count("max_new_tokens", max_new_tokens)
        choose = chooser(do_sample, temperature, top_k, top_p, logits_processor, generator)
        text = self._recorder.encoded(prompt, add_special_tokens)
        stop = stop_tokens(self.model, eos_token_id, self.decoder.vocab_size)
        options = (choose, stop, max_new_tokens, threshold, granularity)
        return steps(self._recorder, self.kernel, text, *options)

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
        keep = check_fraction("keep", keep)
        wanted = indices("layers", layers, self.decoder.n_layers)
        recording = self._recorder.record(text, add_special_tokens=add_special_tokens)
        chosen = torch.tensor(indices("rows", rows, len(recording)))
        return score_layers(recording, chosen, wanted[::-1], keep, self.kernel)

    def contribution_map(
        self,
        text: Text | Recording,
        *,
        layer: int,
        head: int | None = None,
        add_special_tokens: bool | None = None,
    ) -> Tensor:
        """[T, T] float32: the importance in each target (row) of the information that a head
        carries there from each source (column); without `head`, of all heads of the layer together.
        """
        layer = index_within("layer", layer, self.decoder.n_layers)
        if head is not None:
            head = index_within("head", head, self.decoder.heads_at(layer))
        recording = self._recorder.record(text, add_special_tokens=add_special_tokens)
        return contribution_map(recording, layer, head, self.kernel)

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
        """The prediction that the model would make if a node were its last: the k likeliest
        tokens, and every token's logit and rank. Final norm and head are the model's own.

        nodes: one `Node` or (layer, kind, position), negative from the end, or several, which give
        a list. An `ffn` node is the FFN's output.
        """
        k = check_count("k", k)
        given, single = listed_nodes(nodes)
        recording = self._recorder.record(text, add_special_tokens=add_special_tokens)
        wanted = [node_within(node, self.decoder.n_layers, len(recording)) for node in given]
        found = lenses(recording, wanted, k, self.tokenizer)
        return found[0] if single else found

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
        k = check_count("k", k)
        chosen = PartChoice.of(self.decoder, layer, head, source, neuron)
        recording = self._recorder.record(text, add_special_tokens=add_special_tokens)
        at = index_within("position", position, len(recording))
        part = chosen.output(recording, at, self.neuron_bases)
        return promoted_tokens(recording, part, chosen, at, k, self.tokenizer)

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
        kind = check_neuron_kind(kind)
        layer = index_within("layer", layer, self.decoder.n_layers)
        recording = self._recorder.record(text, add_special_tokens=add_special_tokens)
        rows = torch.tensor(list(spanned(position, None, len(recording))))
        return neuron_scores(recording, layer, rows, kind, self.neuron_bases, self.kernel)

    @functools.cached_property
    def neuron_bases(self) -> NeuronBases:
        """The neurons of each layer's FFN block, found when they are first used."""
        return NeuronBases(self.decoder)

    def likeliest(self, logits: Tensor) -> list[list[Prediction]]:
        """The tokens that each row of `logits` [R, vocab] makes most probable."""
        return likeliest(logits, self.tokenizer)
