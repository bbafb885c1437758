"""Values that fit hardly any parameter, and calls that give them to each in turn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from ifr_fast import IfrError


def bad_values() -> dict[str, Any]:
    return {
        "None": None,
        "True": True,
        "text": "x",
        "empty text": "",
        "NUL": "a\0b",
        "surrogate": "a\ud800",
        "number as text": "0.1",
        "bytes": b"x",
        "nan": float("nan"),
        "inf": float("inf"),
        "-inf": float("-inf"),
        "huge": 10**30,
        "2**63": 1 << 63,
        "2**62": 1 << 62,
        "-huge": -(10**30),
        "1e308": 1e308,
        "-1": -1,
        "0": 0,
        "-5": -5,
        "1.5": 1.5,
        "complex": 1j,
        "empty list": [],
        "empty dict": {},
        "dict": {0: 1},
        "set": {0},
        "list of None": [None],
        "list of text": ["x"],
        "list of bools": [True],
        "list of nan": [float("nan")],
        "list of huge": [10**30],
        "two huge": [1e308, 1e308],
        "list of lists": [[0]],
        "object": object(),
        "type": int,
        "empty tensor": torch.tensor([]),
        "bool tensor": torch.tensor([True, False]),
        "complex tensor": torch.tensor([1j, 2j]),
        "nan tensor": torch.tensor([float("nan")]),
        "square": torch.zeros(2, 2, dtype=torch.int64),
        "meta": torch.zeros(3, dtype=torch.int64, device="meta"),
        "sparse": torch.zeros(3, dtype=torch.int64).to_sparse(),
        "numpy text": np.array(["x", "y"]),
        "numpy objects": np.array([None, 1], dtype=object),
        "slice of text": slice("a", None),
        "slice of step 0": slice(None, None, 0),
    }


# Names that a message may use, for what is within an argument.
_OTHER_NAMES = {"prompt": ["text"], "sentences": ["text"], "model": ["cfg"]}


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters that a caller can give."""
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def refused_otherwise(
    function: Callable[..., Any], given: dict[str, Any], name: str, value: Any
) -> str | None:
    """None where a call with `value` answers, or refuses it with an error that names the parameter
    or the path; else what it raised.
    """
    others = {k: v for k, v in given.items() if k in parameters(function)}
    try:
        result = function(**{**others, name: value})
        if isinstance(result, Iterator):
            list(islice(result, 1))
    except (IfrError, TypeError, ValueError) as error:
        words = {name, *_OTHER_NAMES.get(name, ())}
        known = isinstance(error, IfrError) and str(error).startswith(f"{value}: ")
        if known or any(word in str(error) for word in words):
            return None
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
