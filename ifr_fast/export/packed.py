"""The JSON document of a graph with its tables packed: a third of the size, and quick to read.

The keys are those of `to_json`. A column that is a list there is here one of

    {"type": "uint8" | "uint16" | "uint32" | "float32", "base64": B}   little-endian numbers
    {"values": column, "lengths": column}                              runs of equal values

and the column of the edges' kinds is {"names": [...], "codes": column}. Nothing is rounded: weights
stay float32. `route_graph.schema.json` beside this module describes both forms.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .json import document

if TYPE_CHECKING:
    from ..graph.data import GraphData

_INTEGERS = (np.uint8, np.uint16, np.uint32)


def to_packed_json(graph: GraphData) -> str:
    """The packed document. Raises ValueError for a weight or probability that is not finite."""
    found = document(graph)
    for table in ("edges", "head_edges"):
        found[table] = {name: _column(name, column) for name, column in found[table].items()}
    found["token_ids"] = _integers(found["token_ids"])
    found["token_importance"] = _weights(found["token_importance"])
    return json.dumps(found, allow_nan=False, separators=(",", ":"))


def _column(name: str, column: list[Any]) -> dict[str, Any]:
    if name == "weight":
        return _weights(column)
    if name == "kind":
        names = sorted(set(column))
        place = {kind: i for i, kind in enumerate(names)}
        return {"names": names, "codes": _integers([place[kind] for kind in column])}
    return _integers(column)


def _weights(column: list[float]) -> dict[str, Any]:
    array = np.asarray(column, dtype=np.float32)
    if not np.isfinite(array).all():
        raise ValueError("weights that are not finite are not JSON compliant")
    return _numbers(array)


def _integers(column: list[int]) -> dict[str, Any]:
    """Numbers of the smallest type that holds them, or runs where these are shorter."""
    array = np.asarray(column, dtype=np.int64)
    plain = _smallest(array)
    starts = np.flatnonzero(np.diff(array, prepend=array[:1] - 1))
    if len(starts) * 3 > len(array):
        return _numbers(plain)
    values = _smallest(array[starts])
    lengths = _smallest(np.diff(starts, append=len(array)))
    if values.nbytes + lengths.nbytes >= plain.nbytes:
        return _numbers(plain)
    return {"values": _numbers(values), "lengths": _numbers(lengths)}


def _smallest(array: NDArray[np.int64]) -> NDArray[Any]:
    most = int(array.max(initial=0))
    return array.astype(next(t for t in _INTEGERS if most <= np.iinfo(t).max))


def _numbers(array: NDArray[Any]) -> dict[str, Any]:
    little = array.astype(array.dtype.newbyteorder("<"))
    return {"type": array.dtype.name, "base64": base64.b64encode(little.tobytes()).decode("ascii")}
