"""Opens a Hugging Face decoder: its blocks, their effective W_O, and the proof that they close.

Nothing is known per family; everything is found by probing (docs/design.md, section 3.4). For
each layer, on a short probe:

1. its attention module asks the attention function exactly once, and so gives itself away
   (through transformers' interface, or by the products that it computes: own_attention.py);
2. `resid_mid` is the first input of a submodule that follows the residual stream one to one and
   depends on the attention output. There is none, and the layer's output is additive in the
   attention output: a parallel block;
3. W_O is the derivative of that place by the attention output, in forward mode, which is exact;
   taken at 0, where a norm after attention is linear. What such a norm scales a row by, and what
   an output gate multiplies a row's values by, is read off each row, and held fixed;
4. closure: resid_pre + sum of parts + bias gives `resid_mid` back, what is left of `resid_post`
   is a multiple of the output of one submodule (the FFN), and a replay on single rows gives
   what was recorded.

Whatever fails is refused: a wrong graph is worse than none.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from . import capture, own_attention
from .capture import AttentionCall, AttentionHandler, AttentionThrough, LayerCall
from .errors import UnsupportedArchitectureError

_PROBE_LENGTH = 11  # a prime, so that it collides with no other dimension
_PROBE_ROWS = 512  # rows of the identity that pass through a layer at once
_FAR = 1 << 17  # context assumed where a model states none; a wider window counts as none
_SAMPLED = 16  # numbers of each tensor in a fingerprint
HALF = (torch.bfloat16, torch.float16)
TOLERANCE = 1e-4  # relative error that rounding explains in float32


class Block(NamedTuple):
    """One decoder layer and the places of its parts."""

    layer: int
    name: str
    module: nn.Module
    attention: nn.Module
    mid_site: nn.Module | None  # the module whose input is resid_mid; None in a parallel block
    W_O: Tensor  # [H, V, D] effective, in the model's dtype if that holds it; contiguous in V
    bias: Tensor  # [D] the constant that attention adds; it belongs to no part
    window: int | None  # keys visible to a row, itself included
    row_scaled: bool  # a norm after attention scales each row by a number
    gate_site: nn.Module | None  # the module whose input is the attention output times a gate
    kv_heads: int
    d_key: int
    width: int  # numbers per row in the widest tensor that its submodules return
    n_outputs: int | None  # length of the tuple that it returns; None where it returns a tensor
    ffn_site: nn.Module | None  # the module whose output, perhaps scaled, the FFN adds

    @property
    def parallel(self) -> bool:
        """True if attention and FFN both read `resid_pre` and are added at once."""
        return self.mid_site is None

    def crossed_window(self, n_tokens: int) -> int | None:
        """The window if a text of `n_tokens` is longer than it, else None."""
        return None if self.window is None or self.window >= n_tokens else self.window

    def on_mid(self, keep: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
        """Passes `resid_mid` to `keep`; in a parallel block, what attention adds to `resid_pre`."""
        if self.mid_site is not None:
            return capture.on_input(self.mid_site, keep)
        return capture.on_output(self.attention, keep)


class Decoder:
    """A causal language model, opened for recording and replay.

    Raises `UnsupportedArchitectureError` where the decomposition cannot be shown to be right, and
    `ValueError` where the model's weights are not finite.
    """

    def __init__(self, model: nn.Module) -> None:
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
        self.model = model
        decoder = model.get_decoder()
        if decoder is model:  # get_decoder found none by name
            decoder = next((x for x in model.children() if isinstance(x, PreTrainedModel)), model)
        self._states: nn.Module = decoder  # what it returns, the head reads
        takes = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in takes
        self._takes_positions = "position_ids" in takes
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length: int | None = context if isinstance(context, int) else None
        self.steps_checked = False  # that decode steps give what a whole pass does
        self.blocks: list[Block] = []
        # Forward-mode derivatives do not exist in inference mode.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            capture.exclusively(model),
            evaluating(model),
        ):
            if given is not model:
                _check_wrapper(given, self)
            self.attention_through, self.blocks = _open_blocks(self)
        self.n_layers = len(self.blocks)
        self.n_heads, self.d_head, self.d_model = self.blocks[0].W_O.shape

    @property
    def device(self) -> torch.device:
        """Where token ids go, and scores come from."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        if device.type != "meta":
            return device
        # Offloaded weights are brought to where they are used, and so is what reads them.
        return self.blocks[0].W_O.device if self.blocks else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        return self.blocks[0].bias.dtype

    def rotary_regime(self, n_tokens: int) -> list[int]:
        """What the rotary frequencies depend on besides a position: the keys of two texts that
        begin alike are the same only where this is the same for their lengths.
        """
        config = self.model.config.get_text_config()
        parameters = getattr(config, "rope_parameters", None) or {}
        of_each = list(parameters.values())
        if not all(isinstance(of, dict) for of in of_each):
            of_each = [parameters]
        regime = []
        for of in of_each:
            kind = of.get("rope_type")
            original = of.get("original_max_position_embeddings") or self.max_length or n_tokens
            if kind == "longrope":  # one set of frequencies for short texts, another for long ones
                regime.append(int(n_tokens > original))
            elif kind == "dynamic":  # stretched to the text
                regime.append(max(n_tokens, original))
        return regime

    @torch.inference_mode()
    def fingerprint(self) -> str:
        """What tells this model from others: its architecture, and a sample of its weights."""
        config = self.model.config.to_diff_dict()
        for name in ("_name_or_path", "transformers_version"):
            config.pop(name, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())

        def sample(x: Tensor) -> None:
            flat = x.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
            digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())

        for name, parameter in self.model.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            if _is_plain(parameter) and not parameter.is_meta:
                sample(parameter)
        for block in self.blocks:  # of weights that are offloaded or quantized too
            sample(block.W_O.transpose(1, 2))
        return digest.hexdigest()

    def forward(self, token_ids: Tensor, position: int = -1) -> tuple[Tensor, Tensor]:
        """Runs the model on `token_ids` [T].

        Returns the states that its head reads, [T, D], and what the head makes of those at
        `position`: logits [vocab].
        """
        states: list[Tensor] = []
        ids = token_ids.to(self.device)[None]
        position %= len(token_ids)
        kept = torch.tensor([position], device=ids.device)
        with capture.hooks(capture.on_output(self._states, states.append)):
            output = self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                **({"logits_to_keep": kept} if self._keeps_logits else {}),
            )
        if len(states) != 1 or states[0].shape[:2] != (1, len(token_ids)):
            raise UnsupportedArchitectureError(
                f"model: {type(self.model).__name__} has no decoder that its head reads from once"
            )
        return states[0][0], output.logits[0, 0 if self._keeps_logits else position]

    def forward_batch(self, token_ids: Tensor) -> Tensor:
        """Runs the model on `token_ids` [B, T]; returns the states that its head reads, [B, T, D].

        No row is masked: padding belongs behind the texts.
        """
        states: list[Tensor] = []
        ids = token_ids.to(self.device)
        with capture.hooks(capture.on_output(self._states, states.append)):
            self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                **({"logits_to_keep": 1} if self._keeps_logits else {}),
            )
        return states[0]

    def step(self, token_id: int, position: int) -> tuple[Tensor, Tensor]:
        """Runs the model on one token of a text, at `position`. Its attention is to be answered by
        a handler that knows the keys and values of those before.

        Returns as `forward` does: states [1, D] and logits [vocab].
        """
        states: list[Tensor] = []
        ids = torch.tensor([[token_id]], device=self.device)
        placed = {"position_ids": torch.full_like(ids, position)} if self._takes_positions else {}
        with capture.hooks(capture.on_output(self._states, states.append)):
            output = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **placed
            )
        return states[0][0], output.logits[0, -1]

    def on_states(self, keep: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
        """Hands `keep` the states [B, T, D] that the head reads, of each run."""
        return capture.on_output(self._states, keep)

    @torch.inference_mode()
    def head(self, states: Tensor) -> Tensor:
        """Logits [R, vocab] of any of the states that `forward` returned, [R, D].

        The head may be more than a matrix (soft-caps, scales), so the model itself applies it: in
        a run of one token whose final states are exchanged for the given ones.
        """

        def exchange(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (states[None], *output[1:])
            return type(output)(last_hidden_state=states[None])

        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with (
            capture.exclusively(self.model),
            evaluating(self.model),
            capture.hooks(self._states.register_forward_hook(exchange)),
        ):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0]


@contextmanager
def answering_layers(
    decoder: Decoder, answer: Callable[[Block, Tensor, LayerCall], Tensor]
) -> Iterator[None]:
    """Inside the context, `answer` runs in place of each layer: it maps the layer's input
    [1, T, D] and other arguments to its output [1, T, D].
    """

    def replace(block: Block) -> None:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = LayerCall.of(args, kwargs)
            hidden = answer(block, *call)
            return (
                hidden if block.n_outputs is None else (hidden,) + (None,) * (block.n_outputs - 1)
            )

        block.module.forward = forward

    own = [block.module.__dict__.get("forward") for block in decoder.blocks]
    try:
        for block in decoder.blocks:
            replace(block)
        yield
    finally:
        for block, forward in zip(decoder.blocks, own, strict=True):
            block.module.__dict__.pop("forward", None)
            if forward is not None:  # offloading had replaced it before
                block.module.__dict__["forward"] = forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the context, the model is in eval mode; each module's flag is restored after."""
    with all_evaluating(model.modules()):
        yield


@contextmanager
def all_evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the context, each of `modules` is in eval mode; its flag is restored after."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _unwrapped(model: Any) -> nn.Module:
    """The model inside a wrapper of PEFT or torch.compile; adapters are among its modules."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _check_wrapper(wrapper: nn.Module, decoder: Decoder) -> None:
    """Refuses a wrapper that does more than its model alone, as soft prompts do."""
    token_ids = probe_tokens(decoder)
    with evaluating(wrapper):
        whole = wrapper(input_ids=token_ids.to(decoder.device)[None], use_cache=False).logits[0]
    _, logits = decoder.forward(token_ids)
    if len(whole) != len(token_ids) or relative_error(whole[-1], logits) > rounding_tolerance(
        logits.dtype
    ):
        raise UnsupportedArchitectureError(
            f"model: {type(wrapper).__name__} does more than the model that it wraps, by a soft "
            "prompt perhaps; only the wrapped model can be explained"
        )


def probe_tokens(decoder: Decoder) -> Tensor:
    """A short text of random tokens [T]."""
    n_tokens = min(_PROBE_LENGTH, decoder.max_length or _PROBE_LENGTH)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(decoder.vocab_size, (n_tokens,), generator=generator)


class _Probe(NamedTuple):
    """One layer's inputs and outputs on the probe; [T, ...] on the layer's device."""

    name: str
    module: nn.Module
    attention: nn.Module
    call: AttentionCall
    z: Tensor  # [T, H, V]
    layer_call: LayerCall
    resid_pre: Tensor  # [T, D]
    resid_post: Tensor  # [T, D]
    n_outputs: int | None  # length of the tuple that the layer returns, if it returns one

    def rerun_in_float32(self) -> _Probe:
        """The probe with the layer run in float32 on the same stream and attention output.

        The caller makes the layer compute in float32. Raises UnsupportedArchitectureError if its
        output differs.
        """
        layer_call, z, hidden = self.layer_call.float(), self.z.float(), self.resid_pre.float()
        with capture.answering(lambda _: z[None]):
            output = layer_call(self.module, hidden[None])[0]
        error = _error_of_runs(output, self.resid_post)
        if error > rounding_tolerance(self.resid_post.dtype):
            _refuse(self, f"in float32 it gives another output (relative error {error:.1e})")
        return self._replace(z=z, layer_call=layer_call, resid_pre=hidden, resid_post=output)


class _Upcast(TorchFunctionMode):
    """Inside the context, every operation but moves reads half-precision tensors as float32."""

    _MOVES = frozenset({"__get__", "__set__", "to", "detach", "clone", "requires_grad_"})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def upcast(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dtype not in HALF:
                return x
            return x.float() if _is_plain(x) else x.dequantize().float()

        if func.__name__ in self._MOVES:
            return func(*args, **(kwargs or {}))
        return func(*map(upcast, args), **{key: upcast(x) for key, x in (kwargs or {}).items()})


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter)


@contextmanager
def in_float32(layer: nn.Module) -> Iterator[None]:
    """Inside the context, a half-precision layer computes in float32: rounding would hide the
    errors that the closure check looks for.
    """
    tensors = [x for x in (*layer.parameters(), *layer.buffers()) if x.dtype in HALF]
    # Offloaded weights are loaded when they are used; quantized ones cannot be cast.
    if any(x.is_meta or not _is_plain(x) for x in tensors):
        with _Upcast():
            yield
        return
    held = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in held:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


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
        window = call.mask.window(n_tokens)
        if not call.mask.is_causal(n_tokens, window):
            raise UnsupportedArchitectureError(
                f"model: {type(call.module).__name__} reads keys other than all past ones or "
                "those of one sliding window"
            )
        z = capture.attend(call, window)
        calls.append((call, z))
        return z

    attention_through: AttentionThrough
    for attention_through in (capture.attention_through, own_attention.attention_through):
        if attention_through is not capture.attention_through or capture.uses_interface(model):
            with attention_through(model, watch):
                decoder.forward(token_ids)
        if calls:
            break
    else:
        raise UnsupportedArchitectureError(
            f"model: {type(model).__name__} computes no softmax attention that could be seen, "
            "neither through transformers' attention interface nor as softmax(q k^T) v"
        )
    attentions = [call.module for call, _ in calls]
    layers = _layers(model, attentions)

    streams: dict[int, Tensor] = {}
    attended: dict[int, Tensor] = {}
    handles = []
    for i, ((_, layer), attention) in enumerate(zip(layers, attentions, strict=True)):
        handles.append(capture.on_layer_call(layer, lambda x, _, i=i: streams.update({i: x})))  # type: ignore[misc]
        handles.append(
            capture.on_output(attention, lambda x, i=i: attended.update({i: x.clone()}))  # type: ignore[misc]
        )
    with capture.hooks(*handles):
        plain, logits = decoder.forward(token_ids)
    _check_finite(model, [plain, logits, *(x for c, z in calls for x in (c.q, c.k, c.v, z))])

    calls.clear()
    seen: dict[int, dict[str, Any]] = {i: {} for i in range(len(layers))}
    handles = []
    for i, (_, layer) in enumerate(layers):
        handles.append(
            capture.on_layer_call(layer, lambda x, c, i=i: seen[i].update(pre=x, call=c))  # type: ignore[misc]
        )
        handles.append(capture.on_output(layer, lambda x, i=i: seen[i].update(post=x[0])))  # type: ignore[misc]
        handles.append(layer.register_forward_hook(lambda _, __, x, i=i: seen[i].update(raw=x)))
    with attention_through(model, watch), capture.hooks(*handles):
        watched, _ = decoder.forward(token_ids)
    error = _error_of_runs(watched, plain)
    if error > rounding_tolerance(plain.dtype):
        raise UnsupportedArchitectureError(
            f"model: {type(model).__name__} gives other states when its attention is watched "
            f"(relative error {error:.1e})"
        )
    blocks = []
    with attention_through(model, watch):
        for i, ((name, layer), (call, z)) in enumerate(zip(layers, calls, strict=True)):
            pre = seen[i]["pre"]
            if pre.shape[:-1] != (1, n_tokens):
                raise UnsupportedArchitectureError(
                    f"model: layer {name} is not supported: it is called with states of shape "
                    f"{tuple(pre.shape)}, which is not a residual stream of {n_tokens} tokens"
                )
            probe = _Probe(
                name,
                layer,
                call.module,
                call,
                z[0],
                seen[i]["call"],
                pre[0],
                seen[i]["post"],
                len(seen[i]["raw"]) if isinstance(seen[i]["raw"], tuple) else None,
            )
            if plain.dtype in HALF:
                _check_attention(probe, streams[i][0], attended[i])
            blocks.append(_open_block(i, probe, decoder.max_length or _FAR))
    heads = [block.W_O.shape[0] for block in blocks]
    if len(set(heads)) > 1:
        raise UnsupportedArchitectureError(
            f"model: its layers have different numbers of heads: {', '.join(map(str, heads))}"
        )
    return attention_through, blocks


def _check_attention(probe: _Probe, stream: Tensor, attended: Tensor) -> None:
    """Refuses a layer whose attention module, with its attention overridden, gives other rows than
    the plain forward pass gave, `attended`, for the same residual stream [T, D]. The final states
    cannot show this in half precision, where rows that chose other experts differ anyway.
    """
    T = len(stream)
    found = _stopped(
        probe.module,
        probe.layer_call,
        stream,
        lambda call: capture.attend(call, call.mask.window(T)),
        lambda stop: capture.on_output(probe.attention, stop),
    )
    error = relative_error(found.view(T, -1), attended.view(T, -1))
    if error > rounding_tolerance(found.dtype):
        _refuse(
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


def _layers(model: PreTrainedModel, attentions: list[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The decoder layer of each attention module: its ancestor in the ModuleList of layers."""
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
    if [layer for _, layer in layers] != stack:
        seen = {layer for _, layer in layers}
        unseen = [f"{names[layer]} ({_described(layer)})" for layer in stack if layer not in seen]
        raise UnsupportedArchitectureError(
            f"model: of {len(stack)} layers, {len(layers)} calls of softmax attention were seen; "
            "every layer must make exactly one"
            + (f"; none came from {unseen[0]}, whose sources are not known" if unseen else "")
        )
    return layers


def _described(layer: nn.Module) -> str:
    return ", ".join(type(child).__name__ for child in layer.children())


class _Run(NamedTuple):
    """One run of a layer on the probe with its attention output overridden."""

    output: Tensor  # [T, D]
    attention_output: Tensor  # [T, D]
    inputs: list[tuple[nn.Module, Tensor]]  # inputs [T, D] of submodules called after attention
    outputs: list[tuple[nn.Module, Tensor]]  # outputs [T, D] of submodules outside attention
    emits_output: bool  # a submodule's output *is* the layer's
    width: int  # numbers per row in the widest tensor that a submodule returns


def _run(probe: _Probe, hidden: Tensor, z: Tensor) -> _Run:
    """Replays the probe's layer on `hidden` [T, D] with attention output `z` [T, H, V]."""
    inputs: list[tuple[nn.Module, Tensor]] = []
    outputs: list[tuple[nn.Module, Tensor]] = []
    attention_output: list[Tensor] = []
    inside = set(probe.attention.modules())
    attended = False

    def answer(_: AttentionCall) -> Tensor:
        nonlocal attended
        attended = True
        return z[None]

    def is_stream(x: Tensor) -> bool:  # some layers merge rows with the batch
        return x.shape[-1] == hidden.shape[-1] and x.numel() == hidden.numel()

    def on_input(module: nn.Module, x: Tensor) -> None:
        if attended and is_stream(x):
            inputs.append((module, x.reshape(hidden.shape).clone()))

    raw: list[Tensor] = []

    def on_output(module: nn.Module, x: Tensor) -> None:
        raw.append(x)
        if is_stream(x):
            outputs.append((module, x.reshape(hidden.shape).clone()))

    handles = [capture.on_output(probe.attention, attention_output.append)]
    for module in probe.module.modules():
        if module is not probe.module and module not in inside:
            handles.append(capture.on_input(module, lambda x, m=module: on_input(m, x)))  # type: ignore[misc]
            handles.append(capture.on_output(module, lambda x, m=module: on_output(m, x)))  # type: ignore[misc]
    with capture.answering(answer), capture.hooks(*handles):
        output = probe.layer_call(probe.module, hidden[None])
    emits = any(x.data_ptr() == output.data_ptr() and x.shape == output.shape for x in raw)
    width = max((x.numel() for x in raw), default=hidden.numel()) // len(hidden)
    return _Run(output[0], attention_output[0][0], inputs, outputs, emits, width)


class _Parts(NamedTuple):
    """The parts by which a layer computes resid_mid from resid_pre and its attention output."""

    mid_site: nn.Module | None
    resid_mid: Tensor  # [T, D] on the probe
    bias: Tensor  # [D]
    W_O: Tensor  # [H, V, D]
    row_scaled: bool = False
    gate_site: nn.Module | None = None
    width: int = 0
    ffn_site: nn.Module | None = None


def _open_block(index: int, probe: _Probe, n_far: int) -> Block:
    dtype = probe.resid_pre.dtype
    with in_float32(probe.module):
        parts = _decompose(index, probe.rerun_in_float32() if dtype in HALF else probe)
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
        parts.ffn_site,
    )
    _check_rows(probe, block, parts.resid_mid)
    return block


