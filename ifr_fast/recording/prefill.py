"""A long text's lean recording is made layer by layer and chunk by chunk, into given tensors.

1. The model is run once with its layers left out. That gives the embeddings, and the arguments that
   each layer would be called with, such as rotary tables of the whole text.
2. Each layer is called on one chunk of rows after another. Its attention puts the chunk's keys and
   values behind those of the chunks before and reads them there: the recording is the cache.
   A layer is done with the whole text before the next begins, so that only its own keys are needed,
   and offloaded weights are fetched once.
3. The model is run on the last layer's output, again without its layers. That gives the states
   that its head reads.

Only the activations of one chunk are held. A row's values are those of a single pass, up to the
order of sums. After an interruption at any step, the next run resumes at the step after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from ..model.attention import AttentionCall, attend_rows, fused
from ..model.block import Block
from ..model.decoder import Decoder
from ..model.hooks import LayerCall, StopForward, hooked
from ..model.interface import attention_through, overriding
from ..model.opening import check_hooks
from ..model.stream import Chain, on_end
from .layer_pass import Masks, not_finite
from .mapped_file import Spec

CHUNK_ROWS = {"cpu": 512}  # rows that a layer is called on at once, by device
_CHUNK_ROWS = 2048


def chunk_rows(device: torch.device) -> int:
    """The number of rows of a chunk on a device."""
    return CHUNK_ROWS.get(device.type, _CHUNK_ROWS)


def is_chunkable(decoder: Decoder) -> bool:
    """True if a text can be recorded in chunks. Attention outside of transformers' interface builds
    masks of its own from all rows, and so may one within it; a layer that shares keys and values
    gets them of all rows; the state of linear attention would have to be carried on.
    """
    shared = decoder.value_layers is not None or decoder.has_recurrences
    return decoder.attention_through is attention_through and not shared and not decoder.makes_masks


class LayerFacts(NamedTuple):
    """The properties of a layer's attention that are the same for all texts."""

    k: Spec  # one row: [H_kv, K]
    v: Spec  # one row: [H_kv, V]
    scale: float
    softcap: float | None
    sinks: Tensor | None


class Frame(NamedTuple):
    """The inputs of all layers, and the shapes of what follows them."""

    embeddings: Tensor  # [T, D] input of the first layer
    calls: list[LayerCall]
    facts: list[LayerFacts]
    states: Spec  # one row of the head's input
    logits: Spec  # one row


@torch.inference_mode()
def frame(decoder: Decoder, token_ids: Tensor) -> Frame:
    """Embeddings of `token_ids` [T] and the arguments of each layer, without running any."""
    calls: list[LayerCall] = []
    embeddings: list[Tensor] = []

    def skip(_: Block, hidden: Tensor, call: LayerCall) -> Tensor:
        calls.append(call)
        if not embeddings:
            embeddings.append(hidden[0])
        if len(calls) == decoder.n_layers:
            raise StopForward
        return hidden

    check_hooks(decoder)
    with decoder.replaying():
        with decoder.overriding_layers(skip), suppress(StopForward):
            decoder.forward(token_ids)
        for layer in set(decoder.value_layers or ()):  # layers that share its keys find some
            with overriding(_stop), suppress(StopForward):
                calls[layer].in_place(decoder.blocks[layer].module, embeddings[0][None])
        facts = [
            _facts(block, call, embeddings[0])
            for block, call in zip(decoder.blocks, calls, strict=True)
        ]
        with decoder.overriding_layers(lambda _, hidden, __: hidden):
            states, logits = decoder.forward(token_ids[:1])
    return Frame(embeddings[0], calls, facts, Spec.of(states[0]), Spec.of(logits))


def _stop(_: AttentionCall) -> NoReturn:
    raise StopForward


def _facts(block: Block, call: LayerCall, hidden: Tensor) -> LayerFacts:
    """Runs the layer's attention on the last row alone."""
    calls: list[AttentionCall] = []

    def stop(call: AttentionCall) -> Tensor:
        calls.append(call)
        raise StopForward

    rows = torch.tensor([call.n_rows - 1])
    with overriding(stop), suppress(StopForward):
        call.at(rows)(block.module, hidden[-1:][None].to(block.W_O.device))
    of = calls[0]
    k, v = (Spec(x.dtype, (x.shape[1], x.shape[3])) for x in (of.k, of.v))
    return LayerFacts(k, v, of.scale, of.softcap, of.sinks)


