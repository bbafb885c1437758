"""Opens a Hugging Face decoder: its blocks, their effective W_O, and the proof that they close.

Nothing is known per family; everything is found by probing (docs/design.md, section 3.4). For
each layer, on a short probe:

1. The layer's attention module calls the attention function exactly once, and so shows which
   module it is (through transformers' interface, or by the products that it computes:
   own_attention.py).
2. `resid_mid` is the first input of a submodule that follows the residual stream one to one and
   depends on the attention output. Where there is none, and the layer's output is additive in
   the attention output, the block is parallel.
3. W_O is the derivative of that place by the attention output, in forward mode, which is exact.
   It is taken at 0, where a norm after attention is linear. The number by which such a norm
   scales a row, and the gate that multiplies a row's values, are read off each row and held
   fixed.
4. Closure: resid_pre + sum of parts + bias gives `resid_mid` back, `resid_post` is a multiple of
   `resid_mid` plus multiples of the outputs of one to three submodules (the FFN) that read nothing
   but `resid_mid`, and a replay on single rows gives what was recorded.

A model that fails any of these is refused: a wrong graph is worse than none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import IfrError, UnsupportedArchitectureError
from . import own_attention
from .attention import AttentionCall, attend
from .block import HALF, Block, error_of_runs, relative_error, rounding_tolerance
from .decoder import Decoder
from .hooks import (
    hook_keys,
    hooked,
    in_this_thread,
    on_layer_call,
    on_output,
)
from .interface import (
    AttentionThrough,
    attention_through,
    uses_interface,
)
from .modes import evaluating, in_float32
from .probing import Probe, decompose, probe_rows, refuse
from .quantized import check_packed, packed_as_plain
from .reasons import (
    forward_errors_named,
    mixes_nothing,
    why_no_attention,
    why_no_parts,
    why_not_one_each,
    why_other_keys,
)
from .replay import replay_rows, stopped_at
from .stream import StreamOutside, check_embeddings, check_n_keys
from .unmixed import open_unmixed
from .values import check_values, value_layer, value_span

_PROBE_LENGTH = 11  # a prime, so that it collides with no other dimension
_FAR = 1 << 17  # context assumed where a model states none; a wider window counts as none


def open_decoder(model: nn.Module) -> Decoder:
    """Opens a causal language model for recording and replay.

    Raises `UnsupportedArchitectureError` where the decomposition cannot be shown to be right, and
    `ValueError` where the model's weights are not finite.
    """
    given, model = model, _unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model: expected a transformers PreTrainedModel, got {type(model).__name__}"
        )
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise UnsupportedArchitectureError(
            f"model: {type(model).__name__} is not a decoder with a language-model head; "
            "ifr_fast explains causal language models"
        )
    _check_loaded(model)
    decoder = Decoder(model)
    with _probing(model):
        _open(decoder)
        if given is not model:
            _check_wrapper(given, decoder)
    return decoder


def check_hooks(decoder: Decoder) -> None:
    """Opens a model again if hooks were added to it or removed since. Raises
    UnsupportedArchitectureError if that changed what its layers are.
    """
    with evaluating(decoder.model):
        if hook_keys(decoder.model) == decoder.checked_hooks:
            return
        before = decoder.blocks
        try:
            with _probing(decoder.model):
                _open(decoder)
            for old, new in zip(before, decoder.blocks, strict=True):
                if old.facts() != new.facts() or not torch.equal(old.W_O, new.W_O):
                    decoder.checked_hooks = []
                    raise UnsupportedArchitectureError(
                        f"model: hooks that were added after it was opened change layer {old.name};"
                        " open it again with them"
                    )
        finally:  # a refused hook leaves nothing of itself when it is removed
            decoder.blocks = before


@contextmanager
def _probing(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model is held, in eval mode, and derivatives can be taken."""
    # Forward-mode derivatives do not exist in inference mode.
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        yield


