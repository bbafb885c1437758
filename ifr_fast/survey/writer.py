"""Writes parts, aggregates and the manifest, each whole or not at all.

Their content depends only on the text and the model, bit for bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..storage.checksums import checksum_of_json
from ..storage.files import whole_file, write_text
from .arrow import pa, pq
from .columns import Columns
from .parts import TABLES, Cursor, file_sum, part_path, record_path
from .schema import (
    FORMAT,
    PROBLEMS,
    VERSION,
    Problem,
    Survey,
    corpora_schema,
    heads_schema,
    predictions_schema,
)
from .windows import Window

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Shape:
    """Sizes and labels that determine the columns of a survey's tables."""

    n_layers: int
    n_heads: int
    n_thresholds: int
    labels: list[str]


def write_part(
    directory: Path, shape: Shape, window: Window, found: Sequence[Columns | None]
) -> list[Problem]:
    """Writes the part of a window, its tables and then its record; returns its problems.

    Raises IfrError if the system refuses, as for a full disk; then the part does not exist.
    """
    problems = list(window.problems)
    rows = []
    for i, (document, columns) in enumerate(zip(window.documents, found, strict=True)):
        if columns is None:
            problems.append(Problem(document.context, "the model's states are not finite"))
        else:
            rows.append((window.first + i, document, columns))
    metadata = {PROBLEMS: json.dumps([vars(problem) for problem in problems])}
    L, H = shape.n_layers, shape.n_heads
    schema = predictions_schema(L, H, shape.n_thresholds, shape.labels)
    counts = [len(document.tokens.word) for _, document, _ in rows]
    ids = [document.tokens.ids for _, document, _ in rows]

    def repeated(values: list[Any]) -> list[Any]:
        return [value for value, n in zip(values, counts, strict=True) for _ in range(n)]

    predictions: dict[str, Any] = {
        "document": np.repeat([number for number, *_ in rows], counts),
        "context": repeated([document.context for _, document, _ in rows]),
        "corpus": repeated([document.corpus for _, document, _ in rows]),
        "position": _joined([np.arange(n) for n in counts]),
        "token_id": _joined([x[:-1] for x in ids]),
        "token": [s for _, document, _ in rows for s in document.strings[:-1]],
        "next_token_id": _joined([x[1:] for x in ids]),
        "next_token": [s for _, document, _ in rows for s in document.strings[1:]],
    }
    for name in shape.labels:
        predictions[f"label_{name}"] = [x for _, d, _ in rows for x in d.labels[name]]
    for name in schema.names:
        if name not in predictions:
            predictions[name] = _joined([columns.predictions[name] for *_, columns in rows])

    of_heads = heads_schema()
    layer, head = np.divmod(np.arange(L * H), H)
    heads: dict[str, Any] = {
        "document": np.repeat([number for number, *_ in rows], L * H),
        "corpus": [document.corpus for _, document, _ in rows for _ in range(L * H)],
        "layer": np.tile(layer, len(rows)),
        "head": np.tile(head, len(rows)),
    }
    for name in of_heads.names:
        if name not in heads:
            heads[name] = _joined([columns.heads[name] for *_, columns in rows])

    _write(part_path(directory, "heads", window.part), of_heads, heads)
    _write(part_path(directory, "predictions", window.part), schema, predictions, metadata)
    write_record(directory, window.part, window.begin, window.end)
    return problems


def write_record(directory: Path, part: int, begin: Cursor, end: Cursor) -> None:
    """Completes a part whose tables are written."""
    document: dict[str, Any] = {"part": part, "begin": begin._asdict(), "end": end._asdict()}
    document["sums"] = {table: file_sum(part_path(directory, table, part)) for table in TABLES}
    document["checksum"] = checksum_of_json(document)
    write_text(record_path(directory, part), json.dumps(document) + "\n")


