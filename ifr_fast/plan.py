"""Plans of recording and scoring a text: memory line by line, time, and place of the recording.

The sizes come from the opening probe, or from a model built from its configuration without weights.
Nothing is allocated.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from . import capture, prefill
from .errors import MemoryBudgetError, UnsupportedArchitectureError
from .memory import available_memory, describe_bytes
from .model import Block, Decoder
from .recording import RecordingMode
from .scoring import block_rows

LONG = 2048  # a lean recording of more tokens is made in chunks
_SCORING = 64 << 20  # bytes of a kernel's row blocks, at most
_SCORED = 2048  # bytes of a row's scores: totals of heads, and edges


class Place(StrEnum):
    """The memory that holds a recording."""

    DEVICE = "device"  # beside the model
    HOST = "host"  # host memory, when the model is on another device
    FILE = "file"  # a file mapped into memory


class Room(NamedTuple):
    """Available bytes; None where unknown or unlimited."""

    device: int | None
    host: int | None
    disk: int | None


class LayerSizes(NamedTuple):
    """Numbers per token that are recorded for one layer."""

    k: int
    v: int
    q: int
    z: int  # attention output; 0 unless the block is row-scaled
    heads: int
    sums: int  # log-sum-exps, at most; in float32 or wider


class Sizes(NamedTuple):
    """The properties of a model that decide the size of a recording."""

    layers: tuple[LayerSizes, ...]
    d_model: int
    width: int  # numbers per token in a layer's widest intermediate
    itemsize: int
    weights_bytes: int  # the model's weights
    maps_bytes: int  # effective W_O of all layers
    device: torch.device
    chunkable: bool

    @staticmethod
    def of(decoder: Decoder) -> Sizes:
        """The sizes that the opening probe found."""

        def of_block(block: Block) -> LayerSizes:
            H, V, _ = block.W_O.shape
            z = H * V if block.row_scaled else 0
            H_kv, K = block.kv_heads, block.d_key
            sums = H if capture.may_sum(K, V) else 0
            return LayerSizes(H_kv * K, H_kv * V, H * K, z, H, sums)

        return Sizes(
            tuple(map(of_block, decoder.blocks)),
            decoder.d_model,
            max(block.width for block in decoder.blocks),
            decoder.dtype.itemsize,
            sum(p.nbytes for p in decoder.model.parameters() if not p.is_meta),
            sum(block.W_O.nbytes for block in decoder.blocks),
            decoder.device,
            prefill.is_chunkable(decoder),
        )

    def lean_bytes(self, n_tokens: int) -> int:
        """Bytes of the stream at each layer and after the last, head input, keys and values."""
        streams = (len(self.layers) + 2) * self.d_model
        return n_tokens * self.itemsize * (streams + sum(x.k + x.v for x in self.layers))

    def full_bytes(self, n_tokens: int) -> int:
        """Bytes of `lean_bytes`, q, resid_mid, log-sum-exps, and z in row-scaled blocks."""
        more = sum(self.d_model + x.q + x.z for x in self.layers)
        sums = max(4, self.itemsize) * sum(x.sums for x in self.layers)
        return self.lean_bytes(n_tokens) + n_tokens * (self.itemsize * more + sums)

    def working_bytes(self, n_tokens: int, chunk_rows: int | None) -> int:
        """Bytes of a layer's activations on all rows or on a chunk of rows, at most."""
        rows = n_tokens if chunk_rows is None else min(chunk_rows, n_tokens)
        activations = rows * self.itemsize * (3 * self.width + 6 * self.d_model)
        if chunk_rows is None or self.device.type == "cuda":
            return activations
        return activations + rows * (rows + n_tokens) * self.itemsize  # the last term is a mask

    def scoring_bytes(self, n_tokens: int, mode: RecordingMode) -> int:
        """Bytes for scoring all rows of a layer, at most: the kernel's blocks, its float32 copies,
        and each row's scores. Lean recordings are scored in row blocks.
        """
        rows = n_tokens
        if mode is RecordingMode.LEAN:
            rows = min(rows, block_rows(self.device))
        if self.device.type == "cuda":
            from .kernels.triton import room

            H = max(x.heads for x in self.layers)
            return room.work_bytes(rows, n_tokens, H) + n_tokens * _SCORED
        taken = 0
        if self.itemsize < 4:
            taken = 4 * n_tokens * max(x.k + x.v for x in self.layers)
            taken += 4 * rows * max(2 * self.d_model + x.q for x in self.layers)
        return _SCORING + taken + n_tokens * _SCORED


