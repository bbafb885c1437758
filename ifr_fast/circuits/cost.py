"""The cost of routes and of patching: seconds and forward passes, on the same prompts in one run.

Routes are `Tracer.trace` of the prompts as one batch. Patching is at its fastest: it is batched and
begins at the patched layer and, with one position at a time, at the patched position; only heads
are patched, without the runs that make own activations exact. The unit is a prompt's forward pass
in a batch of the same size.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..tracer import Tracer
from .interventions import run, text_batches
from .patching import patch
from .tasks import Task


class Cost(NamedTuple):
    """The cost of one way to find heads."""

    what: str
    prompts: int
    runs: int  # runs of the model, whole or restarted
    passes: float  # their computation, in whole forward passes
    seconds: float
    threads: int

    @property
    def seconds_each(self) -> float:
        """Seconds for each prompt."""
        return self.seconds / self.prompts


# These names are saved in a report's folder.
FORWARD, ROUTES, ROUTES_OF_BOTH = "forward pass", "routes", "routes of prompts and twins"
HEADS, EACH = "patching, heads", "patching, heads at each position"


def measure_cost(
    tracer: Tracer,
    task: Task,
    sample: Task,
    *,
    threshold: float,
    repeat: int = 3,
    checkpoint: str | os.PathLike[str] | None = None,
) -> list[Cost]:
    """Measures FORWARD, ROUTES and ROUTES_OF_BOTH on all of `task` and on `sample`, medians of
    `repeat` runs, and patching (HEADS, EACH) once on the sample.

    checkpoint: a folder that keeps results and seconds of patching, layer by layer.
    """
    decoder, threads = tracer.decoder, torch.get_num_threads()

    def forward(some: Task) -> None:
        for together in text_batches(decoder, [len(text) for text in some.texts]):
            run(decoder, [some.texts[i] for i in together])

    jobs: list[tuple[str, Task, int, Callable[[Task], object]]] = []
    for some in (task, sample):
        jobs.append((FORWARD, some, 1, forward))
        jobs.append((ROUTES, some, 1, lambda s: tracer.trace(s.texts, threshold=threshold)))
        jobs.append(
            (
                ROUTES_OF_BOTH,
                some,
                2,
                lambda s: tracer.trace([*s.texts, *s.twins], threshold=threshold),
            )
        )
    seconds: list[list[float]] = [[] for _ in jobs]
    for i in range(repeat + 1):
        for taken, (_, some, _, job) in zip(seconds, jobs, strict=True):
            begin = time.perf_counter()
            job(some)
            if i > 0:  # the first round warms up
                taken.append(time.perf_counter() - begin)
    found = [
        Cost(what, len(some), n * len(some), n * len(some), statistics.median(taken), threads)
        for (what, some, n, _), taken in zip(jobs, seconds, strict=True)
    ]
    for what, positions in ((HEADS, "all"), (EACH, "each")):
        effects = patch(
            decoder,
            sample,
            positions=positions,  # type: ignore[arg-type]
            ffn=False,
            paired=False,
            checkpoint=None if checkpoint is None else Path(checkpoint) / positions,
        )
        counted = effects.runs, effects.passes, effects.seconds
        found.append(Cost(what, len(sample), *counted, threads))
    return found