def _joined(arrays: list[Array]) -> Array:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _write(
    path: Path, schema: pa.Schema, columns: dict[str, Any], metadata: dict[bytes, str] | None = None
) -> None:
    arrays = [_array(columns[field.name], field.type) for field in schema]
    table = pa.Table.from_arrays(
        arrays, schema=schema.with_metadata({k: v.encode() for k, v in (metadata or {}).items()})
    )
    strings = [field.name for field in schema if pa.types.is_string(field.type)]
    with whole_file(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            compression_level=1,
            use_dictionary=strings,
            write_page_checksum=True,
        )
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        flat = np.asarray(values, kind.value_type.to_pandas_dtype()).ravel()
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind)
    if pa.types.is_fixed_size_binary(kind):
        raw = np.ascontiguousarray(values, np.uint8)
        buffers = [None, pa.py_buffer(raw.tobytes())]
        return pa.FixedSizeBinaryArray.from_buffers(kind, raw.size // kind.byte_width, buffers)
    if pa.types.is_string(kind):
        return pa.array(values, kind)
    return pa.array(np.asarray(values, kind.to_pandas_dtype()))


@dataclass
class _Sums:
    """Sums over one corpus, float64."""

    documents: int = 0
    predictions: int = 0
    targets: float = 0
    of: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: Any) -> None:
        self.of[name] = self.of.get(name, 0) + value


def write_corpora(survey: Survey) -> dict[str, str]:
    """Aggregates all parts, one at a time, into corpora.parquet; returns its checksum by name."""
    L, H, K = survey.n_layers, survey.n_heads, len(survey.thresholds)
    sums: dict[str, _Sums] = {}
    means = ["head_importance", "ffn_importance", "residual_mid", "residual_post"]
    frequencies = {f"{kind}_in_{k}": f"{kind}_frequency_{k}" for k in range(K)
                   for kind in ("head", "ffn")}  # fmt: skip
    depths = [f"route_depth_{k}" for k in range(K)]
    names = ["document", "corpus", "probability", *means, *frequencies, *depths]
    of_heads = ["corpus", "layer", "head", "rows", "mass", "edge_mass"]
    parts = zip(survey.predictions.parts(*names), survey.heads.parts(*of_heads), strict=True)
    for predictions, heads in parts:
        for corpus in sorted(set(predictions["corpus"].tolist())):
            chosen = predictions["corpus"] == corpus
            into = sums.setdefault(corpus, _Sums())
            into.documents += len(np.unique(predictions["document"][chosen]))
            into.predictions += int(chosen.sum())
            # A probability that underflowed counts as the smallest positive number.
            smallest = np.finfo(np.float32).tiny
            likely = predictions["probability"][chosen].astype(np.float64).clip(min=smallest)
            into.add("log_probability", np.log(likely).sum())
            for name in means:
                into.add(name, predictions[name][chosen].astype(np.float64).sum(0))
            for name, frequency in frequencies.items():
                into.add(frequency, predictions[name][chosen].sum(0).astype(np.float64))
            for name in depths:
                into.add(name, float(predictions[name][chosen].sum(dtype=np.int64)))
            mine = heads["corpus"] == corpus
            into.targets += float(heads["rows"][mine].reshape(-1, L * H)[:, 0].sum())
            for name in ("mass", "edge_mass"):
                of_document = heads[name][mine].reshape(-1, L, H).astype(np.float64)
                into.add(f"head_{name}", of_document.sum(0))
    schema = corpora_schema(L, H, K)
    ordered = sorted(sums)
    columns: dict[str, Any] = {
        "corpus": ordered,
        "documents": [sums[c].documents for c in ordered],
        "predictions": [sums[c].predictions for c in ordered],
    }
    for name in schema.names:
        if name not in columns:
            columns[name] = np.array(
                [
                    of.of[name] / (of.targets if "mass" in name else of.predictions)
                    for of in (sums[c] for c in ordered)
                ]
            )
    path = survey.path / "corpora.parquet"
    _write(path, schema, columns)
    return {path.name: file_sum(path)}


def write_manifest(directory: Path, fields: dict[str, Any]) -> None:
    """Writes survey.json, whole or not at all."""
    manifest = {"format": FORMAT, "version": VERSION, **fields}
    manifest["checksum"] = checksum_of_json(manifest)
    write_text(directory / "survey.json", json.dumps(manifest, indent=1) + "\n")