def _decompose(index: int, probe: _Probe) -> _Parts:
    """Finds the parts of a layer, and checks that they add up to its output."""
    x, z = probe.resid_pre, probe.z
    generator = torch.Generator().manual_seed(index)
    # The step is relative: a unit step vanishes in a stream whose norm is in the thousands.
    d = x * torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    zero = _run(probe, x, torch.zeros_like(z))
    moved = _run(probe, x + d, torch.zeros_like(z))
    whole = _run(probe, x, z)

    mid_site, resid_mid = None, None
    for (module, at_zero), (_, at_moved), (_, at_whole) in zip(
        zero.inputs, moved.inputs, whole.inputs, strict=True
    ):
        follows = relative_error(at_moved - at_zero, (x + d) - x, x) < TOLERANCE
        if follows and not torch.equal(at_whole, at_zero):
            mid_site, resid_mid = module, at_whole
            bias = at_zero - x
            break
    else:
        half = _run(probe, x, z / 2)
        step = whole.output - zero.output
        additive = relative_error((half.output - zero.output) * 2, step, whole.output) < TOLERANCE
        if torch.equal(whole.output, zero.output) or not additive:
            _refuse(probe, "no place was found where its residual stream and attention meet")
        bias = zero.attention_output
        if not torch.equal(bias, moved.attention_output):
            _refuse(probe, "its attention module adds more than its heads' outputs")
    middle = bias.median(0).values
    if relative_error(bias - middle, torch.zeros_like(bias), x) > 0:
        _refuse(probe, "what it adds besides its heads' outputs is not a constant bias")

    if resid_mid is None:
        attended, beside = whole.attention_output, whole.output
        resid_mid = x + attended
    else:
        attended, beside = resid_mid - x, resid_mid
    parts = _close(probe, _Parts(mid_site, resid_mid, middle, z), attended, beside)
    ffn_site = _ffn_site(probe, whole, resid_mid)

    error = relative_error(whole.output, probe.resid_post)
    if error > rounding_tolerance(probe.resid_post.dtype):
        _refuse(probe, f"a replay does not give its output back (relative error {error:.1e})")
    rows = _probe_rows(len(x))
    with capture.answering(lambda _: z[rows][None]):
        alone = probe.layer_call.at(rows)(probe.module, x[rows][None])[0]
    error = relative_error(alone, whole.output[rows])
    if error > rounding_tolerance(probe.resid_post.dtype):
        _refuse(
            probe,
            "something in it beside attention reads other positions "
            f"(relative error {error:.1e} of rows on their own)",
        )
    return parts._replace(width=whole.width, ffn_site=ffn_site)


