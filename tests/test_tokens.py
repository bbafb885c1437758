"""Texts as token ids of any library, and objects that are refused as texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ifr_fast.tokens import encode


class StartsWithOne:
    """A tokenizer that puts a special token 1 in front."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(ord, text)]}


@pytest.mark.parametrize(
    "ids",
    [
        [np.int64(3), np.int64(5)],
        [np.uint8(3), 5],
        np.array([3, 5]),
        np.array([3, 5], dtype=np.uint16),
        np.array([3, 5], dtype=np.int32)[::1],
        np.array([5, 3])[::-1],
        (3, 5),
        [torch.tensor(3), torch.tensor(5)],
        torch.tensor([3, 5], dtype=torch.int16),
    ],
    ids=repr,
)
def test_token_ids_of_other_libraries(ids: Any) -> None:
    encoded = encode(ids, None, None)
    assert encoded.dtype == torch.int64
    assert encoded.tolist() == [3, 5]


@pytest.mark.parametrize(
    "text",
    [
        [3, 5.0],
        [3, np.float32(5)],
        [True, False],
        [np.bool_(True)],
        [3, "5"],
        [3, [5]],
        np.array([3.0, 5.0]),
        np.array([True, False]),
        np.array([[3, 5]]),
        np.array(3),
        np.array(["a", "b"]),
        [1 << 70],
    ],
    ids=repr,
)
def test_other_objects_are_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"text: (expected|token ids must)"):
        encode(text, None, None)


@pytest.mark.parametrize(
    "text", ["", [], (), np.array([], dtype=np.int64), torch.tensor([]).long()]
)
def test_empty_text_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="text: is empty; expected at least one token"):
        encode(text, StartsWithOne(), None)
    assert encode("a", StartsWithOne(), None).tolist() == [1, 97]
