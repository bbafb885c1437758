"""The contents of a survey's directory, and how they are read.

    survey.json                       model, options and status
    predictions/part-NNNNNN.parquet   one row per prediction: of position t + 1 at position t
    heads/part-NNNNNN.parquet         one row per document, layer and head
    checksums/part-NNNNNN.json        the record that completes a part: parts.py
    corpora.parquet                   one row per corpus: means of both; written at the end

A document is a text as the model read it; each piece of a text that was cut is a document. A part
is written whole or not at all; its tables are ignored without its record. Files are compared with
their checksums when they are first read. Numbers are float32 unless stated otherwise; lists are
layer-major.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..errors import FormatError
from ..storage.checksums import checksum_of_json, damaged, warn_unchecked
from .arrow import pa, pq
from .parts import Checked, part_path, whole_parts

FORMAT = "ifr_fast.survey"
VERSION = 2
UNCHECKED = 1  # the version without checksums, which is read as well
OFFSETS = 33  # entries of by_offset: 0 to 31, and all from 32 on
PROBLEMS = b"ifr_fast.problems"  # key of a part's metadata: JSON, the fields of its Problems

Array: TypeAlias = "np.ndarray[Any, Any]"


def floats(n: int) -> pa.DataType:
    """A list of n float32."""
    return pa.list_(pa.float32(), n)


def bits(n: int) -> pa.DataType:
    """A binary of n bits, little-endian: bit i is bit i % 8 of byte i // 8."""
    return pa.binary(-(-n // 8))


def predictions_schema(
    n_layers: int, n_heads: int, n_thresholds: int, labels: list[str]
) -> pa.Schema:
    """Columns of predictions/. Importances and `*_in_k` describe the prediction's `RouteGraph`,
    importances at the lowest threshold, `*_in_k` at threshold k.
    """
    L, H = n_layers, n_heads
    fields: list[tuple[str, pa.DataType]] = [
        ("document", pa.int64()),  # running number
        ("context", pa.string()),  # source ':' number in it, and '/' piece if it is cut
        ("corpus", pa.string()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("token", pa.string()),
        ("next_token_id", pa.int32()),
        ("next_token", pa.string()),
        *((f"label_{name}", pa.string()) for name in labels),  # label of the token at `position`
        ("logit", pa.float32()),  # logit of the actual next token
        ("probability", pa.float32()),  # probability of the actual next token
        ("head_importance", floats(L * H)),
        ("ffn_importance", floats(L)),
        ("residual_mid", floats(L)),  # share of resid_pre in resid_mid here; parallel block: NaN
        ("residual_post", floats(L)),  # share of resid_mid in resid_post; parallel: of resid_pre
    ]
    for k in range(n_thresholds):
        fields += [
            (f"head_in_{k}", bits(L * H)),
            (f"ffn_in_{k}", bits(L)),
            # Lowest layer at which an edge of the graph changes position; L if none does.
            (f"route_depth_{k}", pa.int16()),
        ]
    return pa.schema(fields)


def heads_schema() -> pa.Schema:
    """Columns of heads/: float32 sums over all targets of a document, for whatever prediction.

    "Edge mass" is a head's share in the attention edges above `keep` (the heads of an edge
    summed), as in `RouteGraph.head_edges`; an edge leads from a source to a target.
    """
    return pa.schema(
        [
            ("document", pa.int64()),
            ("corpus", pa.string()),
            ("layer", pa.int16()),
            ("head", pa.int16()),
            ("rows", pa.int32()),  # targets
            ("mass", pa.float32()),  # importance of the head, all sources
            ("edge_mass", pa.float32()),
            ("by_offset", floats(OFFSETS)),  # edge mass by target - source: 0 .. 31, and more
            ("first", pa.float32()),  # edge mass from position 0, into later ones
            ("punctuation", pa.float32()),  # edge mass from punctuation tokens, into later ones
            ("word_mass", pa.float32()),  # edge mass into later pieces of words
            ("same_word", pa.float32()),  # part of it from earlier pieces of the same word
            ("word_targets", pa.int32()),  # targets that are later pieces of words
            ("edges", pa.int32()),  # edges in which the head alone exceeds `keep`
        ]
    )


def corpora_schema(n_layers: int, n_heads: int, n_thresholds: int) -> pa.Schema:
    """Columns of corpora.parquet: float64 means over predictions, or targets for head masses."""
    L, H = n_layers, n_heads

    def means(n: int) -> pa.DataType:
        return pa.list_(pa.float64(), n)

    fields: list[tuple[str, pa.DataType]] = [
        ("corpus", pa.string()),
        ("documents", pa.int64()),
        ("predictions", pa.int64()),
        ("log_probability", pa.float64()),  # natural logarithm
        ("head_importance", means(L * H)),
        ("ffn_importance", means(L)),
        ("residual_mid", means(L)),
        ("residual_post", means(L)),
        ("head_mass", means(L * H)),
        ("head_edge_mass", means(L * H)),
    ]
    for k in range(n_thresholds):
        fields += [
            (f"head_frequency_{k}", means(L * H)),
            (f"ffn_frequency_{k}", means(L)),
            (f"route_depth_{k}", pa.float64()),
        ]
    return pa.schema(fields)


@dataclass(frozen=True)
class Problem:
    """A text that could not be surveyed, and the reason."""

    where: str  # the document's context, or the source
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


@dataclass(frozen=True)
class Table:
    """The parts of one table of a survey, read on demand."""

    paths: list[Path]
    schema: pa.Schema
    shapes: dict[str, tuple[int, ...]]  # shape of a row's entry, for arrays
    checked: Checked

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.schema.names)

    def __len__(self) -> int:
        return sum(self._open(path).metadata.num_rows for path in self.paths)

    def parts(self, *columns: str) -> Iterator[dict[str, Array]]:
        """Columns of each part (all of them if none is named) as numpy arrays of N rows.

        Lists are float arrays [N, ...], bits bool ones, strings objects (None where null):
        `head_importance` is [N, L, H]. Raises ValueError for an unknown column, and FormatError,
        with the path, for a broken or damaged part.
        """
        unknown = [name for name in columns if name not in self.schema.names]
        if unknown:
            raise ValueError(
                f"columns: there is no {unknown[0]!r}; there are {', '.join(self.columns)}"
            )
        names = list(columns) or self.columns
        for path in self.paths:
            yield self._read(path, names)

    def read(self, *columns: str) -> dict[str, Array]:
        """Columns of all parts together."""
        names = list(columns) or self.columns
        found = list(self.parts(*names))
        if not found:
            empty = self.schema.empty_table()
            return {name: self._array(name, empty.column(name)) for name in names}
        return {name: np.concatenate([part[name] for part in found]) for name in names}

    def _read(self, path: Path, names: list[str]) -> dict[str, Array]:
        file = self._open(path)
        if not file.schema_arrow.equals(self.schema):
            raise FormatError(f"{path}: has other columns than its survey")
        try:
            table = file.read(columns=names)
        except (OSError, pa.ArrowException) as error:
            raise FormatError(f"{path}: is broken ({first_line(error)})") from error
        return {name: self._array(name, table.column(name)) for name in names}

    def _open(self, path: Path) -> pq.ParquetFile:
        self.checked.check(path)
        return _parquet(path)

    def _array(self, name: str, column: pa.ChunkedArray) -> Array:
        kind = column.type
        chunk = column.combine_chunks()
        if isinstance(chunk, pa.ChunkedArray):  # more than one chunk, or none
            chunk = chunk.chunk(0) if chunk.num_chunks else pa.array([], kind)
        n, shape = len(chunk), self.shapes.get(name)
        if pa.types.is_fixed_size_list(kind):
            assert shape is not None
            return chunk.flatten().to_numpy(zero_copy_only=False).reshape(n, *shape)
        if pa.types.is_fixed_size_binary(kind):
            assert shape is not None
            width = kind.byte_width
            raw = np.frombuffer(chunk.buffers()[1] or b"", np.uint8)
            rows = raw[chunk.offset * width : (chunk.offset + n) * width].reshape(n, width)
            some = int(np.prod(shape))
            unpacked = np.unpackbits(rows, axis=1, count=some, bitorder="little")
            return unpacked.astype(bool).reshape(n, *shape)
        return chunk.to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class Survey:
    """A survey's directory, open for reading."""

    path: Path
    model: dict[str, Any]  # name, fingerprint, n_layers, n_heads
    thresholds: list[float]  # ascending
    keep: float  # threshold of the edges in heads/: the lowest one
    labels: list[str]
    complete: bool  # False during a run, or after an interruption
    manifest: dict[str, Any]  # all of survey.json
    checked: Checked = field(repr=False)

    @staticmethod
    def open(directory: str | os.PathLike[str]) -> Survey:
        """Opens a survey. Raises FormatError if there is none, or one of another version."""
        path = Path(directory)
        manifest = read_manifest(path)
        try:
            return Survey(
                path,
                dict(manifest["model"]),
                [float(x) for x in manifest["thresholds"]],
                float(manifest["keep"]),
                [str(x) for x in manifest["labels"]],
                bool(manifest["complete"]),
                manifest,
                Checked(path, _sums(path, manifest)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{path / 'survey.json'}: not a whole {FORMAT} manifest ({error!r})"
            ) from error

    @property
    def n_layers(self) -> int:
        """Decoder layers, L."""
        return int(self.model["n_layers"])

    @property
    def n_heads(self) -> int:
        """Attention heads a layer, H."""
        return int(self.model["n_heads"])

    @property
    def part_numbers(self) -> list[int]:
        """Numbers of the complete parts, ascending.

        Raises FormatError where a complete survey lacks one.
        """
        found = whole_parts(self.path, recorded=self.manifest["version"] != UNCHECKED)
        missing = set(range(self.manifest.get("parts", 0))).difference(found)
        if missing:
            path = part_path(self.path, "predictions", min(missing))
            raise FormatError(f"{path}: is missing, or its record; resume the survey")
        return found

    @property
    def predictions(self) -> Table:
        """One row per prediction (`predictions_schema`)."""
        L, H, K = self.n_layers, self.n_heads, len(self.thresholds)
        return self._table("predictions", predictions_schema(L, H, K, self.labels))

    @property
    def heads(self) -> Table:
        """One row per document, layer and head (`heads_schema`)."""
        return self._table("heads", heads_schema())

    @property
    def corpora(self) -> Table:
        """One row per corpus (`corpora_schema`). Raises FormatError for an incomplete survey."""
        path = self.path / "corpora.parquet"
        if not path.is_file():
            raise FormatError(f"{path}: no such file; the survey is not complete, resume it")
        L, H, K = self.n_layers, self.n_heads, len(self.thresholds)
        return Table([path], corpora_schema(L, H, K), self._shapes(), self.checked)

    @property
    def problems(self) -> list[Problem]:
        """Texts that could not be surveyed, in the order of the input."""
        found = []
        for part in self.part_numbers:
            path = part_path(self.path, "predictions", part)
            self.checked.check(path)
            found += [Problem(**fields) for fields in metadata_of(path, PROBLEMS)]
        return found

    def _table(self, name: str, schema: pa.Schema) -> Table:
        paths = [part_path(self.path, name, part) for part in self.part_numbers]
        return Table(paths, schema, self._shapes(), self.checked)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        L, H = self.n_layers, self.n_heads
        shapes: dict[str, tuple[int, ...]] = {
            "ffn_importance": (L,),
            "residual_mid": (L,),
            "residual_post": (L,),
            "by_offset": (OFFSETS,),
        }
        for name in ("head_importance", "head_mass", "head_edge_mass"):
            shapes[name] = (L, H)
        for k in range(len(self.thresholds)):
            shapes |= {f"head_in_{k}": (L, H), f"head_frequency_{k}": (L, H)}
            shapes |= {f"ffn_in_{k}": (L,), f"ffn_frequency_{k}": (L,)}
        return shapes


def _sums(directory: Path, manifest: dict[str, Any]) -> dict[Path, str] | None:
    """The checksums of files that are not parts; None in the version without checksums."""
    if manifest["version"] == UNCHECKED:
        return None
    return {directory / name: str(of) for name, of in manifest.get("sums", {}).items()}


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads survey.json. A warning says where its version has no checksums.

    Raises FormatError if it is missing, damaged, or of another version.
    """
    path = directory / "survey.json"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file; expected a survey's directory") from error
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FormatError(f"{path}: not a manifest of format {FORMAT!r}")
    version, found = manifest.get("version"), manifest.pop("checksum", None)
    if version not in (UNCHECKED, VERSION):
        raise FormatError(
            f"{path}: {FORMAT} has version {version}, this ifr_fast reads versions {UNCHECKED} to "
            f"{VERSION}"
        )
    if version == UNCHECKED and found is None:
        warn_unchecked(path, version)
    elif version == UNCHECKED or found != checksum_of_json(manifest):
        raise damaged(path, "its content")
    return manifest


def metadata_of(path: Path, key: bytes) -> Any:
    """Reads a JSON entry of a part's metadata. Raises FormatError for a broken part."""
    metadata = _parquet(path).schema_arrow.metadata or {}
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError) as error:
        raise FormatError(f"{path}: is not a part of a survey ({error!r})") from error


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"{path}: is broken ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """First line of an error's message; its type if there is none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