def _close(probe: _Probe, parts: _Parts, attended: Tensor, beside: Tensor) -> _Parts:
    """`parts` with a map W_O by which they add up to what attention added, `attended` [T, D].

    The map is one for all rows, one scaled by a number for each row, or one behind a gate in value
    space.
    """

    def gate_sites() -> Iterator[nn.Module | None]:
        yield None
        site = _gate_site(probe)
        if site is not None:
            yield site

    errors = []
    for gate_site in gate_sites():
        W_O = _probe_output_map(probe, parts.mid_site, gate_site)
        z = probe.z
        if gate_site is not None:
            z = z * _gate_rows(probe.module, gate_site, probe.layer_call, probe.resid_pre, z.shape)
        moved = torch.einsum("thv,hvd->td", z, W_O)
        errors.append(relative_error(moved + parts.bias, attended, beside))
        if errors[-1] <= TOLERANCE:
            return parts._replace(W_O=W_O, gate_site=gate_site)
        scale = fit_rows(moved, attended - parts.bias)
        errors.append(relative_error(scale[:, None] * moved + parts.bias, attended, beside))
        # A scale that is the same for all rows shows a wrong W_O, not a norm.
        varies = bool(scale.max() - scale.min() > TOLERANCE * scale.abs().max())
        if errors[-1] <= TOLERANCE and varies:
            # At 0 a norm multiplies by 1 / sqrt(eps), so W_O is scaled to the actual rows.
            W_O = W_O * scale.median()
            return parts._replace(W_O=W_O, row_scaled=True, gate_site=gate_site)
    total = "attention output" if parts.mid_site is None else "resid_mid"
    return _refuse(probe, f"its parts do not add up to {total} (relative error {min(errors):.1e})")


