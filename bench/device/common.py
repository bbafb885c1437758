"""What the steps of ../device_check.py share: the shapes, the clock, predictions, found lines."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_model.shapes import KERNELS, LLAMA_8B, TARGETS, Model, Target, Work
from gpu_model.triton_work import Asked, Lists, asked, launching, lengths
from gpu_model.triton_work import Launch as Noted

from ifr_fast.kernels.contract import LayerInputs
from ifr_fast.kernels.triton import kernel, launch

KEEP = 0.04
TINY = Model("tiny", 2, 48, 2, 1, 16, 16, 64, 64)


class Check(NamedTuple):
    """The setting of a step."""

    device: torch.device
    model: Model
    target: Target  # whose ceilings predict
    stand_in: bool
    lengths: list[int]  # empty: the step's own
    weights: Path | None
    out: Path
    step: str

    @classmethod
    @contextmanager
    def of(cls, args: argparse.Namespace) -> Iterator[Check]:
        """The setting that the arguments ask for."""
        out = args.out.resolve()
        if args.stand_in:
            from fast_interpreter import patched

            device, name = torch.device("cpu"), "H100"
        else:
            device = torch.device("cuda", 0)
            torch.cuda.set_device(device)
            name, patched = torch.cuda.get_device_name(), nullcontext
        target = next((t for n, t in TARGETS.items() if n in name), TARGETS["H100"])
        model = TINY if args.stand_in else LLAMA_8B
        with patched():
            yield cls(
                device, model, target, args.stand_in, args.lengths or [], args.weights, out,
                args.child,
            )  # fmt: skip

    def found(self, **fields: Any) -> None:
        """Appends a line, in one write."""
        line = json.dumps({"step": self.step, **fields}, default=str)
        with (self.out / "lines.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, job: Callable[[], object], repeat: int = 10) -> float:
        """Median of some runs, after one that is not counted; by events on a GPU."""
        job()
        times = []
        for _ in range(1 if self.stand_in else repeat):
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                job()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                start = time.perf_counter()
                job()
                times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def of_kernels(self, job: Callable[[], object], repeat: int = 10) -> dict[str, float]:
        """Milliseconds of each kernel within a job, all of its launches; medians of some runs.

        The GPU sleeps first, so that launches queue up and the host's own time is not in between.
        """
        runs: list[dict[str, float]] = []
        for i in range(1 + (1 if self.stand_in else repeat)):
            marks: list[tuple[str, Any, Any]] = []
            with mock_around(lambda name, marks=marks: self._marked(name, marks)):  # type: ignore[misc]
                self.synchronize()
                if self.device.type == "cuda":
                    torch.cuda._sleep(100_000_000)  # cycles
                job()
            self.synchronize()
            sums: dict[str, float] = defaultdict(float)
            for name, begin, end in marks:
                took = begin.elapsed_time(end) if hasattr(begin, "elapsed_time") else end - begin
                sums[name] += took
            if i:
                runs.append(sums)
        return {name: statistics.median(r[name] for r in runs) for name in runs[0]}

    @contextmanager
    def _marked(self, name: str, marks: list[tuple[str, Any, Any]]) -> Iterator[None]:
        def now() -> Any:
            if self.device.type != "cuda":
                return 1e3 * time.perf_counter()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        begin = now()
        yield
        marks.append((name, begin, now()))

    def predicted(self, inputs: LayerInputs, keep: float = KEEP) -> Predicted:
        """Scores the inputs once, and predicts each kernel's time from the pairs that it listed."""
        work: dict[str, Work] = defaultdict(Work)
        pending: list[Noted] = []
        totals = {"light": 0.0, "heavy": 0.0}
        seconds: dict[str, float] = defaultdict(float)

        def flush(of: Lists) -> None:
            for one in pending:
                done = as_work(asked(one, of))
                work[one.kernel] = work[one.kernel].plus(done)
                seconds[one.kernel] += done.seconds(self.target, KERNELS)
            totals["light"] += of.light
            totals["heavy"] += of.heavy
            pending.clear()

        def note(one: Noted) -> None:
            pending.append(one)
            if one.kernel == "head_weights_kernel":
                flush(lengths([x for x in pending if len(x.rows)]))

        with launching(inputs, note):
            kernel.score_attention(inputs, keep)
        flush(Lists())
        R = len(inputs.rows)
        of_kernels = {
            name: (1e3 * seconds[name], bound(w, self.target)) for name, w in work.items()
        }
        return Predicted(of_kernels, totals["light"] / R, totals["heavy"] / R)


class Predicted(NamedTuple):
    """Each kernel's expected time for the pairs that it found."""

    kernels: dict[str, tuple[float, str]]  # milliseconds, and what bounds them
    light: float  # pairs a row, all heads
    heavy: float

    @property
    def total(self) -> float:
        """Milliseconds of all kernels."""
        return sum(ms for ms, _ in self.kernels.values())


def as_work(a: Asked) -> Work:
    """A launch's work on the target's units."""
    vector = a.vector + a.masks / 8
    return Work(2 * a.products, vector, a.special, a.read + a.written, a.loaded + a.stored, 1)


def bound(work: Work, target: Target) -> str:
    """What takes longest."""
    ceilings = work.ceilings(target, KERNELS)
    return max(ceilings, key=ceilings.__getitem__)


@contextmanager
def mock_around(around: Callable[[str], Any]) -> Iterator[None]:
    """Within, each launch runs within around(the kernel's name)."""
    launch.around = around
    try:
        yield
    finally:
        launch.around = None


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, new tensors that nothing has written to yet hold NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
