"""Interventions: a model runs with some activations exchanged.

1. `intervening` exchanges a head's output z = α v (before the output projection, [B, T, H, V]) when
   the model calls its attention function, and an FFN's output when its module returns it. Where
   an FFN is a sum of several modules' outputs, the last of them returns what makes the sum right.
   Everything downstream is the model's own computation.
2. `observe` keeps the outputs of one run, to be put into another run: activation patching.
3. `Observed.restart` begins a patched run at layer l and position t. Layers before l do not change,
   and in a causal model neither do positions before t. The rows from t on go through layer l and
   those that follow, where attention reads the unchanged keys and values of the rows before.

Texts of a batch are padded behind their last token. No row of a text reads the padding. Models
outside of transformers' attention interface merge heads with the batch, and build masks of their
own from all rows: their texts run one at a time, restarted at the layer but not at the position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from ..arguments import listed
from ..errors import UnsupportedArchitectureError
from ..model.attention import AttentionCall, attend, attend_rows
from ..model.block import Block
from ..model.decoder import Decoder
from ..model.hooks import LayerCall, change_output, hooked, on_layer_call, on_output
from ..model.interface import overriding
from ..model.modes import evaluating
from ..recording.batches import batches, can_batch
from ..recording.layer_pass import WatchedLayer, WatchedPass, of_texts, pad, window_of
from ..tokens import encode

# (layer, output) -> the output that replaces it. Heads: z [B, T, H, V]; FFNs: [B, T, D].
Edit = Callable[[int, Tensor], Tensor]

_RUN_ROWS = 4096  # rows of a batch of whole texts, padding included
_HEAD_ROWS = 8  # minimum number of rows that the head reads at once
_VARIANTS = 8  # batches are multiples of it: matrix products round left-over rows differently


@contextmanager
def intervening(
    decoder: Decoder, *, heads: Edit | None = None, ffn: Edit | None = None
) -> Iterator[None]:
    """Within, the model runs with the edits made to each layer's head and FFN outputs. All hooks
    are removed afterwards, after errors too.

    heads gets each layer's z [B, T, H, V], and ffn each FFN's output [B, T, D], before what a
    block may scale it by (of a sum: its last summand). Batches of several texts are for models of
    transformers' interface. Raises UnsupportedArchitectureError where `ffn` is given and a block's
    FFN is no sum of modules' outputs.
    """
    of_module = {block.attention: block for block in decoder.blocks}
    shape = torch.Size()  # of the residual stream in the layer that runs

    def keep_shape(x: Tensor, _: LayerCall) -> None:
        nonlocal shape
        shape = x.shape

    def answer(call: AttentionCall) -> Tensor:
        block, T = of_module[call.module], call.q.shape[2]
        z = attend(call, window_of(block, call.mask, T))
        return z if heads is None else heads(block.layer, z).to(z.dtype)

    handles = []
    if ffn is not None:
        for block in decoder.blocks:

            def change(x: Tensor, layer: int = block.layer) -> Tensor:
                changed = ffn(layer, x.view(shape)).to(x.dtype)
                return changed.reshape(x.shape).clone()  # some blocks add to it in place

            handles.append(on_layer_call(block.module, keep_shape))
            handles += _change_ffn(block, change)
    with (
        hooked(*handles),
        evaluating(decoder.model),
        decoder.attention_through(decoder.model, answer),
    ):
        yield


def _change_ffn(block: Block, change: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
    """Hooks by which the FFN of each run of a block has the output that `change` makes of its own,
    in units of the last branch's output.
    """
    if not block.branches:
        raise UnsupportedArchitectureError(
            f"model: layer {block.name} has no submodule whose output is its FFN's alone, so that "
            "nothing can be put in its place"
        )
    *first, last = block.branches
    earlier: list[Tensor] = []

    def keep(x: Tensor, factor: float) -> None:
        earlier.append(x * (factor / last.factor))

    def change_last(x: Tensor) -> Tensor:
        if not first:
            return change(x)
        whole = x.clone()
        for y in earlier:
            whole += y.reshape(x.shape)
        earlier.clear()
        return x + (change(whole) - whole)  # rows that do not change keep every bit

    handles = [
        on_output(branch.site, lambda x, factor=branch.factor: keep(x, factor))  # type: ignore[misc]
        for branch in first
    ]
    return [*handles, change_output(last.site, change_last)]


def check_texts(decoder: Decoder, texts: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
    """Token ids [T] of each text. Raises ValueError where there are none, or one has ids that the
    model lacks.
    """
    found = []
    for i, text in enumerate(listed("texts", texts)):
        try:
            ids = encode(text, None, None)
        except ValueError as error:
            raise ValueError(f"texts: text {i}: {str(error).removeprefix('text: ')}") from error
        if int(ids.min()) < 0 or int(ids.max()) >= decoder.vocab_size:
            raise ValueError(f"texts: token ids must be from 0 to {decoder.vocab_size - 1}")
        found.append(ids)
    if not found:
        raise ValueError("texts: is empty; expected at least one")
    return found


def padded(texts: Sequence[Sequence[int] | Tensor]) -> tuple[Tensor, Tensor]:
    """Texts of token ids as [B, T], each filled up with its last token, and their lengths [B]."""
    rows = [torch.as_tensor(text, dtype=torch.int64) for text in texts]
    return pad(rows), torch.tensor([len(row) for row in rows])


@torch.inference_mode()
def run(
    decoder: Decoder,
    texts: Sequence[Sequence[int] | Tensor],
    *,
    heads: Edit | None = None,
    ffn: Edit | None = None,
) -> Tensor:
    """Logits [B, vocab] after the last token of each text, of one pass with the edits made.

    Where the model takes no batches, there must be one text.
    """
    token_ids, lengths = padded(check_texts(decoder, texts))
    _check_batch(decoder, len(token_ids))
    with intervening(decoder, heads=heads, ffn=ffn):
        states = _states(decoder, token_ids)
    return _logits(decoder, states, lengths)


def _states(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """The states [B, T, D] that the head reads, of one pass over token ids [B, T]."""
    if len(token_ids) == 1:
        return decoder.forward(token_ids[0])[0][None]
    return decoder.forward_batch(token_ids)


def _logits(decoder: Decoder, states: Tensor, lengths: Tensor) -> Tensor:
    """Logits [B, vocab] after the last token of texts whose states are [B, T, D]."""
    last = states[torch.arange(len(states)), lengths - 1]
    with decoder.overriding_layers(lambda _, hidden, __: hidden):  # no layer is needed for it
        # Another routine multiplies few rows, and rounds differently from the model's own pass over
        # all rows of a text.
        return decoder.head(last.repeat(-(-_HEAD_ROWS // len(last)), 1))[: len(last)]


def _check_batch(decoder: Decoder, n_texts: int) -> None:
    if n_texts > 1 and not can_batch(decoder):
        raise ValueError(
            f"texts: {type(decoder.model).__name__} takes one text at a time, got {n_texts}"
        )


def text_batches(decoder: Decoder, lengths: Sequence[int]) -> list[list[int]]:
    """Groups texts of these lengths to run together: indices, longest first."""
    return list(batches(decoder, list(lengths), max(1, _RUN_ROWS // max(lengths))))


@dataclass(frozen=True, eq=False)
class Observed:
    """The activations of one pass over B texts that restarting it needs; T positions, padded."""

    decoder: Decoder
    lengths: Tensor  # [B] int64
    resid_pre: list[Tensor]  # [B, T, D] of each layer
    z: list[Tensor]  # [B, T, H, V] output of the heads
    ffn: list[Tensor]  # [B, T, D] output of the FFN's module, or sum in units of its last one
    logits: Tensor  # [B, vocab] after each text's last token
    _keys: list[AttentionCall]  # k, v [B, H_kv, T, *], and how they are attended to
    _calls: list[LayerCall]  # of all texts

    @property
    def n_texts(self) -> int:
        """Texts of the batch."""
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Positions, padding included."""
        return self.z[0].shape[1]

    @torch.inference_mode()
    def restart(
        self,
        layer: int,
        texts: Tensor,
        begin: int,
        end: int,
        *,
        z: Tensor | None = None,
        ffn: Tensor | None = None,
        paired: bool = True,
    ) -> Tensor:
        """Logits [N, vocab] of N variants of texts `texts` [N], in which rows `begin` to `end` of
        `layer` have heads' outputs z [N, R, H, V], or an FFN output ffn [N, R, D], R = end - begin,
        in place of the observed ones.

        paired: each text also runs unchanged in the same batch, and the difference is added to the
        observed logits. A batch of another shape rounds differently from the observed pass (by some
        3e-5 of logits near 20, in float32), and this cancels. Without it, one variant a text is
        saved.

        Positions before `begin`, layers before `layer`, and in this layer positions from `end` on
        keep their values and are not computed again, nor is padding that all of `texts` have. Use
        within `restarting`.
        """
        logits = self.logits[texts].clone()
        felt = self.feels(layer, texts, begin, end)
        if bool(felt.any()):
            of = texts[felt]
            changed = [None if x is None else x[felt] for x in (z, ffn)]
            if not (paired and can_batch(self.decoder)):  # one at a time, shapes are the same
                final = self._final(layer, of, begin, end, *changed)
                logits[felt] = _readout(self.decoder, final)
                return logits
            own, which = of.unique(return_inverse=True)
            beside = torch.cat([own, own[-1:].expand(-(len(of) + len(own)) % _VARIANTS)])
            given = [
                None if x is None else torch.cat([x, seen[layer][beside, begin:end].to(x)])
                for x, seen in zip(changed, (self.z, self.ffn), strict=True)
            ]
            # On CPUs the fused kernel rounds a few rows by the thread that they fall to.
            with sdpa_kernel(SDPBackend.MATH):
                final = self._final(layer, torch.cat([of, beside]), begin, end, *given)
            got, unchanged = _readout(self.decoder, final).split([len(of), len(beside)])
            logits[felt] += got - unchanged[which]
        return logits

    def feels(self, layer: int, texts: Tensor, begin: int, end: int) -> Tensor:
        """True for each of `texts` [N] that can change if rows `begin` to `end` of `layer` do. A
        text that ends before `begin` cannot, and in the last layer only the target row matters.
        """
        targets = self.lengths[texts] - 1
        last_layer = layer + 1 == self.decoder.n_layers
        return (targets >= begin) & ((targets < end) | (not last_layer))

    def _final(
        self, layer: int, texts: Tensor, begin: int, end: int, z: Tensor | None, ffn: Tensor | None
    ) -> Tensor:
        """The last layer's output [N, D] at the variants' targets; arguments as of `restart`."""
        blocks, T = self.decoder.blocks, int(self.lengths[texts].max())
        end = min(end, T)
        first, last = (begin, end) if can_batch(self.decoder) else (0, T)
        patched = slice(begin - first, end - first)
        given = self.z[layer][texts, first:last]
        if z is not None:
            given[:, patched] = z[:, : end - begin]
        handles = []
        if ffn is not None:

            def change(x: Tensor) -> Tensor:
                x = x.clone()
                x.view(len(texts), last - first, -1)[:, patched] = ffn[:, : end - begin]
                return x

            handles += _change_ffn(blocks[layer], change)
        hidden = self.resid_pre[layer][texts, first:last]
        with overriding(lambda _: given), hooked(*handles):
            call = self._call(layer, texts, torch.arange(first, last))
            hidden = call(blocks[layer].module, hidden)
        if layer + 1 < len(blocks):
            if last < T:
                hidden = torch.cat([hidden, self.resid_pre[layer + 1][texts, last:T]], dim=1)
            for block in blocks[layer + 1 :]:
                hidden = self._layer(block, texts, hidden, torch.arange(first, T))
        return hidden[torch.arange(len(texts)), self.lengths[texts] - 1 - first]

    def _layer(self, block: Block, texts: Tensor, hidden: Tensor, rows: Tensor) -> Tensor:
        """One layer on `rows` [R] of N variants, hidden [N, R, D]; the rows before are observed."""
        past, first, T = self._keys[block.layer], int(rows[0]), int(rows[-1]) + 1

        def answer(call: AttentionCall) -> Tensor:
            k, v = call.k, call.v
            if first > 0:
                k = torch.cat([past.k[texts, :, :first], k], dim=2)
                v = torch.cat([past.v[texts, :, :first], v], dim=2)
            whole = past._replace(q=call.q, k=k, v=v)
            window = window_of(block, past.mask, T)
            if first == 0:
                return attend(whole, window)
            return attend_rows(whole, call.q, rows, window)

        with overriding(answer):
            return self._call(block.layer, texts, rows)(block.module, hidden)

    def _call(self, layer: int, texts: Tensor, rows: Tensor) -> LayerCall:
        """The arguments of a layer at some rows of N variants."""
        return of_texts(self._calls[layer].at(rows), texts, self.n_texts)


