"""Every file kind: whatever bit is flipped, what is read is what was written, or nothing is."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from circuit_tasks import small_task
from opened import tiny_tracer
from survey_inputs import SMALL
from tiny import tiny_text

from ifr_fast import FormatError, RouteGraph, Routes, circuits
from ifr_fast.circuits.report.run import _Stages
from ifr_fast.recording import chunked, prefill
from ifr_fast.survey import Survey, survey
from ifr_fast.survey.inputs import Source

FLIPS = 1000  # over all kinds
TEXT = tiny_text(12)


class Kind(NamedTuple):
    """A kind of file: makes one in a folder, and reads it back as plain values."""

    make: Callable[[Path], Path]  # returns the file, or a folder of files
    read: Callable[[Path], Any]


def plain(x: Any) -> Any:
    """Values that `==` compares, bit for bit."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), list(x.shape), x.contiguous().view(-1).numpy().tobytes()
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return repr(x)


def tracer() -> Any:
    return tiny_tracer("llama")


def make_graph(folder: Path) -> Path:
    tracer().trace(TEXT, position=[5, 8], threshold=0.05).save(folder / "graph")
    return folder / "graph"


def make_routes(folder: Path) -> Path:
    tracer().trace_all(TEXT, threshold=0.2).save(folder / "routes")
    return folder / "routes"


def make_lean(folder: Path) -> Path:
    tracer().record(TEXT, mode="lean").save(folder / "recording")
    return folder / "recording"


def make_chunked(folder: Path) -> Path:
    tracer().record(TEXT, path=folder / "recording")
    return folder / "recording"


def make_unfinished(folder: Path) -> Path:
    """Interrupted within the second of three layers, two of three chunks done."""
    path = folder / "recording"

    @contextmanager
    def stopped(*_: Any) -> Iterator[Any]:
        def show(done: int) -> None:
            if done == 5:
                raise KeyboardInterrupt

        yield show

    with patch.object(chunked, "progress", stopped), pytest.raises(KeyboardInterrupt):
        tracer().record(TEXT, path=path)
    return path


def read_resumed(path: Path) -> Any:
    own = path.with_name(path.name + ".resumed")
    shutil.copy(path, own)
    tracer().record(TEXT, path=own)
    return read_recording(own)


def make_full(folder: Path) -> Path:
    tracer().record(TEXT, mode="full").save(folder / "recording")
    return folder / "recording"


def read_recording(path: Path) -> Any:
    found = tracer().load_recording(path)
    of_layers = [
        (x.resid_pre, x.k, x.v, x.q, x.resid_mid, x.checked_mid, x.log_sum_exp, x.window)
        for x in found.layers
    ]
    rest = found.token_ids, found.tokens, found.mode, found.position, found.logits, found.states
    return *rest, found.resid_final, found.checked_rows, of_layers


def make_tables(folder: Path) -> Path:
    tracer().trace_all(TEXT, threshold=0.2, checkpoint=folder / "tables")
    return folder / "tables"


def read_tables(folder: Path) -> Any:
    """Resumes from the tables: every layer is one of theirs."""
    routes = tracer().trace_all(TEXT, threshold=0.2, checkpoint=folder)
    return [table._asdict() | table.edges._asdict() | {"edges": None} for table in routes.layers]


def make_patches(folder: Path) -> Path:
    circuits.patch(tracer().decoder, small_task(), checkpoint=folder / "patches")
    return folder / "patches"


def read_patches(folder: Path) -> Any:
    found = circuits.patch(tracer().decoder, small_task(), checkpoint=folder)
    return found.heads, found.ffn


def make_survival(folder: Path) -> Path:
    read_survival(folder / "survival")
    return folder / "survival"


def read_survival(folder: Path) -> Any:
    values = circuits.zero_activations(tracer().decoder)
    options: dict[str, Any] = {"thresholds": [0.1, 0.3], "draws": 1, "checkpoint": folder}
    found = circuits.survival(tracer(), small_task(2), values, **options)
    tables = (found.logit_difference, found.probability, found.kept)
    return [list(table.values()) for table in tables], found.full, found.empty


def make_stage(folder: Path) -> Path:
    read_stage(folder)
    return folder / "numbers.json"


def read_stage(path: Path) -> Any:
    folder = path if path.is_dir() else path.parent
    return _Stages(folder, "of a model").of("numbers", ["question"], lambda: [0.5, {"a": 1.25}])


def records(n: int) -> list[dict[str, Any]]:
    return [{"token_ids": tiny_text(60, seed=i).tolist()} for i in range(n)]


def make_survey(folder: Path) -> Path:
    survey(Source(records(3), "c"), folder / "survey", model=tracer(), **SMALL)
    return folder / "survey"


def read_survey(folder: Path) -> Any:
    found = Survey.open(folder)
    tables = [table.read() for table in (found.predictions, found.heads, found.corpora)]
    rest = found.model, found.thresholds, found.keep, found.labels, found.complete, found.problems
    values = [{k: (v.shape, v.tolist()) for k, v in t.items()} for t in tables]
    return repr(values), *map(repr, rest)


KINDS = {
    "graph": Kind(make_graph, RouteGraph.load),
    "routes": Kind(make_routes, Routes.load),
    "lean recording": Kind(make_lean, read_recording),
    "recording in chunks": Kind(make_chunked, read_recording),
    "unfinished recording": Kind(make_unfinished, read_resumed),
    "full recording": Kind(make_full, read_recording),
    "tables of layers": Kind(make_tables, read_tables),
    "patches": Kind(make_patches, read_patches),
    "survival": Kind(make_survival, read_survival),
    "stage": Kind(make_stage, read_stage),
    "survey": Kind(make_survey, read_survey),
}