def _open(decoder: Decoder) -> None:
    hooks = hook_keys(decoder.model)
    decoder.counted_padding = None
    decoder.attention_through, decoder.blocks = _open_blocks(decoder)
    check_embeddings(decoder)
    check_packed(decoder.model, lambda: decoder.forward(probe_tokens(decoder)))
    decoder.checked_hooks = hooks


def _unwrapped(model: Any) -> nn.Module:
    """The model inside a wrapper of PEFT or torch.compile; adapters are among its modules."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _check_loaded(model: nn.Module) -> None:
    """Refuses a model without weights. Those that accelerate offloads are fetched by its hooks."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise IfrError(
                f"model: parameter {name} is on the meta device, which holds no weights; load the "
                "model with from_pretrained"
            )


def _check_wrapper(wrapper: nn.Module, decoder: Decoder) -> None:
    """Refuses a wrapper that does more than its model alone, as soft prompts do."""
    token_ids = probe_tokens(decoder)
    with evaluating(wrapper):
        whole = wrapper(input_ids=token_ids.to(decoder.device)[None], use_cache=False).logits[0]
    _, logits = decoder.forward(token_ids)
    tolerance = rounding_tolerance(decoder.dtype)
    if len(whole) != len(token_ids) or relative_error(whole[-1], logits) > tolerance:
        raise UnsupportedArchitectureError(
            f"model: {type(wrapper).__name__} does more than the model that it wraps, by a soft "
            "prompt perhaps; only the wrapped model can be explained"
        )


def probe_tokens(decoder: Decoder) -> Tensor:
    """A short text of random tokens [T]."""
    n_tokens = min(_PROBE_LENGTH, decoder.max_length or _PROBE_LENGTH)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(decoder.vocab_size, (n_tokens,), generator=generator)
    return decoder.without_padding(token_ids)


