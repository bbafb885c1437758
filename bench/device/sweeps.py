"""Tile sizes, stages and room, one change at a time: the kernel's time, and all kernels'."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
from device.common import KEEP, Check
from device.layer import random_layer

from ifr_fast.kernels.triton import kernel, room, tiles
from ifr_fast.kernels.triton.tiles import Heavy, Light, Linear

Change = tuple[str, str, Any, str, Any]  # kernel, what, owner, its attribute, value


def changes(stand_in: bool) -> list[Change]:
    """The changes, those that promise most first."""
    found: list[Change] = [("", "as it is", tiles, "FOLD", tiles.FOLD)]
    for of in (Light(16, 4, 1), Light(32, 4, 1), Light(16, 2, 3), Light(32, 4, 3), Light(64, 4, 1)):
        found.append(("light", str(tuple(of)), tiles, "LIGHT", of))
    for tile in (
        Heavy(64, 64, 64, 4, 2), Heavy(32, 128, 64, 8, 1), Heavy(32, 128, 64, 8, 3),
        Heavy(32, 128, 32, 8, 3), Heavy(64, 64, 128, 8, 1), Heavy(32, 128, 128, 8, 2),
    ):  # fmt: skip
        found.append(("heavy", str(tuple(tile)), tiles, "HEAVY", tile))
    for linear in (
        Linear(64, 64, 4, 1), Linear(64, 64, 8, 2), Linear(64, 128, 8, 1), Linear(128, 64, 8, 1),
        Linear(32, 128, 8, 2),
    ):  # fmt: skip
        found.append(("linear", str(tuple(linear)), tiles, "LARGE", dict.fromkeys([90], linear)))
    for n in (32, 128):
        found.append(("", f"{n} candidates", tiles, "CANDIDATES", n))
    for n in (31, 33, 34):
        found.append(("", f"{2 ** (n - 30)} GiB", room, "MOST_BYTES", 1 << n))
    return found[:3] if stand_in else found


def run(check: Check) -> None:
    """Appends each change's times; one that does not compile or fit is said to fail."""
    T = 24 if check.stand_in else 8192
    inputs = random_layer(check.model, T, T, check.device, torch.bfloat16)
    job = partial(kernel.score_attention, inputs, KEEP)
    for name, what, owner, attribute, value in changes(check.stand_in):
        with mock.patch.object(owner, attribute, value):
            line = {"kernel": name, "what": what}
            try:
                ms = check.of_kernels(job, 5)
            except Exception as error:
                check.found(kind="sweep", **line, failed=f"{type(error).__name__}: {error}"[:120])
                continue
            own = ms.get(f"{name}_kernel")
            check.found(kind="sweep", **line, ms=own, all_kernels=sum(ms.values()), each=ms)