@dataclass(frozen=True)
class Plan:
    """The memory, in bytes, and the method for recording and scoring a text of `n_tokens`."""

    n_tokens: int
    mode: RecordingMode
    place: Place
    chunk_rows: int | None  # rows recorded at once; None: all, in one pass
    weights_bytes: int
    maps_bytes: int  # effective W_O of the heads, beside the weights
    lean_bytes: int  # residual stream, states that the head reads, keys, values
    full_bytes: int  # lean_bytes, q, resid_mid, log-sum-exp
    kv_bytes: int  # keys and values, in lean and full recordings alike
    working_bytes: int  # activations of the forward pass, at most
    scoring_bytes: int  # work space of the kernels, at most
    available_bytes: int | None  # memory free on the model's device now; None if unknown
    seconds: float | None = None  # time of recording, estimated from a layer; None: not measured

    @property
    def recording_bytes(self) -> int:
        """Bytes of a recording in the chosen mode."""
        return self.full_bytes if self.mode is RecordingMode.FULL else self.lean_bytes

    @property
    def added_bytes(self) -> int:
        """Peak bytes that recording and scoring add on the model's device."""
        recording = self.recording_bytes if self.place is Place.DEVICE else 0
        return recording + max(self.working_bytes, self.scoring_bytes)

    @property
    def total_bytes(self) -> int:
        """Peak bytes on the model's device, the model included."""
        return self.weights_bytes + self.maps_bytes + self.added_bytes

    def lines(self) -> list[tuple[str, int]]:
        """Each use of memory and its bytes; a name says where, if not beside the model."""
        elsewhere = "" if self.place is Place.DEVICE else f", in {_WHERE[self.place]}"
        return [
            ("weights", self.weights_bytes),
            ("output maps of the heads", self.maps_bytes),
            (f"{self.mode.value} recording{elsewhere}", self.recording_bytes),
            ("  of which keys and values", self.kv_bytes),
            ("forward pass, or scoring", max(self.working_bytes, self.scoring_bytes)),
            ("in all" + (", beside that" if elsewhere else ""), self.total_bytes),
        ]

    def __str__(self) -> str:
        lines = [f"{self.n_tokens} tokens, " + ("in one pass" if self.chunk_rows is None else
                 f"{self.chunk_rows} at a time")]  # fmt: skip
        width = max(len(name) for name, _ in self.lines())
        lines += [f"  {name:<{width}}  {describe_bytes(n):>8}" for name, n in self.lines()]
        if self.seconds is not None:
            lines.append(f"  recording takes about {describe_seconds(self.seconds)}")
        return "\n".join(lines)


_WHERE = {Place.HOST: "host memory", Place.FILE: "a file"}


def make_plan(
    sizes: Sizes,
    n_tokens: int,
    room: Room,
    *,
    mode: RecordingMode | None = None,
    place: Place | None = None,
) -> Plan:
    """The first plan that fits: full, lean, lean in host memory, lean in a file.

    `mode` and `place` restrict the choice. Raises MemoryBudgetError if nothing fits; the error
    states the need of the last choice tried.
    """
    if n_tokens < 1:
        raise ValueError(f"n_tokens: expected at least 1, got {n_tokens}")
    rows = prefill.chunk_rows(sizes.device)
    host = room.device if sizes.device.type == "cpu" else room.host
    refused: tuple[str, int, int] | None = None
    for chosen, where in _choices(sizes):
        if (mode is not None and chosen is not mode) or (place is not None and where is not place):
            continue
        chunked = chosen is RecordingMode.LEAN and sizes.chunkable
        chunked &= where is not Place.DEVICE or n_tokens > LONG
        plan = Plan(
            n_tokens=n_tokens,
            mode=chosen,
            place=where,
            chunk_rows=rows if chunked else None,
            weights_bytes=sizes.weights_bytes,
            maps_bytes=sizes.maps_bytes,
            lean_bytes=sizes.lean_bytes(n_tokens),
            full_bytes=sizes.full_bytes(n_tokens),
            kv_bytes=n_tokens * sizes.itemsize * sum(x.k + x.v for x in sizes.layers),
            working_bytes=sizes.working_bytes(n_tokens, rows if chunked else None),
            scoring_bytes=sizes.scoring_bytes(n_tokens, chosen),
            available_bytes=room.device,
        )
        share = 0.8 if chosen is RecordingMode.FULL else 0.9
        needs = [("memory", plan.added_bytes, room.device)]
        if where is Place.HOST:
            needs.append(("host memory", plan.recording_bytes, host))
        if where is Place.FILE:
            needs.append(("disk", plan.recording_bytes, room.disk))
        lacking = [
            (what, needed, there)
            for what, needed, there in needs
            if there is not None and needed > share * there
        ]
        if not lacking:
            return plan
        refused = lacking[0]
    if refused is None:
        raise ValueError(f"mode: a {mode} recording is not made in {place}")
    what, needed, there = refused
    raise MemoryBudgetError(
        f"text: recording {n_tokens} tokens takes {describe_bytes(needed)} of {what} and a "
        f"margin, {describe_bytes(there)} are available"
    )


def _choices(sizes: Sizes) -> Iterable[tuple[RecordingMode, Place]]:
    yield RecordingMode.FULL, Place.DEVICE
    yield RecordingMode.LEAN, Place.DEVICE
    if sizes.chunkable:
        if sizes.device.type != "cpu":
            yield RecordingMode.LEAN, Place.HOST
        yield RecordingMode.LEAN, Place.FILE


