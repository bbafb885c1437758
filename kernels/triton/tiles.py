"""Tile sizes, warps and stages of the kernels, for sweeps on a GPU to set."""

from __future__ import annotations

from typing import NamedTuple

from triton.runtime import driver

from .common import INTERPRETED

FEW_ROWS = 64  # so many rows or fewer may be a frontier, where tiles are narrower
CANDIDATES = 64  # coordinates of a line that its light pairs are corrected at, at most
NEAREST = 512  # coordinates of a row that candidates are chosen from
FOLD = 1024  # keys of a tile in sums over heads
SHARES = 8  # programs that share out the heavy pairs of a block of rows and a head
PROGRAMS = 512  # programs that keep a GPU busy


class Linear(NamedTuple):
    """Tiles of the linear pass, as large as registers and shared memory hold without spilling."""

    BT: int  # rows
    BS: int  # keys
    num_warps: int
    num_stages: int


FEW = Linear(16, 64, 4, 2)
SMALL = Linear(32, 64, 4, 2)
FLOAT32 = Linear(32, 32, 4, 1)
LARGE = {  # by architecture, as Triton names it
    80: Linear(32, 128, 8, 2),
    90: Linear(64, 64, 8, 1),
    100: Linear(64, 64, 8, 1),
    103: Linear(64, 64, 8, 1),
    "gfx942": Linear(64, 64, 8, 1),
    "gfx950": Linear(64, 64, 8, 1),
}


class Heavy(NamedTuple):
    """Tiles of the correction of heavy pairs."""

    BT: int  # rows
    BP: int  # pairs
    BD: int  # coordinates
    num_warps: int
    num_stages: int


HEAVY_FEW = Heavy(16, 16, 64, 4, 2)
HEAVY_FLOAT32 = Heavy(64, 64, 64, 8, 2)
HEAVY = Heavy(32, 128, 64, 8, 2)  # with 64 rows, Triton 3.6 spills at V = 128 on sm_90


class Light(NamedTuple):
    """Tiles of the correction of light pairs."""

    BP: int  # pairs
    num_warps: int
    num_stages: int


LIGHT = Light(16, 4, 3)


def is_few(n_rows: int, n_keys: int) -> bool:
    """True if rows are few beside their keys: all rows that are scored, so that results do not
    depend on how many a block has room for.
    """
    return n_rows <= FEW_ROWS and n_keys >= 4 * n_rows


def linear(few: bool, wide: bool) -> Linear:
    """Tiles of the linear pass on the GPU at hand; wide: operands are float32."""
    if few:
        return FEW
    if wide:
        return FLOAT32
    arch = None if INTERPRETED else driver.active.get_current_target().arch
    return LARGE.get(arch, SMALL)


def heavy(few: bool, wide: bool) -> Heavy:
    """Tiles of the correction of heavy pairs."""
    if few:
        return HEAVY_FEW
    return HEAVY_FLOAT32 if wide else HEAVY
