"""The cost of attribution on this machine, relative to the model's plain forward pass.

The unit is one warm plain forward pass of the same text in the same run: the model's own attention
(sdpa unless it was loaded with another), inference mode, no cache, one position's logits. All jobs
alternate, A B A B, so that a slowdown of the machine affects all of them; the first round is not
counted, and the others give medians.

Scoring is `Tracer.trace_all` of a recording: every layer's importances at every position, with
their checks. A pair is a (row, head, visible key) of a layer; all of them are scored.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ._version import __version__
from .arguments import check_count, check_fraction, holds_integers, shown
from .model.modes import evaluating
from .recording.recording import Recording
from .tracer import Tracer

Result = TypeVar("Result")

THRESHOLD = 0.04  # threshold of every measured trace
TIMED = ("forward", "record", "route", "scoring", "trace", "trace_all")


class Machine(NamedTuple):
    """The machine and software of a measurement."""

    processor: str  # processor of the model's device
    device: str
    threads: int  # torch's number of threads
    cpu_capability: str  # widest instruction set that torch uses
    system: str
    python: str
    torch: str
    transformers: str
    ifr_fast: str


class Subject(NamedTuple):
    """The measured model, and how it is scored."""

    model: str
    dtype: str
    attention: str  # transformers' implementation in the plain forward pass
    impl: str
    layers: int
    heads: int
    d_model: int


class MemoryUse(NamedTuple, Generic[Result]):
    """Memory of a job in bytes: resident memory, or on a GPU the memory of tensors.

    None if the system does not report it.
    """

    result: Result
    added: int | None  # bytes at the peak beyond those before
    held: int | None  # bytes at the end beyond those before, result included
    peak: int | None  # bytes in total; since the process began if it cannot be reset


class Throughput(NamedTuple):
    """The cost of a text of `n_tokens`: medians in seconds, sizes in bytes."""

    n_tokens: int
    pairs: int  # (row, head, visible key), all layers together
    repeat: int  # counted rounds
    threshold: float
    mode: str  # mode of the recording, chosen by `Tracer.plan`
    forward_seconds: float  # a plain forward pass: the unit
    record_seconds: float  # a recorded forward pass
    route_seconds: float  # one route, of the last position, from a recording
    scoring_seconds: float  # the routes of all positions, from a recording
    trace_seconds: float  # one route from token ids, end to end
    trace_all_seconds: float  # the routes of all positions from token ids, end to end
    recording_bytes: int  # size of the recording
    scoring_bytes: int | None  # peak memory of scoring all positions, result included
    peak_bytes: int | None  # peak of all memory during recording and scoring

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, for the routes of all positions, end to end."""
        return self.n_tokens / self.trace_all_seconds

    @property
    def pairs_per_second(self) -> float:
        """Scored pairs per second."""
        return self.pairs / self.scoring_seconds

    @property
    def share_of_forward(self) -> float:
        """Time of scoring all positions, relative to the forward pass."""
        return self.scoring_seconds / self.forward_seconds

    def units(self, name: str) -> float:
        """Time of a job of TIMED, in plain forward passes."""
        return float(getattr(self, f"{name}_seconds") / self.forward_seconds)

    def to_dict(self) -> dict[str, Any]:
        """All fields, `units` by name, and the rates."""
        return {
            **self._asdict(),
            "units": {name: self.units(name) for name in TIMED},
            "tokens_per_second": self.tokens_per_second,
            "pairs_per_second": self.pairs_per_second,
            "share_of_forward": self.share_of_forward,
        }


def measure(
    tracer: Tracer,
    token_ids: Tensor,
    *,
    repeat: int = 5,
    threshold: float = THRESHOLD,
    on_round: Callable[[int], None] | None = None,
) -> Throughput:
    """Times every use of a tracer on a text, token ids [T]. `on_round` gets each round's number.

    Memory is measured in the first recording and the first scoring, before the timing.
    """
    repeat = check_count("repeat", repeat)
    threshold = check_fraction("threshold", threshold)
    if not isinstance(token_ids, Tensor) or token_ids.ndim != 1 or not holds_integers(token_ids):
        raise ValueError(f"token_ids: expected token ids [T], got {shown(token_ids)}")
    device = tracer.decoder.device
    of_recording = memory_use(lambda: tracer.record(token_ids), device)
    recording = of_recording.result

    def score() -> None:  # the result is dropped, so that no memory is held during the timing
        tracer.trace_all(recording, threshold=threshold)

    of_scoring = memory_use(score, device)
    jobs: dict[str, Callable[[], object]] = {
        "forward": plain_forward(tracer.model, token_ids),
        "record": lambda: tracer.record(token_ids),
        "route": lambda: tracer.trace(recording, threshold=threshold),
        "scoring": lambda: tracer.trace_all(recording, threshold=threshold),
        "trace": lambda: tracer.trace(token_ids, threshold=threshold),
        "trace_all": lambda: tracer.trace_all(token_ids, threshold=threshold),
    }
    seconds = in_turn(jobs, repeat, on_round)
    peaks = [peak for peak in (of_recording.peak, of_scoring.peak) if peak is not None]
    return Throughput(
        n_tokens=len(token_ids),
        pairs=n_pairs(recording),
        repeat=repeat,
        threshold=threshold,
        mode=recording.mode.value,
        **{f"{name}_seconds": seconds[name] for name in TIMED},
        recording_bytes=recording.nbytes,
        scoring_bytes=of_scoring.added,
        peak_bytes=max(peaks, default=None),
    )


