"""Several texts in one forward pass.

Texts are padded on the right, and nothing is masked: in a causal decoder what follows a token
changes nothing of it, so every text's rows are what they would be alone, whatever positions,
windows and biases the model has. What comes padded on either side is cut to its own tokens first.
Each text's Recording is a view of the pass's tensors.

Texts go together that are of like length, and of one rotary regime (where frequencies depend on
the length of the text, the longest would decide for all). Models outside transformers' attention
interface merge heads with the batch, each in its way: theirs are run one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from . import capture
from .capture import AttentionCall, LayerCall, map_tensors
from .errors import IfrError, UnsupportedArchitectureError
from .model import Block, Decoder, evaluating
from .recording import LayerRecording, Recording, RecordingMode

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# Mappings are what tokenizers return.
Batch: TypeAlias = (
    "list[str] | list[list[int]] | list[Tensor] | list[np.ndarray[Any, Any]] "
    "| list[list[dict[str, str]]] | Mapping[str, Any]"
)

_BATCH_TOKENS = 8192  # of one pass, padding included, unless a batch size is given


def is_batch(text: Any) -> TypeIs[Batch]:
    """Whether this is several texts: a list or tuple of strings, of token-id sequences or of
    conversations, or what a tokenizer returns for several texts. A list of ints is one text, and so
    is a list of chat messages.
    """
    if isinstance(text, Mapping):
        return True
    if not isinstance(text, list | tuple) or not text:
        return False
    return all(
        isinstance(item, str | list | tuple)
        or (isinstance(item, Tensor | np.ndarray) and item.ndim > 0)
        for item in text
    )


def as_texts(batch: Batch) -> list[Any]:
    """The single texts of a batch, without padding. Raises ValueError for a mask that is none."""
    if not isinstance(batch, Mapping):
        return list(batch)
    try:
        ids = [torch.as_tensor(row) for row in batch["input_ids"]]
        mask = batch.get("attention_mask")
        masks = [torch.ones_like(x) if mask is None else mask[i] for i, x in enumerate(ids)]
        masks = [torch.as_tensor(x) for x in masks]
    except (LookupError, TypeError, RuntimeError) as error:
        raise ValueError(
            "text: expected several texts' input_ids and attention_mask, as a tokenizer gives them"
        ) from error
    return [_unpadded(x, m) for x, m in zip(ids, masks, strict=True)]


def _unpadded(token_ids: Tensor, mask: Tensor) -> Tensor:
    kept = mask.to(torch.bool).nonzero().flatten()
    if mask.shape != token_ids.shape or mask.ndim != 1 or len(kept) == 0:
        raise ValueError(
            f"text: expected an attention_mask of shape {list(token_ids.shape)} that keeps a token"
        )
    first, last = int(kept[0]), int(kept[-1])
    if last - first + 1 != len(kept):
        raise ValueError("text: its attention_mask hides tokens between others")
    return token_ids[first : last + 1]


def can_batch(decoder: Decoder) -> bool:
    """Whether several texts can go through this model at once."""
    return decoder.attention_through is capture.attention_through


def batches(decoder: Decoder, lengths: list[int], batch_size: int | None) -> Iterator[list[int]]:
    """Which texts of these lengths to run together: indices, longest first, each once."""
    if not can_batch(decoder):
        batch_size = 1
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[int] = []
    for i in order:
        longest = lengths[found[0]] if found else lengths[i]
        limit = batch_size or max(1, _BATCH_TOKENS // longest)
        alike = decoder.rotary_regime(longest) == decoder.rotary_regime(lengths[i])
        if found and (len(found) >= limit or not alike):
            yield found
            found = []
        found.append(i)
    if found:
        yield found


@torch.inference_mode()
def record_together(
    decoder: Decoder,
    texts: list[Tensor],
    tokens: list[list[str]],
    mode: RecordingMode,
    positions: list[int],
) -> list[Recording]:
    """One forward pass over B texts of token ids [T_b], their heads at `positions` alone.

    Raises IfrError where the model's states are not finite.
    """
    lengths = [len(text) for text in texts]
    B, T = len(texts), max(lengths)
    token_ids = torch.stack([torch.cat([x, x[-1:].expand(T - len(x))]) for x in texts])
    of_module = {block.attention: block for block in decoder.blocks}
    calls: dict[int, AttentionCall] = {}
    causal: dict[int, Tensor] = {}  # by mask: layers share few
    attended: dict[int, Tensor] = {}
    layer_calls: dict[int, LayerCall] = {}
    pre: dict[int, Tensor] = {}
    mid: dict[int, Tensor] = {}
    post: list[Tensor] = []

    def answer(call: AttentionCall) -> Tensor:
        block = of_module[call.module]
        window = block.crossed_window(T)
        if id(call.mask) not in causal:
            causal[id(call.mask)] = call.mask.is_causal(T, window)
        z = capture.attend(call, window)
        if block.row_scaled and mode is RecordingMode.FULL:
            attended[block.layer] = z
        calls[block.layer] = call if mode is RecordingMode.FULL else call._replace(q=call.q[:, :0])
        return z

    def watch(block: Block) -> list[torch.utils.hooks.RemovableHandle]:
        def keep_call(hidden: Tensor, call: LayerCall) -> None:
            pre[block.layer], layer_calls[block.layer] = hidden, call

        def keep_mid(x: Tensor) -> None:
            found = x.reshape(B, T, -1)
            found = pre[block.layer] + found if block.parallel else found
            mid[block.layer] = found if mode is RecordingMode.FULL else _checked(found, checked)

        site, on = (
            (block.attention, capture.on_output)
            if block.mid_site is None
            else (block.mid_site, capture.on_input)
        )
        return [capture.on_layer_call(block.module, keep_call), on(site, keep_mid)]

    checked = [
        torch.tensor(sorted({position, n // 2, n - 1}))
        for position, n in zip(positions, lengths, strict=True)
    ]
    handles = [handle for block in decoder.blocks for handle in watch(block)]
    handles.append(capture.on_output(decoder.blocks[-1].module, post.append))
    with (
        evaluating(decoder.model),
        decoder.attention_through(decoder.model, answer),
        capture.hooks(*handles),
    ):
        states = decoder.forward_batch(token_ids)

    final = post[0].reshape(B, T, -1)
    flags = [torch.isfinite(final).all(), *causal.values()]
    finite, *as_opened = torch.stack([flag.to(final.device) for flag in flags]).tolist()
    if not all(as_opened):
        raise UnsupportedArchitectureError(
            f"model: at {T} tokens its attention reads other keys than on the probe it was opened "
            "with: neither all past ones, nor those of one sliding window"
        )
    if not finite:
        raise IfrError(
            f"text: the model's states are not finite in {states.dtype}; try a wider torch_dtype"
        )
    at = torch.tensor(positions, device=states.device)
    logits = decoder.head(states[torch.arange(B, device=states.device), at])

    def one(b: int) -> Recording:
        n = lengths[b]
        layers = []
        for block in decoder.blocks:
            i, call = block.layer, calls[block.layer]
            full = mode is RecordingMode.FULL
            layers.append(
                LayerRecording(
                    resid_pre=pre[i][b, :n],
                    k=call.k[b].transpose(0, 1)[:n],
                    v=call.v[b].transpose(0, 1)[:n],
                    scale=call.scale,
                    window=block.crossed_window(n),
                    softcap=call.softcap,
                    sinks=call.sinks,
                    alibi_slopes=call.alibi_slopes,
                    mask=call.mask,
                    call=of_text(layer_calls[i], b, B),
                    q=call.q[b].transpose(0, 1)[:n] if full else None,
                    resid_mid=mid[i][b, :n] if full else None,
                    z=attended[i][b, :n] if i in attended else None,
                    checked_mid=None if full else mid[i][b, : len(checked[b])],
                )
            )
        return Recording(
            token_ids=texts[b],
            tokens=tokens[b],
            mode=mode,
            layers=layers,
            resid_final=final[b, :n],
            states=states[b, :n],
            position=positions[b],
            logits=logits[b],
            checked_rows=checked[b],
            decoder=decoder,
        )

    return [one(b) for b in range(B)]


def _checked(x: Tensor, rows: list[Tensor]) -> Tensor:
    """[B, C, D] of some rows of each text, as many as the most has."""
    C = max(len(of) for of in rows)
    out = x.new_zeros(len(rows), C, x.shape[-1])
    for b, of in enumerate(rows):
        out[b, : len(of)] = x[b, of.to(x.device)]
    return out


def of_text(call: LayerCall, b: int, B: int) -> LayerCall:
    """A layer's arguments for one of B texts: a batch dimension is the first of two or more."""

    def take(x: Tensor) -> Tensor:
        return x[b : b + 1] if x.ndim >= 2 and x.shape[0] == B else x

    return LayerCall(call.n_rows, map_tensors(call.args, take), map_tensors(call.kwargs, take))
