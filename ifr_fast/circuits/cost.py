"""What routes cost beside patching: seconds and forward passes, of the same prompts in one run.

Routes are `Tracer.trace` of the prompts as one batch. Patching is at its fastest: batched, begun at
the patched layer and, one position at a time, at the patched position; heads alone. A prompt's
forward pass, in a batch like theirs, is the unit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from ..tracer import Tracer
from .interventions import run, text_batches
from .patching import patch
from .tasks import Task


class Cost(NamedTuple):
    """Of one way to find heads."""

    what: str
    prompts: int
    runs: int  # of the model, whole or restarted
    passes: float  # what these computed, in whole forward passes
    seconds: float

    @property
    def seconds_each(self) -> float:
        """Seconds a prompt."""
        return self.seconds / self.prompts


FORWARD, ROUTES, ROUTES_OF_BOTH = "forward pass", "routes", "routes of prompts and twins"
HEADS, EACH = "patching, heads", "patching, heads at each position"


def measure_cost(
    tracer: Tracer, task: Task, sample: Task, *, threshold: float, repeat: int = 3
) -> list[Cost]:
    """FORWARD, ROUTES and ROUTES_OF_BOTH of all of `task` and of its `sample` alone, medians of
    `repeat`; patching (HEADS, EACH) of the sample, once.
    """
    decoder = tracer.decoder

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
        Cost(what, len(some), n * len(some), n * len(some), statistics.median(taken))
        for (what, some, n, _), taken in zip(jobs, seconds, strict=True)
    ]
    for what, positions in ((HEADS, "all"), (EACH, "each")):
        begin = time.perf_counter()
        effects = patch(decoder, sample, positions=positions, ffn=False)  # type: ignore[arg-type]
        took = time.perf_counter() - begin
        found.append(Cost(what, len(sample), effects.runs, effects.passes, took))
    return found
