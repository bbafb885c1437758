"""Surveys with made-up rows: whatever a test wants an analysis to find, or not to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifr_fast.survey.schema import (
    FORMAT,
    OFFSETS,
    PART,
    PROBLEMS,
    VERSION,
    Survey,
    heads_schema,
    predictions_schema,
)

Columns = dict[str, Any]


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
    metadata = {PROBLEMS: b"[]", PART: b"{}"}
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
    (path / "survey.json").write_text(json.dumps(manifest))
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
