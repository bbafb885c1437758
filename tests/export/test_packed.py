"""The packed document says what the plain one says, bit for bit."""

from __future__ import annotations

import base64
import dataclasses
import json
from importlib import resources
from typing import Any

import jsonschema
import numpy as np
import pytest
from hostile import trace
from hypothesis import given
from hypothesis import strategies as st

from ifr_fast.export.packed import _integers, to_packed_json
from ifr_fast.routes.route_graph import RouteGraph


def unpacked(column: Any) -> list[Any]:
    if isinstance(column, list):
        return column
    if "names" in column:
        return [column["names"][code] for code in unpacked(column["codes"])]
    if "values" in column:
        return np.repeat(unpacked(column["values"]), unpacked(column["lengths"])).tolist()
    little = np.dtype(column["type"]).newbyteorder("<")
    return np.frombuffer(base64.b64decode(column["base64"]), little).tolist()


def plain(document: dict[str, Any]) -> dict[str, Any]:
    for table in ("edges", "head_edges"):
        document[table] = {name: unpacked(column) for name, column in document[table].items()}
    for name in ("token_ids", "token_importance"):
        document[name] = unpacked(document[name])
    return document


def test_packed_is_plain(any_graph: RouteGraph) -> None:
    assert plain(json.loads(to_packed_json(any_graph))) == json.loads(any_graph.to_json())


def test_both_forms_follow_the_schema(any_graph: RouteGraph) -> None:
    text = resources.files("ifr_fast.export").joinpath("route_graph.schema.json").read_text()
    validator = jsonschema.Draft202012Validator(json.loads(text))
    validator.check_schema(json.loads(text))
    for document in (any_graph.to_json(), to_packed_json(any_graph)):
        validator.validate(json.loads(document))
    broken = json.loads(to_packed_json(any_graph))
    broken["edges"]["weight"] = {"type": "uint8", "base64": ""}
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(broken)


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3), max_size=40))
def test_columns_of_integers_are_exact(column: list[int]) -> None:
    repeated = [value for value in column for _ in range(value % 5)]
    for values in (column, sorted(column), repeated):
        assert unpacked(_integers(values)) == values


def test_packed_refuses_what_is_not_finite() -> None:
    graph = trace(False)
    weight = graph.edges.weight.clone()
    weight[0] = float("nan")
    broken = dataclasses.replace(graph, edges=graph.edges._replace(weight=weight))
    with pytest.raises(ValueError, match="JSON compliant"):
        to_packed_json(broken)


def test_packed_is_a_third(any_graph: RouteGraph) -> None:
    assert len(to_packed_json(any_graph)) < len(any_graph.to_json()) / 2.5
