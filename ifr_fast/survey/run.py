"""survey(): sources -> windows -> scores -> parts -> aggregates."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
import transformers
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from .._version import __version__
from ..arguments import (
    check_choice,
    check_count,
    check_flag,
    check_fraction,
    check_instance,
    check_path,
    check_unicode,
    listed,
)
from ..errors import FormatError, IfrError
from ..model.pretrained import load_tokenizer
from ..tracer import Tracer
from .documents import Cutter, Vocabulary
from .engines import Engine, LocalEngine, ModelSource, Scoring, ray_engine
from .inputs import Reading, Source, expand
from .parts import FOLDER, TABLES, check_file, part_path, read_record, whole_parts
from .readers import SPLITS, Split
from .schema import UNCHECKED, Problem, Survey, read_manifest
from .windows import Window, WindowReader
from .writer import Shape, write_corpora, write_manifest, write_part

EngineName: TypeAlias = Literal["local", "ray"]

THRESHOLDS = (0.01, 0.02, 0.04, 0.08)
MAX_TOKENS = 2048  # tokens that the model reads at once, unless its context is shorter
WINDOW_TOKENS = 16384
_BATCH_TOKENS = {"cpu": 1024}  # tokens of a forward pass, by device
_BATCH_TOKENS_ELSEWHERE = 16384


@dataclass(frozen=True)
class State:
    """Progress of a survey."""

    documents: int  # documents that this run has written
    predictions: int  # predictions that this run has written
    seconds: float  # since scoring began
    share: float | None  # share of the sources' bytes; None if their size is not known
    seconds_left: float | None
    problems: list[Problem]  # problems since the last state

    @property
    def predictions_per_second(self) -> float:
        """Speed of this run."""
        return self.predictions / max(self.seconds, 1e-9)


def survey(
    inputs: Any,
    out: str | os.PathLike[str],
    *,
    model: Tracer | str | os.PathLike[str] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    label_by: Sequence[str] | Mapping[str, str] = (),
    text_field: str = "text",
    split: Split = "file",
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
    window_tokens: int = WINDOW_TOKENS,
    engine: EngineName = "local",
    workers: int | None = None,
    resume: bool = False,
    strict: bool = False,
    impl: str = "auto",
    model_options: Mapping[str, Any] | None = None,
    on_state: Callable[[State], None] | None = None,
) -> Survey:
    """Scores every prediction of a corpus and writes the results into the directory `out`.

    inputs: a path, `hf:NAME`, a `Source`, an iterable of strings and mappings, several paths, or a
    mapping from corpora to any of these. model: a Tracer, a Hub name or a directory; default: the
    default model. label_by: fields of records to keep with each token, "NAME" or "NAME=FIELD"; the
    label "corpus" names the corpus of a record. max_tokens: most tokens that the model reads at
    once; longer documents are cut. window_tokens: tokens of a part, the unit that is written and
    resumed. workers: number of Ray's actors. strict: stop at the first problem. impl and
    model_options (of `from_pretrained`): for a model given by name.

    Raises ValueError for wrong arguments, FormatError if `out` holds something other than this
    survey, and IfrError if the survey cannot continue; written parts stay, and `resume` continues
    from them.
    """
    check_choice("engine", engine, ("local", "ray"))
    reading = _reading(text_field, split, label_by)
    levels = _thresholds(thresholds)
    for name, number in (
        ("max_tokens", max_tokens),
        ("batch_tokens", batch_tokens),
        ("window_tokens", window_tokens),
        ("workers", workers),
    ):
        if number is not None or name == "window_tokens":
            check_count(name, cast(int, number))
    if model_options is not None:
        check_instance("model_options", model_options, dict)
    for name, flag in (("resume", resume), ("strict", strict)):
        check_flag(name, flag)
    if workers is not None and engine != "ray":
        raise ValueError("workers: goes with engine='ray'")
    directory = check_path("out", out)
    sources = _outside(expand(inputs), directory)
    with ExitStack() as stack:
        begun = _begin(directory, resume, stack)
        runner, tokenizer = _engine(engine, model, impl, model_options or {}, workers, stack)
        facts = runner.facts
        context = facts.max_length
        if max_tokens is None:
            max_tokens = min(MAX_TOKENS, context or MAX_TOKENS)
        elif context is not None and max_tokens > context:
            raise ValueError(f"max_tokens: the model's context holds {context}, got {max_tokens}")
        batch_tokens = batch_tokens or _BATCH_TOKENS.get(facts.device, _BATCH_TOKENS_ELSEWHERE)
        fields: dict[str, Any] = {
            "model": {
                "name": facts.name,
                "fingerprint": facts.fingerprint,
                "n_layers": facts.n_layers,
                "n_heads": facts.n_heads,
            },
            "impl": facts.impl,
            "thresholds": list(levels),
            "keep": levels[0],
            "labels": reading.labels,
            "label_by": dict(reading.label_by),
            "text_field": reading.text_field,
            "split": reading.split,
            "max_tokens": max_tokens,
            "batch_tokens": batch_tokens,
            "window_tokens": window_tokens,
            "sources": [source.described for source in sources],
        }
        versions = {
            "ifr_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        if begun is None:
            write_manifest(directory, {**fields, "versions": versions, "complete": False})
        else:
            _check_same(directory, begun, fields)
        vocabulary = Vocabulary(tokenizer, facts.vocab_size)
        feed = WindowReader(sources, Cutter(vocabulary, reading, max_tokens), window_tokens)
        shape = Shape(facts.n_layers, facts.n_heads, len(levels), reading.labels)
        run = _Run(directory, feed, shape, strict, on_state)
        for scored in runner.run(run.windows(), Scoring(levels, batch_tokens)):
            problems = write_part(directory, shape, scored.window, scored.columns)
            run.written(scored.window, problems)
        found = Survey.open(directory)
        if len(found.predictions) == 0:
            problems = found.problems
            raise IfrError(
                f"inputs: nothing could be surveyed; the first of {len(problems)} problems: "
                f"{problems[0]}"
            )
        sums = write_corpora(found)
        if begun is None or not begun.get("complete") or begun.get("sums") != sums:
            kept = versions if begun is None else begun.get("versions", versions)
            n_parts = len(found.part_numbers)
            done = {"versions": kept, "complete": True, "parts": n_parts, "sums": sums}
            write_manifest(directory, {**fields, **done})
    return Survey.open(directory)


class _Run:
    """Counts what is read, skipped and written, and how fast."""

    def __init__(
        self,
        directory: Path,
        feed: WindowReader,
        shape: Shape,
        strict: bool,
        on_state: Callable[[State], None] | None,
    ) -> None:
        self.directory, self.feed, self.shape = directory, feed, shape
        self.strict, self.on_state = strict, on_state
        self.whole = set(whole_parts(directory))
        self.documents = self.predictions = self.read = self.skipped = 0
        self.began = time.perf_counter()

    def windows(self) -> Iterator[Window]:
        """Windows that are not scored yet; parts that are already written are skipped."""
        part = 0
        while True:
            if part in self.whole:
                record = read_record(self.directory, part)
                for table in TABLES:
                    check_file(self.directory, table, part, record)
                path = part_path(self.directory, "predictions", part)
                self.feed.skip(record, str(path))
                self.skipped = self.read = max(self.read, self.feed.progress.done)
                self.began = time.perf_counter()
            else:
                window = self.feed.window(part)
                if window is None:
                    break
                if self.strict and window.problems:
                    raise IfrError(str(window.problems[0]))
                yield window
            part += 1
        beyond = [number for number in self.whole if number >= part]
        if beyond:
            raise FormatError(
                f"{part_path(self.directory, 'predictions', beyond[0])}: is beyond the end of "
                "the inputs; survey them into another directory"
            )

    def written(self, window: Window, problems: list[Problem]) -> None:
        """Records that a part is on the disk."""
        if self.strict and problems:
            raise IfrError(str(problems[0]))
        self.documents += len(window.documents)
        self.predictions += window.n_tokens
        self.read = max(self.read, window.read)
        if self.on_state is None:
            return
        seconds, total = time.perf_counter() - self.began, self.feed.progress.total
        share = left = None
        if total:
            share = min(1.0, self.read / total)
            left = seconds * (total - self.read) / max(1, self.read - self.skipped)
        self.on_state(State(self.documents, self.predictions, seconds, share, left, problems))


def _thresholds(given: Sequence[float]) -> tuple[float, ...]:
    levels = tuple(check_fraction("thresholds", x) for x in listed("thresholds", given))
    if not levels or list(levels) != sorted(set(levels)):
        raise ValueError(f"thresholds: expected numbers, ascending, got {list(given)}")
    return levels


def _reading(text_field: str, split: Split, label_by: Sequence[str] | Mapping[str, str]) -> Reading:
    check_unicode("text_field", text_field)
    check_choice("split", split, SPLITS)
    if isinstance(label_by, str):
        label_by = [label_by]
    if not isinstance(label_by, Mapping):
        names = [check_unicode("label_by", given) for given in listed("label_by", label_by)]
        pairs = [given.partition("=") for given in names]
        label_by = {name: of if equals else name for name, equals, of in pairs}
    for name in label_by:
        check_unicode("label_by", label_by[name])
        if not check_unicode("label_by", name).isidentifier():
            raise ValueError(f"label_by: expected names that are valid identifiers, got {name!r}")
    return Reading(text_field, split, dict(label_by))


def _outside(sources: list[Source], directory: Path) -> list[Source]:
    """Sources without the survey's own files, for an input folder that contains the output."""
    inside = directory.resolve()
    found = [
        source
        for source in sources
        if not (isinstance(source.of, Path) and source.of.resolve().is_relative_to(inside))
    ]
    if not found:
        raise ValueError(f"inputs: expected files that are not in {str(directory)!r}, the output")
    return found