def fit_rows(moved: Tensor, added: Tensor) -> Tensor:
    """The factor [R] for each row that brings `moved` [R, D] nearest to `added` [R, D]."""
    return (moved * added).sum(-1) / moved.square().sum(-1).clamp(min=torch.finfo(moved.dtype).tiny)


def _probe_output_map(
    probe: _Probe, mid_site: nn.Module | None, gate_site: nn.Module | None = None
) -> Tensor:
    """W_O [H, V, D]: the derivative of `resid_mid` (in a parallel block, of the layer's output) by
    the attention output of the last row, or by the gated one; taken at 0, where norms are linear.

    Forward mode is used because in half precision the difference of two runs would be lost in the
    rounding of the residual stream.
    """
    T, H, V = probe.z.shape
    eye = torch.eye(H * V, dtype=probe.z.dtype, device=probe.z.device).view(H * V, H, V)
    rows_of: list[Tensor] = []
    for tangent in eye.split(_PROBE_ROWS):
        rows = torch.full((len(tangent),), T - 1, device=probe.z.device)
        layer_call = probe.layer_call.at(rows)
        hidden = probe.resid_pre[rows][None]
        at_site: list[Tensor] = []

        def stop(x: Tensor, at_site: list[Tensor] = at_site) -> None:
            at_site.append(x)
            raise capture.StopForward

        with forward_ad.dual_level():
            z = torch.zeros_like(tangent)[None]
            handles = []
            if mid_site is not None:
                handles.append(capture.on_input(mid_site, stop))
            if gate_site is None:
                z = forward_ad.make_dual(z, tangent[None].contiguous())
            else:
                behind = forward_ad.make_dual(z.flatten(2), tangent[None].flatten(2))
                handles.append(capture.change_input(gate_site, behind))
            with (
                suppress(capture.StopForward),
                capture.answering(lambda _, z=z: z),  # type: ignore[misc]
                capture.hooks(*handles),
            ):
                try:
                    at_site.append(layer_call(probe.module, hidden))
                except NotImplementedError as error:  # it rounds on the way, for example to int8
                    _refuse(probe, f"what it makes of its attention has no derivative ({error})")
            derivative = forward_ad.unpack_dual(at_site[0]).tangent
        if derivative is None:
            _refuse(probe, "its output does not depend on its attention")
        rows_of.append(derivative.reshape(len(tangent), -1))
    return torch.cat(rows_of).view(H, V, -1).contiguous()