def room_now(
    device: torch.device, model_bytes: int, max_memory: int | None, folder: str | None = None
) -> Room:
    """The room available now. max_memory: limit in bytes on the device, of which the model takes
    `model_bytes`; folder: the folder for a recording's file.
    """
    there = available_memory(device)
    if max_memory is not None:
        granted = max(0, max_memory - model_bytes)
        there = granted if there is None else min(there, granted)
    return Room(
        there,
        available_memory(torch.device("cpu")),
        shutil.disk_usage(folder or tempfile.gettempdir()).free,
    )


def describe_seconds(seconds: float) -> str:
    """A duration as text: '0.42 s', '3 min 20 s', '2 h 5 min'."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"


class Speed(NamedTuple):
    """The measured time of one layer on this machine, in seconds."""

    per_row: float  # time per row, without attention
    per_pair: float  # time of attention per pair of a row and a key that it sees, all heads

    def seconds(self, decoder: Decoder, n_tokens: int) -> float:
        """Seconds of a forward pass."""
        total = 0.0
        for block in decoder.blocks:
            W = min(n_tokens, block.window or n_tokens)
            pairs = W * (W + 1) / 2 + (n_tokens - W) * W
            total += self.per_row * n_tokens + self.per_pair * pairs
        return total


@torch.inference_mode()
def measure_speed(decoder: Decoder) -> Speed:
    """Times the middle layer on a few hundred rows: all but attention, then attention alone."""
    n_rows = min(256, decoder.max_length or 256)
    n_keys = 2048
    ids = torch.arange(n_rows) % decoder.vocab_size
    around = prefill.frame(decoder, ids)
    middle = decoder.n_layers // 2
    block, call = decoder.blocks[middle], around.calls[middle]
    calls: list[capture.AttentionCall] = []

    def answer(call: capture.AttentionCall) -> Tensor:
        calls.append(call)
        return call.q.new_zeros(1, n_rows, *block.W_O.shape[:2])

    hidden = around.embeddings[None].to(block.W_O.device)

    def run() -> object:
        with capture.answering(answer):
            return call(block.module, hidden)

    with prefill.attended(decoder):
        per_row = _best(run) / n_rows
    last = calls[-1]
    k, v = (x.new_zeros(1, x.shape[1], n_keys, x.shape[3]).normal_() for x in (last.k, last.v))
    last = last._replace(k=k, v=v, mask=capture.causal_mask(None, last.q.device))
    bands = prefill.Bands(n_rows, n_keys)
    attention = _best(lambda: prefill.attend(last, n_keys - n_rows, None, bands))
    return Speed(per_row, attention / (n_rows * n_keys))


def _best(job: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        start = _now()
        job()
        times.append(_now() - start)
    return min(times[1:])


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _end_at_attention(layer: torch.nn.Module) -> None:
    """Makes a layer return its input after its attention is called: experts need real numbers."""
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, _ = capture.LayerCall.of(args, kwargs)
        with suppress(capture.StopForward):
            own(*args, **kwargs)
        return hidden

    layer.forward = forward


def plan_for(
    config: PreTrainedConfig,
    n_tokens: int,
    *,
    device_memory: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    place: Place | None = None,
) -> Plan:
    """The plan for a model that is not loaded, from its configuration. device_memory: memory of the
    device in bytes; None: unlimited.

    Raises UnsupportedArchitectureError if its attention cannot be seen without weights.
    """
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    layers: list[LayerSizes] = []
    text_config = model.config.get_text_config()
    D = text_config.hidden_size
    maps = 0

    def answer(call: capture.AttentionCall) -> Tensor:
        nonlocal maps
        (_, H, _, K), (_, H_kv, _, V) = call.q.shape, call.v.shape
        sums = H if capture.may_sum(K, V) else 0
        layers.append(LayerSizes(H_kv * K, H_kv * V, H * K, 0, H, sums))
        maps += H * V * D * dtype.itemsize
        raise capture.StopForward

    stacks = [x for x in model.modules() if isinstance(x, torch.nn.ModuleList)]
    stack = next((x for x in stacks if len(x) == text_config.num_hidden_layers), stacks[0])
    for layer in stack:
        _end_at_attention(layer)
    ids = torch.zeros(1, 7, dtype=torch.long, device="meta")
    why = ""
    try:
        if capture.uses_interface(model):
            with torch.inference_mode(), capture.attention_through(model, answer):
                model.get_decoder()(
                    input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
                )
    except (RuntimeError, IndexError, ValueError) as error:
        why = f" ({error})"
    if len(layers) != len(stack):
        raise UnsupportedArchitectureError(
            f"config: the attention of {type(model).__name__} cannot be seen without its weights"
            + why
        )
    widths = [max(x.shape[-2:]) for x in stack.parameters() if x.ndim > 1]
    weights = sum(p.nbytes for p in model.parameters())
    sizes = Sizes(
        tuple(layers),
        D,
        max(widths),
        dtype.itemsize,
        weights,
        maps,
        torch.device(device),
        True,
    )
    there = None if device_memory is None else max(0, device_memory - weights - maps)
    return make_plan(sizes, n_tokens, Room(there, None, None), place=place)