def _open_blocks(decoder: Decoder) -> tuple[AttentionThrough, list[Block]]:
    """The context that overrides the model's attention, and the model's layers."""
    model = decoder.model
    token_ids = probe_tokens(decoder)
    n_tokens = len(token_ids)

    calls: list[tuple[AttentionCall, Tensor]] = []

    def watch(call: AttentionCall) -> Tensor:
        if bool(call.mask.visible(torch.tensor([0]), torch.tensor([1]))):
            raise UnsupportedArchitectureError(
                f"model: {type(call.module).__name__} reads later positions; ifr_fast explains "
                "causal decoders"
            )
        check_n_keys(call, n_tokens)
        decoder.makes_masks |= call.mask.given
        window = call.mask.window(n_tokens)
        if not call.mask.is_causal(n_tokens, window):
            why = why_other_keys(decoder, token_ids, call.module)
            raise UnsupportedArchitectureError(f"model: {type(call.module).__name__} {why}")
        z = attend(call, window)
        calls.append((call, z))
        return z

    through: AttentionThrough
    for through in (attention_through, own_attention.attention_through):
        if through is not attention_through or uses_interface(model):
            with forward_errors_named(decoder, token_ids), through(model, watch):
                decoder.forward(token_ids)
        if calls:
            break
    else:
        why = why_no_attention(decoder, token_ids)
        raise UnsupportedArchitectureError(
            f"model: {type(model).__name__} computes no softmax attention that could be seen: "
            + (why or "neither through transformers' attention interface nor as softmax(q k^T) v")
        )
    layers, attentions = _layers(decoder, token_ids, [call.module for call, _ in calls])

    streams: dict[int, Tensor] = {}
    attended: dict[int, Tensor] = {}
    handles = []
    for i, ((_, layer), attention) in enumerate(zip(layers, attentions, strict=True)):
        handles.append(on_layer_call(layer, lambda x, _, i=i: streams.update({i: x})))  # type: ignore[misc]
        if attention is not None:
            handles.append(
                on_output(attention, lambda x, i=i: attended.update({i: x.clone()}))  # type: ignore[misc]
            )
    outside = StreamOutside(model, layers)
    with hooked(*handles, *outside.handles):
        plain, logits = decoder.forward(token_ids)
    _check_finite(model, [plain, logits, *(x for c, z in calls for x in (c.q, c.k, c.v, z))])

    outside.check()

    calls.clear()
    seen: dict[int, dict[str, Any]] = {i: {} for i in range(len(layers))}
    handles = []
    for i, (_, layer) in enumerate(layers):
        handles.append(
            on_layer_call(layer, lambda x, c, i=i: seen[i].update(pre=x, call=c))  # type: ignore[misc]
        )
        handles.append(on_output(layer, lambda x, i=i: seen[i].update(post=x[0])))  # type: ignore[misc]
        raw = in_this_thread(lambda _, __, x, i=i: seen[i].update(raw=x))
        handles.append(layer.register_forward_hook(raw))
    with through(model, watch), hooked(*handles):
        watched, _ = decoder.forward(token_ids)
    # A head in float32 may read the rounded states of half-precision layers.
    dtype = max((of["pre"].dtype for of in seen.values()), key=lambda x: torch.finfo(x).eps)
    error = error_of_runs(watched.to(dtype), plain.to(dtype))
    if error > rounding_tolerance(dtype):
        raise UnsupportedArchitectureError(
            f"model: {type(model).__name__} gives other states when its attention is watched "
            f"(relative error {error:.1e})"
        )
    blocks = []
    with through(model, watch):
        made = iter(calls)
        for i, ((name, layer), attention) in enumerate(zip(layers, attentions, strict=True)):
            pre = seen[i]["pre"]
            if pre.shape[:-1] != (1, n_tokens):
                raise UnsupportedArchitectureError(
                    f"model: layer {name} is not supported: it is called with states of shape "
                    f"{tuple(pre.shape)}, which is not one residual stream of {n_tokens} tokens"
                )
            raw, layer_call = seen[i]["raw"], seen[i]["call"]
            n_outputs = len(raw) if isinstance(raw, tuple | list) else None
            if attention is None:
                blocks.append(open_unmixed(i, name, layer, layer_call, pre[0], n_outputs))
                continue
            call, z = next(made)
            post = seen[i]["post"]
            # The first pass may have put another module in the place of the one that it called.
            of = call.module
            probe = Probe(name, layer, of, call, z[0], layer_call, pre[0], post, n_outputs)
            if pre.dtype in HALF:
                _check_attention(probe, streams[i][0], attended[i])
            read = None
            if all(of is not None for of in attentions):
                read = value_layer(i, [call for call, _ in calls], probe)
            blocks.append(_open_block(i, probe, decoder.max_length or _FAR, read))
    heads = [block.W_O.shape[0] for block in blocks]
    if len(set(heads)) > 1 and not any(block.recurrence_size for block in blocks):
        raise UnsupportedArchitectureError(
            f"model: its layers have different numbers of heads: {', '.join(map(str, heads))}"
        )
    most = max(heads)
    blocks = [block._replace(model_heads=most) for block in blocks]
    decoder.final_site = outside.reader(plain)
    return through, blocks


def _check_attention(probe: Probe, stream: Tensor, attended: Tensor) -> None:
    """Refuses a layer whose attention module, with its attention overridden, gives other rows than
    the plain forward pass gave, `attended`, for the same residual stream [T, D]. The final states
    cannot show this in half precision, where rows that chose other experts differ anyway.
    """
    T = len(stream)
    found = stopped_at(
        probe.module,
        probe.layer_call,
        stream,
        lambda call: attend(call, call.mask.window(T)),
        lambda stop: on_output(probe.attention, stop),
    )
    error = relative_error(found.view(T, -1), attended.view(T, -1))
    if error > rounding_tolerance(found.dtype):
        refuse(
            probe,
            "its attention module gives another output when its attention is overridden "
            f"(relative error {error:.1e})",
        )


