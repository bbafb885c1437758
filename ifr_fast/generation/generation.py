"""Generation, token by token, each with the route graph of the prediction that chose it.

1. Record the prompt's forward pass. Its keys and values begin a store that grows with the text.
2. A new token is run through the model alone, its attention reading the store: a decode step. As
   the pass leaves a layer, the new row of that layer is scored, its keys and values still at
   hand, and what it was scored from is forgotten.
3. The parts of a node (layer, position) never change once it is scored, so a node is scored once
   in a generation. A step's graph is the part of the known nodes that its last-layer node
   reaches. Rows of the prompt that no graph has reached before are scored from the recording.

So a route costs a row of each layer, not a pass. Between two tokens the model is as it was.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from ..characters import append_token
from ..graph.tables import Granularity, GraphHeader, LayerTable, Prediction
from ..recording.recorder import Recorder
from ..recording.recording import Recording
from ..routes.route_graph import RouteGraph, in_order
from ..scoring.closure import check_closed, check_closure, closure_errors
from ..scoring.implementations import Kernel
from ..scoring.layer import score_layer, score_post
from .decoding import Decoding, NewRows
from .nodes import Nodes

_ROOM = 1024  # tokens that a store has room for at first, at most, beyond the prompt


class Generation:
    """A text that grows, and the nodes of it that have been scored."""

    def __init__(
        self,
        recorder: Recorder,
        kernel: Kernel,
        recording: Recording,
        threshold: float,
        granularity: Granularity,
        n_ahead: int,
    ) -> None:
        self._recorder, self._decoder, self._kernel = recorder, recorder.decoder, kernel
        self._room = min(n_ahead, _ROOM)
        self._threshold, self._granularity = threshold, granularity
        self.token_ids = recording.token_ids
        self.tokens = list(recording.tokens)
        self._begin(recording)

    def _begin(self, recording: Recording) -> None:
        decoder = self._decoder
        self._nodes = Nodes(decoder.n_layers, self._threshold, self._granularity)
        self._device = decoder.blocks[-1].W_O.device  # a recording may lie elsewhere
        self._decoding = Decoding(
            decoder, recording.layers, self._room, self._kernel, self._threshold, self._device
        )
        self._recording = dataclasses.replace(recording, layers=[])
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
        append_token(self.tokens, self.token_ids, self._recorder.tokenizer)
        if self._decoder.rotary_regime(position + 1) != self._rotary:
            # Every key would be another in a text of this length.
            self._begin(self._recorder.record(self.token_ids))
            return self.first_logits()
        logits, rows_of_alike = self._decoding.step(token_id, position)
        for rows in rows_of_alike:
            self._keep_rows(rows, position)
        return logits

    def _keep_rows(self, rows: NewRows, position: int) -> None:
        """Makes nodes of the rows that were scored last."""
        numbers, scores = rows.layers, rows.scores
        of_ffn, ffn_residual, ffn_unattributed = scores.ffn, None, None
        errors = closure_errors(rows.y, rows.residual, rows.ffn, rows.bias, scores.linear)
        if rows.post is not None:
            ffn_residual, of_ffn, ffn_unattributed = score_post(rows.post, self._kernel)
            ffn_residual = ffn_residual.float()
            errors = errors if rows.post.error is None else errors.maximum(rows.post.error)
        assert of_ffn is not None
        check_closed(errors, numbers)
        table = LayerTable(
            torch.arange(len(numbers), device=rows.y.device),
            scores.residual.float(),
            of_ffn.float(),
            ffn_residual,
            scores.edges,
            scores.unattributed,
            ffn_unattributed,
        )
        self._nodes.add(table, numbers, [position] * len(numbers))

    @torch.inference_mode()
    def graph(self, predictions: list[Prediction]) -> RouteGraph:
        """The graph of the prediction made at the end of the text so far."""
        decoder, end = self._decoder, len(self.token_ids)
        reached, closures, nodes = {end - 1}, {}, self._nodes
        waiting: dict[int, set[int]] = {}  # positions of lower layers that attention above reads
        found: list[int] = []
        with ExitStack() as stack:
            recording: Recording | None = None
            for layer in reversed(range(decoder.n_layers)):
                at = nodes.at[layer]
                missing = sorted(t for t in reached if t not in at)
                if missing:
                    if recording is None:
                        recording = dataclasses.replace(
                            self._recording, layers=self._decoding.recorded
                        )
                        stack.enter_context(recording.replaying())
                    rows = torch.tensor(missing)
                    scores = score_layer(recording, layer, rows, self._threshold, self._kernel)
                    closures[layer] = scores.closure
                    nodes.add(scores.table(self._device), [layer] * len(missing), missing)
                here = [at[t] for t in reached]
                found += here
                reached = set().union(*[nodes.below[i] for i in here])
                read = decoder.blocks[layer].value_layer
                at_source = waiting.setdefault(layer if read is None else read, set())
                at_source.update(*[nodes.read[i] for i in here])
                reached |= waiting.pop(layer, set())
        if closures:
            check_closure(closures)
        at_all = np.array(found)
        header = GraphHeader(
            tokens=list(self.tokens),
            token_ids=self.token_ids,
            position=end - 1,
            threshold=self._threshold,
            granularity=self._granularity,
            n_heads=decoder.n_heads,
            parallel=[block.parallel for block in decoder.blocks],
            predictions=predictions,
            value_layers=decoder.value_layers,
        )
        return in_order(
            torch.from_numpy(nodes.edges.of(at_all)).T,
            torch.from_numpy(nodes.heads.of(at_all)).T,
            nodes.flags(found),
            header,
        )