def plain_forward(model: PreTrainedModel, token_ids: Tensor) -> Callable[[], object]:
    """The unit: a job that runs the model on `token_ids` [T] without a tracer."""
    ids = token_ids[None].to(model.get_input_embeddings().weight.device)
    keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if keeps_logits else {}

    @torch.inference_mode()
    def run() -> object:
        with evaluating(model):
            return model(input_ids=ids, use_cache=False, **options).logits

    return run


def in_turn(
    jobs: Mapping[str, Callable[[], object]],
    repeat: int,
    on_round: Callable[[int], None] | None = None,
    *,
    warm_up: bool = True,
) -> dict[str, float]:
    """Median seconds of each job over `repeat` rounds of all jobs; round 0 is a warm-up.

    A job's time ends when it returns (on a GPU: after a synchronization); freeing its result is
    not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(0 if warm_up else 1, repeat + 1):
        if on_round is not None:
            on_round(i)
        for name, job in jobs.items():
            start = _now()
            result = job()
            elapsed = _now() - start
            del result
            if i:
                seconds[name].append(elapsed)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def n_pairs(recording: Recording) -> int:
    """Pairs of all layers: T (T + 1) / 2 * H * L, fewer with sliding windows."""
    T, n = len(recording), 0
    for layer in recording.layers:
        W = min(T, layer.window or T)
        n += recording.decoder.n_heads * (W * (W + 1) // 2 + (T - W) * W)
    return n


def memory_use(job: Callable[[], Result], device: torch.device) -> MemoryUse[Result]:
    """Runs a job once and measures its memory: allocated on a GPU, else resident (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = job()
        peak = torch.cuda.max_memory_allocated(device)
        return MemoryUse(result, peak - before, torch.cuda.memory_allocated(device) - before, peak)
    _return_free_memory()
    restarted = _restart_peak()
    resident = _process_status("VmRSS")
    result = job()
    at_peak = _process_status("VmHWM")
    if not restarted or resident is None or at_peak is None:
        return MemoryUse(result, None, None, _peak_since_start())
    _return_free_memory()
    after = _process_status("VmRSS")
    assert after is not None
    return MemoryUse(result, max(0, at_peak - resident), max(0, after - resident), at_peak)


def _return_free_memory() -> None:
    """Makes the allocator return free memory: a job could reuse it and seem to need none."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # missing in musl
        if trim is not None:
            trim(0)


def _restart_peak() -> bool:
    """Resets the memory peak of the process, if that is permitted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _process_status(field: str) -> int | None:
    """Field of the process status, in bytes (Linux)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    except OSError:
        pass
    return None


def _peak_since_start() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine(device: torch.device) -> Machine:
    """Machine and software of this process, for a model on `device`."""
    return Machine(
        processor=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        device=str(device),
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        ifr_fast=__version__,
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def subject(tracer: Tracer) -> Subject:
    """Name of a tracer's model, and how it is scored."""
    config = tracer.model.config
    name = str(config.name_or_path) or type(tracer.model).__name__
    return Subject(
        model=Path(name).resolve().name if Path(name).is_dir() else name,
        dtype=str(tracer.decoder.dtype).removeprefix("torch."),
        attention=str(getattr(config, "_attn_implementation", None)),
        impl=tracer.impl,
        layers=tracer.decoder.n_layers,
        heads=tracer.decoder.n_heads,
        d_model=tracer.decoder.d_model,
    )


def report(tracer: Tracer, results: Sequence[Throughput]) -> dict[str, Any]:
    """All figures as JSON values: `machine`, `subject`, and `results`, one per length."""
    return {
        "machine": machine(tracer.decoder.device)._asdict(),
        "subject": subject(tracer)._asdict(),
        "results": [result.to_dict() for result in results],
    }


def prose() -> str:
    """English text that comes with Python: its language reference, 465 kB in Python 3.11."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def first_tokens(text: str, tokenizer: PreTrainedTokenizerBase | None, n_tokens: int) -> Tensor:
    """First token ids [n_tokens] of a text, with its leading special tokens."""
    if tokenizer is None:
        raise ValueError("text: the model has no tokenizer")
    ids = tokenizer(text, truncation=True, max_length=n_tokens)["input_ids"]
    if len(ids) < n_tokens:
        raise ValueError(f"text: has {len(ids)} tokens, expected at least {n_tokens}")
    return torch.tensor(ids, dtype=torch.int64)
