"""Surveys with made-up rows: whatever a test wants an analysis to find, or not to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifr_fast.storage.checksums import checksum_of_json
from ifr_fast.survey.parts import Cursor
from ifr_fast.survey.schema import (
    FORMAT,
    OFFSETS,
    PROBLEMS,
    VERSION,
    Survey,
    heads_schema,
    predictions_schema,
)
from ifr_fast.survey.writer import write_record

Columns = dict[str, Any]
L, H = 3, 4
THRESHOLDS = [0.02, 0.04]
TAGS = ["ADJ", "DET", "NOUN", "VERB"]


def write_survey(
    path: Path,
    predictions: Columns,
    heads: Columns | None = None,
    *,
    n_layers: int,
    n_heads: int,
    thresholds: list[float],
    labels: list[str] | None = None,
    n_parts: int = 2,
    name: str = "made up",
) -> Survey:
    """A survey of the columns given, by document, in `n_parts` parts; the other columns are zero,
    or whatever has the right type.

    Booleans [N, L, H] and [N, L] stand for bits.
    """
    labels = labels or []
    schemas = {
        "predictions": predictions_schema(n_layers, n_heads, len(thresholds), labels),
        "heads": heads_schema(),
    }
    metadata = {PROBLEMS: b"[]"}
    documents = np.asarray(predictions["document"])
    if heads is None:
        heads = blank_heads(documents, predictions["corpus"], n_layers, n_heads)
    cuts = np.array_split(np.unique(documents), n_parts)
    for table, columns in (("predictions", predictions), ("heads", heads)):
        (path / table).mkdir(parents=True)
        for part, chosen in enumerate(cuts):
            rows = np.isin(columns["document"], chosen)
            schema = schemas[table].with_metadata(metadata)
            n = int(rows.sum())
            arrays = [
                _array(np.asarray(columns[f.name])[rows] if f.name in columns else None, f.type, n)
                for f in schema
            ]
            pq.write_table(
                pa.Table.from_arrays(arrays, schema=schema),
                path / table / f"part-{part:06}.parquet",
            )
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "model": {"name": name, "n_layers": n_layers, "n_heads": n_heads},
        "thresholds": thresholds,
        "keep": thresholds[0],
        "labels": labels,
        "complete": True,
    }
    manifest["checksum"] = checksum_of_json(manifest)
    (path / "survey.json").write_text(json.dumps(manifest))
    (path / "checksums").mkdir()
    for part in range(n_parts):
        anywhere = Cursor(0, 0, 0, "")
        write_record(path, part, anywhere, anywhere)
    return Survey.open(path)


def blank_heads(documents: np.ndarray, corpora: Any, n_layers: int, n_heads: int) -> Columns:
    """A row for each document and head, with its number of rows and nothing else."""
    there, first, counts = np.unique(documents, return_index=True, return_counts=True)
    M = n_layers * n_heads
    return {
        "document": np.repeat(there, M),
        "corpus": np.repeat(np.asarray(corpora, dtype=object)[first], M),
        "layer": np.tile(np.arange(M) // n_heads, len(there)),
        "head": np.tile(np.arange(M) % n_heads, len(there)),
        "rows": np.repeat(counts, M),
        "by_offset": np.zeros((len(there) * M, OFFSETS)),
    }


def _array(values: np.ndarray | None, kind: pa.DataType, n: int) -> pa.Array:
    if pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        raw = np.zeros((n, width), np.uint8)
        if values is not None:
            packed = np.packbits(values.reshape(n, -1).astype(bool), axis=1, bitorder="little")
            raw[:, : packed.shape[1]] = packed
        return pa.FixedSizeBinaryArray.from_buffers(kind, n, [None, pa.py_buffer(raw.tobytes())])
    if pa.types.is_fixed_size_list(kind):
        flat = np.zeros(n * kind.list_size) if values is None else values.reshape(-1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), kind.list_size)
    if values is None:
        return pa.array([""] * n if pa.types.is_string(kind) else np.zeros(n), kind)
    return pa.array(values.tolist(), kind)


def made_up(n_documents: int = 30, length: int = 17, seed: int = 0) -> dict[str, Any]:
    """Columns of predictions without any effect: two corpora, documents of unequal length."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length - 5, length + 6, n_documents)
    N = int(lengths.sum())
    document = np.repeat(np.arange(n_documents), lengths)
    of_document = rng.normal(0, 0.3, (n_documents, L, H))  # documents differ among themselves
    likely = 1 / (1 + np.exp(-(of_document[document] + rng.normal(0, 0.3, (L, H)))))
    inside = rng.random((N, L, H)) < likely
    words = ["the", " cat", ".", ",", " sat", "\n", " of", " red"]
    return {
        "document": document,
        "corpus": np.where(document % 2 == 0, "even", "odd").astype(object),
        "position": np.concatenate([np.arange(n) for n in lengths]),
        "token": rng.choice(np.array(words, object), N),
        "next_token": rng.choice(np.array(words, object), N),
        "label_pos": rng.choice(np.array([*TAGS, None], object), N),
        "probability": rng.random(N),
        "head_importance": rng.gamma(1, 0.03, (N, L, H)),
        "ffn_importance": rng.gamma(1, 0.1, (N, L)),
        "residual_mid": rng.random((N, L)),
        "residual_post": rng.random((N, L)),
        "head_in_0": inside,
        "head_in_1": inside & (rng.random((N, L, H)) < 0.5),
        "ffn_in_1": rng.random((N, L)) < 0.5,
        "route_depth_0": rng.integers(0, L + 1, N),
        "route_depth_1": rng.integers(0, L + 1, N),
    }


def written(path: Path, columns: dict[str, Any], heads: Any = None, **options: Any) -> Survey:
    options = {"n_layers": L, "n_heads": H, "thresholds": THRESHOLDS, "labels": ["pos"]} | options
    return write_survey(path, columns, heads, **options)


def rows(finding: Any, **equal: Any) -> list[dict[str, Any]]:
    """Rows of a finding's table whose columns have these values."""
    return [
        row
        for row in finding.table.to_pylist()
        if all(row[name] == value for name, value in equal.items())
    ]
