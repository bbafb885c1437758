"""Plan: the memory that recording and scoring a text take, and the choice of mode and place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch

from ..arguments import check_count
from ..errors import IfrError, MemoryBudgetError
from . import prefill
from .memory import available_memory, describe_bytes
from .recording import RecordingMode
from .sizes import Sizes
from .speed import describe_seconds

LONG = 2048  # a lean recording of more tokens is made in chunks


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
    scoring_bytes: int  # work space of the kernels; without `max_memory` they take more where free
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
    n_tokens = check_count("n_tokens", n_tokens)
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
    `model_bytes`; folder: the folder for a recording's file. Raises IfrError if there is none.
    """
    there = available_memory(device)
    if max_memory is not None:
        granted = max(0, max_memory - model_bytes)
        there = granted if there is None else min(there, granted)
    folder = folder or tempfile.gettempdir()
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise IfrError(f"{folder}: cannot be written ({error.strerror})") from error
    return Room(there, available_memory(torch.device("cpu")), free)