def _begin(directory: Path, resume: bool, stack: ExitStack) -> dict[str, Any] | None:
    """Locks the directory; returns the manifest of the survey to resume, None for a new one."""
    _check_empty(directory)
    existed = directory.exists()
    try:
        for folder in _FOLDERS:
            os.makedirs(directory / folder, exist_ok=True)
        stack.enter_context(FileLock(directory / ".lock", timeout=0))
    except Timeout as error:
        raise IfrError(f"{directory}: another run is writing into it") from error
    except OSError as error:
        raise IfrError(f"{directory}: cannot be written ({error.strerror})") from error
    stack.callback(_clean_up, directory, existed)
    _remove_leftovers(directory)
    if not (directory / "survey.json").exists():
        _check_empty(directory)
        return None
    manifest = read_manifest(directory)
    if not resume:
        raise FormatError(
            f"{directory}: holds a survey already; resume it, or name another directory"
        )
    if manifest["version"] == UNCHECKED:
        raise FormatError(
            f"{directory}: was begun by an older ifr_fast, whose parts have no checksums; survey "
            "the inputs into another directory"
        )
    return manifest


def _clean_up(directory: Path, existed: bool) -> None:
    """Removes what was created if no survey began; the caller holds the lock."""
    if (directory / "survey.json").exists():
        return
    (directory / ".lock").unlink(missing_ok=True)
    of_survey = [directory / folder for folder in _FOLDERS]
    for folder in of_survey if existed else [*of_survey, directory]:
        with suppress(OSError):  # not empty
            folder.rmdir()