def _gate_site(probe: _Probe) -> nn.Module | None:
    """The first submodule of the attention module that reads its output for all heads at once."""
    found: list[nn.Module] = []
    called = False

    def answer(_: AttentionCall) -> Tensor:
        nonlocal called
        called = True
        return probe.z[None]

    def on_input(module: nn.Module, x: Tensor) -> None:
        if called and x.numel() == probe.z.numel() and x.shape[-1] == probe.z[0].numel():
            found.append(module)

    handles = [
        capture.on_input(module, lambda x, m=module: on_input(m, x))  # type: ignore[misc]
        for module in probe.attention.modules()
        if module is not probe.attention
    ]
    with capture.answering(answer), capture.hooks(*handles):
        probe.layer_call(probe.module, probe.resid_pre[None])
    return found[0] if found else None


def _ffn_site(probe: _Probe, run: _Run, before: Tensor) -> nn.Module | None:
    """The FFN: the submodule whose output the rest of the layer's output is a multiple of.

    If several pass that output on, the last one that is called only once; None if there is none.
    """
    left = run.output - before
    calls = [module for module, _ in run.outputs]
    best = float("inf")
    found: nn.Module | None = None
    for module, x in run.outputs:
        scale = (left * x).sum() / x.square().sum().clamp(min=1e-30)
        error = relative_error(scale * x, left, run.output)
        best = min(best, error)
        adds = bool(scale) or not bool(x.any())  # zero is a multiple of any output
        if error <= TOLERANCE and adds and calls.count(module) == 1:
            found = module
    if best <= TOLERANCE:
        return found
    if run.emits_output:
        _refuse(probe, "its output is the output of a submodule, not of a residual addition")
    return _refuse(probe, f"what its FFN adds is no submodule's output (relative error {best:.1e})")