def specs(surroundings: Frame, n_checked: int) -> dict[str, Spec]:
    """The tensors of a lean recording, by name. n_checked: rows whose resid_mid is kept."""
    hidden = Spec.of(surroundings.embeddings)
    T, D = hidden.shape
    states, logits = surroundings.states, surroundings.logits
    found = {"states": Spec(states.dtype, (T, *states.shape)), "logits": logits}
    found[f"resid.{len(surroundings.calls)}"] = hidden
    for i, facts in enumerate(surroundings.facts):
        found[f"resid.{i}"] = hidden
        found[f"checked_mid.{i}"] = Spec(hidden.dtype, (n_checked, D))
        found[f"k.{i}"] = Spec(facts.k.dtype, (T, *facts.k.shape))
        found[f"v.{i}"] = Spec(facts.v.dtype, (T, *facts.v.shape))
    return found


def n_steps(decoder: Decoder, n_tokens: int, n_rows: int) -> int:
    """The number of steps of `prefill`, in chunks of `n_rows`: each layer's and the head's."""
    return (decoder.n_layers + 1) * -(-n_tokens // n_rows)


def rows_done(
    surroundings: Frame, n_rows: int, done: int, checked_rows: Tensor, position: int
) -> dict[str, int]:
    """The leading rows of each tensor that are final after `done` steps of `prefill`."""
    n_tokens, n_layers = len(surroundings.embeddings), len(surroundings.calls)
    n_chunks = -(-n_tokens // n_rows)
    begun = min(done, 1)
    found = {"token_ids": begun * n_tokens, "checked_rows": begun * len(checked_rows)}
    found["resid.0"] = begun * n_tokens
    for layer in range(n_layers + 1):
        chunks = min(max(done - layer * n_chunks, 0), n_chunks)
        end = min(chunks * n_rows, n_tokens)
        if layer < n_layers:
            found |= {f"resid.{layer + 1}": end, f"k.{layer}": end, f"v.{layer}": end}
            found[f"checked_mid.{layer}"] = int((checked_rows < end).sum())
    (n_logits,) = surroundings.logits.shape
    return found | {"states": end, "logits": n_logits * (end > position)}


@torch.inference_mode()
def prefill(
    decoder: Decoder,
    token_ids: Tensor,
    surroundings: Frame,
    windows: list[int | None],
    tensors: Mapping[str, Tensor],
    *,
    position: int,
    checked_rows: Tensor,
    n_rows: int,
    first_step: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Fills `tensors` (see `specs`) except "resid.0", the embeddings, from step `first_step` on;
    `on_step` is called with the number of steps done.

    Raises IfrError where the model's states are not finite.
    """
    T = len(token_ids)
    chunks = [(begin, min(begin + n_rows, T)) for begin in range(0, T, n_rows)]
    bands = Bands(n_rows, T)
    with decoder.replaying():
        for layer in range(first_step // len(chunks), decoder.n_layers):
            run = _LayerRun(decoder, layer, surroundings, windows[layer], tensors, bands, T)
            for i, (begin, end) in enumerate(chunks):
                step = layer * len(chunks) + i
                if step < first_step:
                    continue
                run(begin, end, checked_rows)
                if on_step is not None:
                    on_step(step + 1)
        final = tensors[f"resid.{decoder.n_layers}"]
        for i, (begin, end) in enumerate(chunks):
            step = decoder.n_layers * len(chunks) + i
            if step < first_step:
                continue
            _read_out(decoder, token_ids, final, tensors, begin, end, position)
            if on_step is not None:
                on_step(step + 1)


class _LayerRun:
    """One layer, called on one chunk after another."""

    def __init__(
        self,
        decoder: Decoder,
        layer: int,
        surroundings: Frame,
        window: int | None,
        tensors: Mapping[str, Tensor],
        bands: Bands,
        n_tokens: int,
    ) -> None:
        self.block = decoder.blocks[layer]
        self.call = surroundings.calls[layer]
        self.window, self.bands = window, bands
        self.pre, self.post = tensors[f"resid.{layer}"], tensors[f"resid.{layer + 1}"]
        self.checked = tensors[f"checked_mid.{layer}"]
        self.kept = tensors[f"k.{layer}"], tensors[f"v.{layer}"]
        self.device = self.block.W_O.device
        # These are the same tensors, or copies on the layer's device while it runs.
        self.past = tuple(x.to(self.device) for x in self.kept)
        self.masks = Masks(n_tokens)

    def __call__(self, begin: int, end: int, checked_rows: Tensor) -> None:
        rows = torch.arange(begin, end)
        hidden = self.pre[begin:end].to(self.device)
        found: list[Tensor] = []

        def answer(call: AttentionCall) -> Tensor:
            # The mask is checked at every row of the text, once a layer.
            if self.masks.see(call.mask, self.window):
                self.masks.check([bool(flag) for flag in self.masks.flags()])
            for kept, past, new in zip(self.kept, self.past, (call.k, call.v), strict=True):
                past[begin:end] = new[0].transpose(0, 1)
                if kept is not past:
                    kept[begin:end] = past[begin:end]
            k, v = (past[:end].transpose(0, 1)[None] for past in self.past)
            return attend(call._replace(k=k, v=v), begin, self.window, self.bands)

        block = self.block
        with overriding(answer), hooked(block.on_mid(found.append)):
            output = self.call.at(rows)(block.module, hidden[None])[0]
        if not bool(torch.isfinite(output).all()):
            raise not_finite(block.layer, output.dtype)
        within = ((checked_rows >= begin) & (checked_rows < end)).nonzero().squeeze(1)
        if len(within):
            at = (checked_rows[within] - begin).to(self.device)
            mid = found[0].reshape(hidden.shape)[at]
            self.checked[within.to(self.checked.device)] = (
                hidden[at] + mid if block.parallel else mid
            ).to(self.checked.device)
        self.post[begin:end] = output.to(self.post.device)


class Bands:
    """Masks that are added to the scores of a chunk. The keys that a row sees depend on their
    distance alone, so that the masks of all chunks are windows of one band.
    """

    def __init__(self, n_rows: int, n_tokens: int) -> None:
        self.n_rows, self.n_tokens = n_rows, n_tokens
        self._bands: dict[tuple[int | None, torch.dtype, torch.device], Tensor] = {}

    def of(self, q: Tensor, window: int | None, n_before: int) -> Tensor:
        """The mask [R, n_before + R] of R rows, with `n_before` keys before the first of them."""
        farthest = self.n_tokens if window is None else window - 1
        key = (window, q.dtype, q.device)
        if key not in self._bands:
            distance = torch.arange(-farthest, self.n_rows, device=q.device)
            distance = distance - torch.arange(self.n_rows, device=q.device)[:, None]
            hidden = distance > 0
            if window is not None:
                hidden |= distance <= -window
            band = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
            self._bands[key] = band.masked_fill_(hidden, float("-inf"))
        R = q.shape[2]
        return self._bands[key][:R, farthest - n_before : farthest + R]


def attend(call: AttentionCall, begin: int, window: int | None, bands: Bands) -> Tensor:
    """The attention output [1, R, H, V] of the rows from `begin` on, over keys up to the last."""
    R, end = call.q.shape[2], call.k.shape[2]
    if not (call.softcap is None and call.sinks is None and call.alibi_slopes is None):
        return attend_rows(call, call.q, torch.arange(begin, end), window)
    n_before = begin if window is None else min(begin, window - 1)
    k, v = (x[:, :, begin - n_before :] for x in (call.k, call.v))
    # A GPU's kernels know the mask of plain causal attention by its shape.
    mask = (
        causal_lower_right(R, n_before + R)
        if window is None and call.q.is_cuda
        else bands.of(call.q, window, n_before)
    )
    return fused(call.q, k, v, call.scale, attn_mask=mask).transpose(1, 2)


def _read_out(
    decoder: Decoder,
    token_ids: Tensor,
    final: Tensor,
    tensors: Mapping[str, Tensor],
    begin: int,
    end: int,
    position: int,
) -> None:
    """Fills in the head's inputs of a chunk, and the logits if `position` is in it."""
    last = decoder.blocks[-1]

    chain = Chain(1)

    def answer(block: Block, hidden: Tensor, _: LayerCall) -> Tensor:
        if block is not last:
            return hidden
        returned = final[begin:end][None].to(last.W_O.device)
        chain.leave(returned)
        return returned

    within = begin <= position < end
    with decoder.overriding_layers(answer), hooked(on_end(decoder, chain)):
        states, logits = decoder.forward(token_ids[begin:end], position - begin if within else -1)
    chain.verify()
    tensors["states"][begin:end] = states.to(final.device)
    if within:
        tensors["logits"].copy_(logits)