_FOLDERS = (*TABLES, FOLDER)
_OWN = {*_FOLDERS, ".lock"}


def _check_empty(directory: Path) -> None:
    """Raises FormatError if the directory holds something, but no survey."""
    if not directory.is_dir() or (directory / "survey.json").exists():
        return
    others = [x for x in directory.iterdir()
              if x.name not in _OWN and not x.name.startswith(".ifr_fast.")]  # fmt: skip
    if others or any((directory / "predictions").glob("part-*.parquet")):
        raise FormatError(f"{directory}: holds other things; expected an empty directory")


def _remove_leftovers(directory: Path) -> None:
    """Removes unfinished files of a killed run; the caller holds the lock."""
    for folder in (directory, *(directory / name for name in _FOLDERS)):
        for leftover in folder.glob(".ifr_fast.*"):
            leftover.unlink(missing_ok=True)


def _check_same(directory: Path, begun: dict[str, Any], fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if begun.get(name) != value:
            match name:
                case "model":
                    what = "of another model, or with other weights or settings"
                case "sources":
                    what = "from other inputs, or they changed their size"
                case _:
                    what = f"with {name} {begun.get(name)!r}, not {value!r}"
            raise FormatError(
                f"{directory}: was begun {what}; resume it with the same options, or name another "
                "directory"
            )


def _engine(
    name: EngineName,
    model: Tracer | str | os.PathLike[str] | None,
    impl: str,
    options: Mapping[str, Any],
    workers: int | None,
    stack: ExitStack,
) -> tuple[Engine, PreTrainedTokenizerBase | None]:
    if isinstance(model, Tracer):
        if name == "ray":
            raise ValueError("model: engine='ray' opens it anew; expected a name or a directory")
        return LocalEngine(model), model.tokenizer
    source = ModelSource(None if model is None else os.fspath(model), impl, dict(options))
    if name == "local":
        tracer = source.open()
        return LocalEngine(tracer), tracer.tokenizer
    tokenizer = load_tokenizer(source.name, **source.options)
    engine = stack.enter_context(ray_engine(source, workers, torch.get_num_threads()))
    return engine, tokenizer
