"""The time that recording takes, estimated from one layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.attention import AttentionCall
from ..model.decoder import Decoder
from ..model.interface import overriding
from ..model.masks import causal_mask
from . import prefill


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
    ids = decoder.without_padding(torch.arange(n_rows) % decoder.vocab_size)
    around = prefill.frame(decoder, ids)
    middle = decoder.n_layers // 2
    block, call = decoder.blocks[middle], around.calls[middle]
    calls: list[AttentionCall] = []

    def answer(call: AttentionCall) -> Tensor:
        calls.append(call)
        return call.q.new_zeros(1, n_rows, *block.W_O.shape[:2])

    hidden = around.embeddings[None].to(block.W_O.device)

    def run() -> object:
        with overriding(answer):
            return call(block.module, hidden)

    with decoder.replaying():
        per_row = _best(run) / n_rows
    last = calls[-1]
    k, v = (x.new_zeros(1, x.shape[1], n_keys, x.shape[3]).normal_() for x in (last.k, last.v))
    last = last._replace(k=k, v=v, mask=causal_mask(None, last.q.device))
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
