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


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters that a caller can give."""
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def refusal(name: str, call: Callable[[], Any]) -> str | None:
    """None where a call answers, or refuses with an error that names a parameter; else what it
    raised.
    """
    try:
        result = call()
        if isinstance(result, Iterator):
            list(islice(result, 3))
    except (IfrError, TypeError, ValueError) as error:
        if name in str(error).replace("-", "_"):
            return None
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