@contextmanager
def restarting(decoder: Decoder) -> Iterator[None]:
    """Within, `Observed.restart` can be called, and no other thread uses the model."""

    def outside(_: AttentionCall) -> Tensor:
        raise AssertionError("attention was called outside of a layer that runs")

    with evaluating(decoder.model), decoder.attention_through(decoder.model, outside):
        yield


@torch.inference_mode()
def observe(decoder: Decoder, texts: Sequence[Sequence[int] | Tensor]) -> Observed:
    """Runs the model on a batch of texts, padded to the longest, and keeps its activations.

    Where the model takes no batches, there must be one text. Raises UnsupportedArchitectureError
    where layers share keys and values: a run that is restarted would read those of the prompt.
    """
    if decoder.value_layers is not None:
        raise UnsupportedArchitectureError(
            f"model: {type(decoder.model).__name__} shares keys and values between layers, and "
            "its runs cannot be restarted at a layer, as patching does"
        )
    decoder.refuse_recurrences("its runs cannot be restarted at a layer, as patching does")
    token_ids, lengths = padded(check_texts(decoder, texts))
    _check_batch(decoder, len(token_ids))
    layers: list[WatchedLayer] = []
    ffn: list[Tensor] = []

    def attended(layer: WatchedLayer) -> None:
        layer.attention = layer.attention._replace(q=layer.attention.q[:, :, :0])

    def keep_ffn(x: Tensor) -> Tensor:
        if x.shape[:-1].numel() != token_ids.numel():
            return x  # a layer that holds hooks of users is run again on some rows
        ffn.append(x.reshape(*token_ids.shape, -1).clone())  # some blocks add to it in place
        return x

    watched = WatchedPass(
        decoder,
        lengths.tolist(),
        attended=attended,
        left=layers.append,
        mid_rows=torch.arange(0),
    )
    with (
        watched.watching(),
        hooked(*(handle for b in decoder.blocks for handle in _change_ffn(b, keep_ffn))),
    ):
        states = _states(decoder, token_ids)
    logits = _logits(decoder, states, lengths)
    return Observed(
        decoder,
        lengths,
        [layer.resid_pre for layer in layers],
        [layer.z for layer in layers],
        ffn,
        logits,
        [layer.attention for layer in layers],
        [layer.layer_call for layer in layers],
    )


def _readout(decoder: Decoder, resid_final: Tensor) -> Tensor:
    """Logits [N, vocab] that the model itself computes of the last layer's output [N, D]."""
    ids = torch.zeros(len(resid_final), 1, dtype=torch.long, device=decoder.device)
    with decoder.overriding_layers(lambda *_: resid_final[:, None]):
        logits: Tensor = decoder.model(input_ids=ids, use_cache=False).logits
    return logits[:, -1]