def values_of(found: Any) -> Any:
    if isinstance(found, RouteGraph):
        of = {name: getattr(found, name) for name in found.__dataclass_fields__}
        return plain({k: v for k, v in of.items() if not k.startswith("_")})
    if isinstance(found, Routes):
        predictions = found.predict(list(range(len(found))))
        of_layers = [[*table[:4], *table.edges, *table[5:]] for table in found.layers]
        rest = found.tokens, found.threshold, found.scored_threshold, found.granularity
        return plain([found.token_ids, predictions, of_layers, rest])
    return plain(found)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_change_nothing_unnoticed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(prefill.CHUNK_ROWS, "cpu", 5)
    path = KINDS[kind].make(tmp_path)
    expected = values_of(KINDS[kind].read(path))
    files = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.stat().st_size)
    files = [x for x in files if x.is_file() and x.name != ".lock"]
    draw = random.Random(kind)
    noticed = 0
    for _ in range(FLIPS // len(KINDS)):
        # Small files and the headers of large ones are hit as often as the data.
        file = draw.choice(files)
        content = file.read_bytes()
        end = len(content) if draw.random() < 0.5 else min(len(content), 2000)
        at, bit = draw.randrange(end), draw.randrange(8)
        kept = file.with_name(file.name + ".kept")
        shutil.move(file, kept)
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        try:
            with warnings.catch_warnings(action="error"):
                found = values_of(KINDS[kind].read(path))
        except FormatError as error:
            noticed += str(error).startswith(str(path))
        else:
            assert found == expected, (file, at, bit)
        finally:
            shutil.move(kept, file)
    assert noticed > FLIPS // len(KINDS) // 3
    assert values_of(KINDS[kind].read(path)) == expected


@pytest.mark.parametrize("kind", ["graph", "routes", "full recording"])
def test_swapped_bytes_are_noticed(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind].make(tmp_path)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    draw = random.Random(kind)
    for _ in range(20):
        a, b = (draw.randrange(start, len(content) - 8) for _ in range(2))
        if content[a] == content[b]:
            continue
        swapped = bytearray(content)
        swapped[a], swapped[b] = content[b], content[a]
        path.write_bytes(swapped)
        with pytest.raises(FormatError, match=r"damaged|unfinished"):
            KINDS[kind].read(path)


def test_the_patches_of_another_layer_are_refused(tmp_path: Path) -> None:
    folder = make_patches(tmp_path)
    shutil.copy(folder / "0-1.safetensors", folder / "0-2.safetensors")
    with pytest.raises(FormatError, match=r"0-2.safetensors: belongs to another layer"):
        read_patches(folder)


def test_a_duplicated_part_stops_a_survey(tmp_path: Path) -> None:
    texts = records(6)
    options: dict[str, Any] = {"model": tracer(), **SMALL}
    found = survey(Source(texts, "c"), tmp_path / "survey", **options)
    assert len(found.part_numbers) > 2

    def copy(table: str, kind: str) -> None:
        folder = tmp_path / "survey" / table
        shutil.copy(folder / f"part-000001.{kind}", folder / f"part-000002.{kind}")

    for table in ("predictions", "heads"):
        copy(table, "parquet")
        with pytest.raises(FormatError, match=rf"{table}/part-000002.parquet: is damaged"):
            survey(Source(texts, "c"), tmp_path / "survey", resume=True, **options)
    copy("checksums", "json")
    with pytest.raises(FormatError, match="it is the record of part 1; delete it and resume"):
        survey(Source(texts, "c"), tmp_path / "survey", resume=True, **options)
    record = tmp_path / "survey" / "checksums" / "part-000002.json"
    document = json.loads(record.read_text())
    record.write_text(json.dumps(document | {"part": 2}))
    with pytest.raises(FormatError, match="its content does not match its checksum"):
        survey(Source(texts, "c"), tmp_path / "survey", resume=True, **options)
    record.unlink()
    assert plain(survey(Source(texts, "c"), tmp_path / "survey", resume=True, **options)
                 .predictions.read("token")["token"].tolist())  # fmt: skip


def test_a_missing_part_is_noticed(tmp_path: Path) -> None:
    make_survey(tmp_path)
    path = tmp_path / "survey" / "heads" / "part-000000.parquet"
    path.unlink()
    with pytest.raises(FormatError, match=r"part-000000.parquet: is missing"):
        read_survey(tmp_path / "survey")


def test_surveys_without_checksums_are_read_and_not_resumed(tmp_path: Path) -> None:
    folder = make_survey(tmp_path)
    expected = read_survey(folder)
    shutil.rmtree(folder / "checksums")
    manifest = json.loads((folder / "survey.json").read_text())
    for name in ("checksum", "sums", "parts"):
        del manifest[name]
    (folder / "survey.json").write_text(json.dumps(manifest | {"version": 1}))
    with pytest.warns(UserWarning, match="files of version 1 have no checksums"):
        assert read_survey(folder) == expected
    with (
        pytest.warns(UserWarning, match="no checksums"),
        pytest.raises(FormatError, match="was begun by an older ifr_fast"),
    ):
        survey(Source(records(3), "c"), folder, model=tracer(), resume=True, **SMALL)
