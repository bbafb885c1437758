"""Engines that score windows: this process, or actors of Ray. Both give the same numbers.

An actor has a GPU, or as many threads as this process; a window is one task. An actor that dies is
replaced, and its window is assigned again; results of other windows are kept.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ..errors import IfrError, needing
from ..tracer import Tracer
from .columns import Columns, Tokens, score
from .schema import first_line
from .windows import Window

_ATTEMPTS = 4  # attempts at a window whose actors die
_AHEAD = 2  # windows per actor, the one that it scores included


class Facts(NamedTuple):
    """Facts about a model."""

    name: str
    fingerprint: str
    n_layers: int
    n_heads: int
    vocab_size: int
    max_length: int | None
    device: str
    impl: str

    @staticmethod
    def of(tracer: Tracer) -> Facts:
        """Facts about an open model."""
        decoder = tracer.decoder
        name = str(tracer.model.config.name_or_path) or type(tracer.model).__name__
        return Facts(
            Path(name).resolve().name if Path(name).is_dir() else name,
            decoder.fingerprint(),
            decoder.n_layers,
            decoder.n_heads,
            decoder.vocab_size,
            decoder.max_length,
            decoder.device.type,
            tracer.impl,
        )


@dataclass(frozen=True)
class ModelSource:
    """A model that can be opened anywhere: by name or directory."""

    name: str | None = None
    impl: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of from_pretrained

    def open(self) -> Tracer:
        """Loads the model onto the GPUs that this process sees, unless `options` name a device."""
        options = dict(self.options)
        if torch.cuda.is_available() and find_spec("accelerate") is not None:
            options.setdefault("device_map", "auto")
        return Tracer.from_pretrained(self.name, impl=self.impl, **options)


class Scoring(NamedTuple):
    """Settings by which documents are scored."""

    thresholds: tuple[float, ...]
    batch_tokens: int


class Scored(NamedTuple):
    """A window and the columns of each document; None if its states are not finite."""

    window: Window
    columns: list[Columns | None]


class Engine(Protocol):
    """Scores windows, in any order."""

    facts: Facts

    def run(self, windows: Iterator[Window], scoring: Scoring) -> Iterator[Scored]: ...


class LocalEngine:
    """Scores windows in this process."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.facts = Facts.of(tracer)

    def run(self, windows: Iterator[Window], scoring: Scoring) -> Iterator[Scored]:
        """Scores one window after the other."""
        for window in windows:
            tokens = [document.tokens for document in window.documents]
            yield Scored(window, score(self.tracer, tokens, *scoring))


class Worker:
    """The object that runs in an actor."""

    def __init__(self, source: ModelSource, n_threads: int) -> None:
        torch.set_num_threads(n_threads)
        self.tracer = source.open()

    def facts(self) -> Facts:
        """Facts about the model."""
        return Facts.of(self.tracer)

    def score(self, documents: Sequence[Tokens], scoring: Scoring) -> list[Columns | None]:
        """Scores documents as `columns.score`."""
        return score(self.tracer, documents, *scoring)

    def pid(self) -> int:
        """Process id of the actor."""
        return os.getpid()


class RayEngine:
    """Scores windows in actors of Ray: one per GPU of the cluster, or per share of its CPUs.

    Raises IfrError if an actor cannot open the model, or if actors open different models.
    """

    def __init__(self, source: ModelSource, n_workers: int | None, n_threads: int) -> None:
        self._ray = ray = _import_ray()
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        n_workers = n_workers or gpus or max(1, cpus // n_threads)
        share = cpus / n_workers
        resources_of_actor = {"num_cpus": min(n_threads, int(share) or share)}
        if gpus:
            each = gpus / n_workers
            resources_of_actor = {"num_cpus": min(1, share), "num_gpus": int(each) or each}
        of_actor = ray.remote(Worker).options(**resources_of_actor)
        self._new_worker = lambda: of_actor.remote(source, n_threads)
        self.workers = [self._new_worker() for _ in range(n_workers)]
        try:
            facts = ray.get([worker.facts.remote() for worker in self.workers])
        except ray.exceptions.RayError as error:
            raise IfrError(f"engine: an actor cannot open the model ({_cause(error)})") from error
        self.facts: Facts = facts[0]
        if len({of.fingerprint for of in facts}) > 1:
            raise IfrError("engine: the actors' models are not the same")

    def run(self, windows: Iterator[Window], scoring: Scoring) -> Iterator[Scored]:
        """Windows in the order of completion. Raises IfrError for one whose actors keep dying."""
        ray = self._ray
        free = list(range(len(self.workers))) * _AHEAD
        running: dict[Any, tuple[Window, int, Any, int]] = {}

        def start(window: Window, attempt: int) -> None:
            place = free.pop(0)
            worker = self.workers[place]
            documents = [document.tokens for document in window.documents]
            task = worker.score.remote(documents, scoring)
            running[task] = window, place, worker, attempt

        # Windows are read only when an actor is free for them.
        while True:
            while free and (window := next(windows, None)) is not None:
                start(window, 1)
            if not running:
                return
            (task,), _ = ray.wait(list(running))
            window, place, worker, attempt = running.pop(task)
            free.append(place)
            try:
                columns = ray.get(task)
            except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
                if attempt == _ATTEMPTS:
                    raise IfrError(
                        f"engine: an actor died {attempt} times over part {window.part}, from "
                        f"{window.documents[0].context} on ({_cause(error)})"
                    ) from error
                if self.workers[place] is worker:  # a dead actor fails all of its windows
                    self.workers[place] = self._new_worker()
                self.on_retry(window, error)
                start(window, attempt + 1)
                continue
            except ray.exceptions.RayError as error:
                raise IfrError(f"engine: part {window.part} failed ({_cause(error)})") from error
            yield Scored(window, columns)

    def on_retry(self, window: Window, error: Exception) -> None:
        """Warns that an actor died and its window is assigned again."""
        message = f"an actor died over part {window.part} ({_cause(error)}); it is assigned again"
        warnings.warn(message, stacklevel=2)

    def close(self) -> None:
        """Stops the actors."""
        for worker in self.workers:
            self._ray.kill(worker)


def _cause(error: Exception) -> str:
    """Error of an actor, in one line."""
    cause = getattr(error, "cause", None)
    return first_line(cause if isinstance(cause, Exception) else error)


def _import_ray() -> Any:
    with needing("engine='ray'", "ray", "pip install 'ifr-fast[ray]'"):
        import ray
    return ray


@contextmanager
def ray_engine(source: ModelSource, n_workers: int | None, n_threads: int) -> Iterator[RayEngine]:
    """Gives an engine on the cluster of this process or of $RAY_ADDRESS, or on a new local one that
    ends with the block.
    """
    ray = _import_ray()
    own = not ray.is_initialized()
    if own:
        new = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", **new)
    try:
        engine = RayEngine(source, n_workers, n_threads)
        try:
            yield engine
        finally:
            engine.close()
    finally:
        if own:
            ray.shutdown()