def _check_finite(model: PreTrainedModel, seen: list[Tensor]) -> None:
    if all(bool(torch.isfinite(x).all()) for x in seen):
        return
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            raise ValueError(f"model: parameter {name} holds NaN or infinite values")
    raise ValueError(
        f"model: its states are not finite in {seen[0].dtype}; try a wider torch_dtype"
    )


def _layers(
    decoder: Decoder, token_ids: Tensor, attentions: list[nn.Module]
) -> tuple[list[tuple[str, nn.Module]], list[nn.Module | None]]:
    """The decoder layers, each with the attention module that it is the ancestor of; None where a
    layer mixes no positions.
    """
    model = decoder.model
    names = {module: name for name, module in model.named_modules()}
    layers = []
    for attention in attentions:
        path = names[attention].split(".")
        for depth in range(1, len(path)):
            if isinstance(model.get_submodule(".".join(path[:depth])), nn.ModuleList):
                name = ".".join(path[: depth + 1])
                layers.append((name, model.get_submodule(name)))
                break
        else:
            raise UnsupportedArchitectureError(
                f"model: {names[attention]} is in no list of layers, so its block is not known"
            )
    stack = list(model.get_submodule(layers[0][0].rpartition(".")[0]).children())
    of_layer = {layer: of for (_, layer), of in zip(layers, attentions, strict=True)}
    unmixed = [x for x in stack if x not in of_layer and mixes_nothing(decoder, token_ids, x)]
    if [layer for _, layer in layers] != [layer for layer in stack if layer not in unmixed]:
        raise UnsupportedArchitectureError(
            f"model: {why_not_one_each(decoder, token_ids, attentions, layers, stack)}"
        )
    return [(names[layer], layer) for layer in stack], [of_layer.get(layer) for layer in stack]


def _open_block(index: int, probe: Probe, n_far: int, read: int | None) -> Block:
    """read: the layer whose keys and values it reads; None: its own."""
    dtype = probe.resid_pre.dtype
    with packed_as_plain(probe) as plain, in_float32(probe.module, dtype, plain) as exact:
        narrow_dtype = None if exact else dtype
        wide = probe.rerun_in_float32() if dtype in HALF else probe
        try:
            parts = decompose(index, wide._replace(narrow_dtype=narrow_dtype))
        except UnsupportedArchitectureError:
            why = why_no_parts(wide)
            if why is None:
                raise
            refuse(probe, why)
    narrow = parts.W_O.to(dtype)
    W_O = narrow if torch.equal(narrow.to(parts.W_O.dtype), parts.W_O) else parts.W_O
    block = Block(
        index,
        probe.name,
        probe.module,
        probe.attention,
        parts.mid_site,
        W_O.transpose(1, 2).contiguous().transpose(1, 2),
        parts.bias.to(dtype),
        probe.call.mask.window(n_far),
        parts.row_scaled,
        parts.gate_site,
        probe.call.k.shape[1],
        probe.call.k.shape[-1],
        parts.width,
        probe.n_outputs,
        parts.branches,
        parts.stream_scale,
        read,
        parts.residual,
        parts.head_scaled,
    )
    _check_rows(probe, block, parts.resid_mid)
    made_of = probe.call.recurrence
    if made_of is not None:
        size = sum(x[0, 0].numel() for x in made_of.parts)
        return block._replace(recurrence_size=size, value_span=value_span(probe))
    if read is None:
        check_values(probe)
    return block


def _check_rows(probe: Probe, block: Block, resid_mid: Tensor) -> None:
    """Refuses a layer if a replay of single rows against recorded keys gives other rows."""
    rows, call = probe_rows(len(probe.resid_pre)), probe.call
    q, mid, _ = replay_rows(block, probe.layer_call, probe.resid_pre, call, rows)
    recorded = call.q[0].transpose(0, 1)[rows]
    for got, expected in ((q.flatten(1), recorded.flatten(1)), (mid, resid_mid[rows])):
        error = relative_error(got, expected)
        if error > rounding_tolerance(probe.resid_pre.dtype):
            refuse(probe, f"a replay of single rows gives others (relative error {error:.1e})")