def _probe_rows(n_tokens: int) -> Tensor:
    """Indices of the probe's rows that are run on their own."""
    return torch.tensor(sorted({n_tokens // 2, n_tokens - 1}))


def _check_rows(probe: _Probe, block: Block, resid_mid: Tensor) -> None:
    """Refuses a layer if a replay of single rows against recorded keys gives other rows."""
    rows, call = _probe_rows(len(probe.resid_pre)), probe.call
    q, mid, _ = replay_rows(block, probe.layer_call, probe.resid_pre, call, rows)
    recorded = call.q[0].transpose(0, 1)[rows]
    for got, expected in ((q.flatten(1), recorded.flatten(1)), (mid, resid_mid[rows])):
        error = relative_error(got, expected)
        if error > rounding_tolerance(probe.resid_pre.dtype):
            _refuse(probe, f"a replay of single rows gives others (relative error {error:.1e})")


def replay_rows(
    block: Block,
    layer_call: LayerCall,
    resid_pre: Tensor,
    recorded: AttentionCall,
    rows: Tensor,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one layer again on some rows alone, its attention reading recorded keys and values.

    resid_pre [T, D]; recorded: a call whose keys, values, mask and slopes are used; rows [R]:
    ascending, on the CPU; window: keys visible to a row. Returns q [R, H, K], `resid_mid` [R, D]
    (in a parallel block: resid_pre plus the attention module's output) and the attention output z
    [R, H, V]. The caller must have overridden the model's attention, by
    `Decoder.attention_through`.
    """
    queries: list[Tensor] = []
    attended: list[Tensor] = []

    def answer(call: AttentionCall) -> Tensor:
        queries.append(call.q)
        past = recorded._replace(q=call.q)
        attended.append(capture.attend_rows(past, call.q, rows, window))
        return attended[0]

    hidden = resid_pre[rows.to(resid_pre.device)].to(block.W_O.device)
    found = _stopped(block.module, layer_call.at(rows), hidden, answer, block.on_mid)
    mid = found.reshape(hidden.shape)
    return (
        queries[0][0].transpose(0, 1),
        hidden + mid if block.parallel else mid,
        attended[0][0],
    )


def row_scales(
    block: Block, resid_pre: Tensor, resid_mid: Tensor, z: Tensor, value_gate: Tensor | None
) -> Tensor:
    """The factors [R] by which a row-scaled block multiplied each row's attention, in float32 or
    wider.

    resid_pre, resid_mid [R, D]; z [R, H, V]: the attention output; value_gate [R, H, V] or None.
    """
    wide = torch.promote_types(block.W_O.dtype, torch.float32)
    gated = z.to(wide) if value_gate is None else z.to(wide) * value_gate
    moved = torch.zeros_like(resid_pre, dtype=wide)
    for of_head, W_O in zip(gated.unbind(1), block.W_O, strict=True):
        moved.addmm_(of_head, W_O.to(wide))
    return fit_rows(moved, resid_mid.to(wide) - resid_pre.to(wide) - block.bias.to(wide))


def gate_rows(block: Block, layer_call: LayerCall, resid_pre: Tensor, rows: Tensor) -> Tensor:
    """The gates [R, H, V] of some rows of a gated block: the input of its gate site when attention
    gives 1. Arguments, and the caller's duty, are those of `replay_rows`.
    """
    assert block.gate_site is not None
    H, V, _ = block.W_O.shape
    hidden = resid_pre[rows.to(resid_pre.device)].to(block.W_O.device)
    shape = torch.Size((len(rows), H, V))
    return _gate_rows(block.module, block.gate_site, layer_call.at(rows), hidden, shape)


def _gate_rows(
    layer: nn.Module, site: nn.Module, layer_call: LayerCall, hidden: Tensor, shape: torch.Size
) -> Tensor:
    ones = hidden.new_ones(1, *shape)
    found = _stopped(
        layer, layer_call, hidden, lambda _: ones, lambda stop: capture.on_input(site, stop)
    )
    return found.reshape(shape)


def _stopped(
    layer: nn.Module,
    layer_call: LayerCall,
    hidden: Tensor,
    answer: AttentionHandler,
    watch: Callable[[Callable[[Tensor], None]], torch.utils.hooks.RemovableHandle],
) -> Tensor:
    """The tensor that `watch` passes on in a run of the layer on `hidden` [R, D], which it ends."""
    found: list[Tensor] = []

    def stop(x: Tensor) -> None:
        found.append(x)
        raise capture.StopForward

    with suppress(capture.StopForward), capture.answering(answer), capture.hooks(watch(stop)):
        layer_call(layer, hidden[None])
    return found[0]


def rounding_tolerance(dtype: torch.dtype) -> float:
    """Relative error that rounding explains between two runs of the same layer."""
    return max(10 * TOLERANCE, 8 * torch.finfo(dtype).eps)


def relative_error(got: Tensor, expected: Tensor, beside: Tensor | None = None) -> float:
    """Largest relative error of a row, |got - expected|_2 / |expected|_2. If `expected` is a
    difference of larger vectors `beside`, their rounding is allowed for.
    """
    return float(_relative_errors(got, expected, beside).max())


def _relative_errors(got: Tensor, expected: Tensor, beside: Tensor | None = None) -> Tensor:
    """The relative error of each row."""
    wide = torch.promote_types(got.dtype, torch.float32)
    got, expected = got.to(wide), expected.to(wide)
    distance = torch.linalg.vector_norm(got - expected, dim=-1)
    norm = torch.linalg.vector_norm(expected, dim=-1)
    if beside is not None:
        granted = 8 * torch.finfo(beside.dtype).eps
        distance = distance - granted * torch.linalg.vector_norm(beside.to(wide), dim=-1)
    return (distance.clamp(min=0) / norm.clamp(min=1e-30)).nan_to_num(nan=float("inf"))


def _error_of_runs(got: Tensor, expected: Tensor) -> float:
    """The difference of two runs [T, D] of a model or layer: the largest relative error of a row;
    in half precision the median, because there rounding can flip a row's choice of experts.
    """
    errors = _relative_errors(got, expected)
    return float(errors.median() if expected.dtype in HALF else errors.max())


def _refuse(probe: _Probe, why: str) -> NoReturn:
    raise UnsupportedArchitectureError(f"model: layer {probe.name} is not supported: {why}")
