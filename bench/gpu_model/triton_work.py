"""The work that each launch of the Triton kernels asks for, from shapes, tiles and list lengths.

`launching` has the driver (kernels/triton/kernel.py) launch its kernels on tensors that have shapes
and no data, and keeps each launch's grid and arguments instead of running it, so that tiles are
the driver's own. `asked` is a launch's work by its kernel's formula; products, loads and stores
agree exactly with the counts of Triton's interpreter (tests/bench/test_gpu_model.py).

The formulas hold for models without value_gate, row_scale, window, sinks or ALiBi, and sequential
blocks. In them b is the bytes of an element of the model's dtype, `rows` the rows' positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from ifr_fast.kernels.contract import LayerInputs
from ifr_fast.kernels.triton import (
    compact,
    correct,
    kernel,
    linear,
    lists,
    prepare,
    proximity,
    reach,
    tiles,
)
from ifr_fast.kernels.triton.common import CANDIDATES, HEAVY, LIGHT, WORD
from ifr_fast.kernels.triton.launch import Records, blocks
from ifr_fast.kernels.triton.launch import launch as run_launch
from ifr_fast.kernels.triton.records import Rows

MODULES = (prepare, reach, linear, lists, correct, proximity, compact)
SECTOR = 32  # bytes of device memory that an element by itself takes


class Lists(NamedTuple):
    """Lengths of one block's lists, which depend on the data; a line is a (row, head)."""

    near: float = 0  # coordinates of all rows that are nearest
    candidates: float = 0  # of all lines
    light: float = 0  # pairs
    light_lines: float = 0  # lines with any
    light_tiles: float = 0  # of BP pairs of a line
    light_candidates: float = 0  # of lines with light pairs
    heavy: float = 0  # pairs
    heavy_tiles: float = 0  # of BP pairs, of BT rows and a head
    steps: float = 0  # most light marks, and most heavy ones, in a word of BL lines and BW words
    edges: float = 0
    edge_tiles: float = 0  # of BE edges of a row
    listed_edges: float = 0  # (edge, head) whose pair is light or heavy


class Launch(NamedTuple):
    """A kernel, its grid, its arguments, and the positions of its rows (none: of a layer)."""

    kernel: str
    grid: tuple[int, ...]
    names: dict[str, Any]
    rows: np.ndarray


class Asked(NamedTuple):
    """Work of all programs of a launch."""

    products: float = 0  # multiply-adds on matrix units, the padding of tiles included
    loaded: float = 0  # bytes, once for every program that wants them
    stored: float = 0  # bytes
    vector: float = 0  # operations on vector units, one a lane, as written: none fused or shared
    masks: float = 0  # those for operands' masks and addresses: needed once for 16 bytes
    special: float = 0  # exponentials, square roots, quotients
    read: float = 0  # bytes from device memory, once a launch
    written: float = 0  # bytes to device memory


Block = list[Launch]  # the launches of one block of rows, or those that a layer has once


def blocks_of(
    inputs: LayerInputs, keep: float, arch: int | str, visit: Callable[[Block], None]
) -> None:
    """Visits the launches that one layer takes, on a GPU of an architecture as Triton names it.
    inputs: floating tensors on the meta device.
    """
    block: Block = []

    def note(launch: Launch) -> None:
        if block and not np.array_equal(block[-1].rows, launch.rows):
            visit(block.copy())
            block.clear()
        block.append(launch)

    target = SimpleNamespace(arch=arch)
    at_hand = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))
    with launching(inputs, note, run=False), mock.patch.object(tiles, "driver", at_hand):
        kernel.score_attention(inputs, keep)
        kernel.score_ffn(inputs.resid_pre, inputs.y)
    visit(block)


@contextmanager
def launching(
    inputs: LayerInputs, note: Callable[[Launch], None], *, run: bool = True
) -> Iterator[None]:
    """Notes every launch within: after it has run, or instead of running it."""

    def launch(of: Any, grid: tuple[int, ...], records: Records, **tiles: Any) -> None:
        if run:
            run_launch(of, grid, records, **tiles)
        rows, names = inputs.rows[:0], {}
        for record in records:
            names |= record._asdict()
            if isinstance(record, Rows):  # a slice of all rows
                start = record.rows.storage_offset() - inputs.rows.storage_offset() * run
                rows = inputs.rows[start : start + record.R]
        note(Launch(of.__name__, grid, names | tiles, rows.numpy()))

    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "launch", launch))
        yield


def asked(launch: Launch, of: Lists) -> Asked:
    """A launch's work."""
    return FORMULAS[launch.kernel](_Arguments(launch), of)


class _Arguments:
    """A launch's arguments as attributes, and figures that several formulas share."""

    def __init__(self, launch: Launch) -> None:
        self.__dict__.update(launch.names)
        self.grid, self.rows = launch.grid, launch.rows.astype(np.int64)
        some = launch.names["w" if "w" in launch.names else "post"]
        self.b = some.element_size()
        self.WIDE = some.dtype == torch.float32
        self.HALVED = launch.names.get("v_scale") is not None
        self.SUMMED = launch.names.get("log_sum_exp") is not None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the launch has no argument {name}")

    @property
    def row_tiles(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of rows in each tile of BT rows, and the position of the last."""
        starts = np.arange(0, self.R, self.BT)
        stops = np.minimum(starts + self.BT, self.R)
        return stops - starts, self.rows[stops - 1]

    @property
    def g_bytes(self) -> int:
        """Bytes of g of a line."""
        return self.HALVES * self.V * (4 if self.WIDE else 2)

    @property
    def line_bytes(self) -> int:
        """Bytes of q and g of a line."""
        return self.K * self.b + self.g_bytes

    @property
    def key_bytes(self) -> int:
        """Bytes of k and v of a key and KV head."""
        return (self.K + self.V) * self.b

    @property
    def weight_bytes(self) -> int:
        """Bytes of W_O."""
        return self.H * self.D * self.V * self.b

    @property
    def n_keys_seen(self) -> int:
        return int(self.rows[-1]) + 1


def column_norms(x: _Arguments, of: Lists) -> Asked:
    out = 4 * x.H * (2 * x.D + 1)
    return Asked(
        loaded=x.weight_bytes,
        stored=out,
        vector=6.3 * x.grid[0] * blocks(x.D, x.BD) * x.BD * x.BV,
        special=3 * x.grid[0] * blocks(x.D, x.BD) * x.BD,
        read=x.weight_bytes,
        written=out,
    )


def spread(x: _Arguments, of: Lists) -> Asked:
    return Asked(
        loaded=4 * x.H * (x.grid[0] + x.D),
        stored=4 * x.D,
        vector=7 * x.grid[0] * x.BD * x.BH,
        read=4 * x.H * x.D,
        written=4 * x.D,
    )


def value_norms(x: _Arguments, of: Lists) -> Asked:
    size = x.S * x.H_kv * x.V * x.b
    return Asked(
        loaded=size,
        stored=4 * x.S * x.H_kv * (1 + x.HALVED),
        vector=(6.3 + x.HALVED) * x.grid[0] * x.grid[1] * x.BS * x.BV,
        special=x.grid[0] * x.grid[1] * x.BS,
        read=size,
        written=4 * x.S * x.H_kv * (1 + x.HALVED),
    )


def half_values(x: _Arguments, of: Lists) -> Asked:
    size = x.S * x.H_kv * x.V
    programs = x.grid[0] * x.grid[1]
    return Asked(
        loaded=x.b * size + 4 * programs,
        stored=2 * size + 4 * programs,
        vector=6.1 * programs * x.BS * x.BV,
        read=x.b * size,
        written=2 * size,
    )


def values_reach(x: _Arguments, of: Lists) -> Asked:
    programs, chunks = x.grid[0] * x.grid[1], blocks(x.D, x.BD)
    out = 4 * x.S * x.H
    return Asked(
        products=programs * chunks * x.BS * x.BD * x.BV,
        loaded=x.S * x.H * x.V * x.b + x.grid[0] * (x.weight_bytes + 4 * x.H * x.D),
        stored=out,
        vector=programs * chunks * x.BS * x.BD * 3,
        masks=1.3 * programs * (chunks * x.BD + x.BS) * x.BV,
        read=x.S * x.H_kv * x.V * x.b + x.weight_bytes + 4 * x.H * x.D,
        written=out,
    )


def value_space_signs(x: _Arguments, of: Lists) -> Asked:
    programs, chunks = x.grid[0] * x.grid[1], blocks(x.D, x.BD)
    out = x.R * x.H * (x.g_bytes + 4)
    return Asked(
        products=programs * chunks * x.BT * x.BD * x.BV,
        loaded=x.H * x.R * x.D * x.b + x.grid[0] * x.weight_bytes,
        stored=out,
        vector=programs * x.BT * (6.2 * chunks * x.BD + (2.4 + 3 * x.HALVES) * x.BV),
        masks=1.9 * programs * chunks * x.BD * x.BV,
        special=programs * x.BT * x.BV,
        read=x.R * x.D * x.b + x.weight_bytes,
        written=out,
    )


def nearest(x: _Arguments, of: Lists) -> Asked:
    out = x.R * (8 * x.M + 4)
    searched = x.D > x.M
    return Asked(
        loaded=x.R * x.D * x.b + searched * x.grid[0] * 4 * x.D,
        stored=out,
        vector=x.grid[0] * x.BT * (x.BD * (6.7 + 21.3 * searched) + 4 * x.M),
        read=x.R * x.D * x.b,
        written=out,
    )


def breakpoints(x: _Arguments, of: Lists) -> Asked:
    sums = 4 * x.R * x.H * x.SUMMED
    out = 4 * of.candidates + 12 * x.R * x.H + sums
    programs, searched = x.grid[0] * x.grid[1], x.D > x.N
    ends = x.D > x.M
    return Asked(
        loaded=programs * x.M * 8 + 4 * x.H * of.near + ends * 4 * (programs + x.R * x.H) + sums,
        stored=out,
        vector=programs * x.BH * x.M * (10 + 18 * searched),
        read=x.R * x.M * 8 + 4 * x.H * x.D + sums,
        written=out,
    )


def log_sum_exp(x: _Arguments, of: Lists) -> Asked:
    rows, last = x.row_tiles
    tiles = x.H * int((last // x.BS + 1).sum())
    keys = x.H * int(np.minimum((last // x.BS + 1) * x.BS, x.S).sum())
    programs = len(rows) * x.H * x.n_splits
    out = 8 * x.n_splits * x.R * x.H
    return Asked(
        products=tiles * x.BT * x.BS * x.BK,
        loaded=x.H * x.n_splits * x.R * (8 + x.K * x.b) + 8 * programs + keys * x.K * x.b,
        stored=out,
        vector=8.5 * tiles * x.BS * x.BT,
        masks=2.2 * tiles * x.BS * x.BK + 2.9 * programs * x.BT * x.BK,
        special=tiles * x.BT * (x.BS + 1),
        read=x.R * x.H * x.K * x.b + x.n_keys_seen * x.H_kv * x.K * x.b,
        written=out,
    )


def combine(x: _Arguments, of: Lists) -> Asked:
    size = 4 * x.R * x.H
    return Asked(
        loaded=2 * x.n_splits * size,
        stored=size,
        vector=8 * x.n_splits * x.grid[0] * x.BL,
        special=2 * x.n_splits * x.grid[0] * x.BL,
        read=2 * x.n_splits * size,
        written=size,
    )


def linear_pass(x: _Arguments, of: Lists) -> Asked:
    rows, last = x.row_tiles
    seen = last // x.BS + 1  # tiles of keys
    partly = int((seen - (x.rows[:: x.BT] + 1) // x.BS).sum())  # tiles with a key that a row misses
    tiles, lines = int(seen.sum()), x.H * int((seen * rows).sum())
    keys = int(np.minimum(seen * x.BS, x.S).sum())
    words = int((rows * np.minimum(seen * (x.BS // WORD.value), x.n_words)).sum())
    listed = of.light + of.heavy
    out = 4 * lines + 8 * x.H * words + 4 * WORD.value * words + 4 * lines
    bounds = x.H if x.REACH else x.H_kv
    return Asked(
        products=tiles * x.H * x.BT * x.BS * (x.BK + x.HALVES * x.BV),
        loaded=8 * x.grid[1] * (x.R + x.grid[0])
        + keys * (x.H_kv * x.key_bytes + x.H * 4)
        + 4 * x.HALVED * tiles * x.H_kv
        + lines * (x.line_bytes + 24),
        stored=out + 4 * listed,
        vector=(22 * tiles + 4 * partly) * x.H * x.BT * x.BS,
        masks=tiles
        * (
            (1.5 * (x.BT + x.BS) + 0.9 * x.H_kv * x.BS) * (x.BK + x.BV)
            + 0.5 * x.H * x.BT * (x.BK + 2 * x.BV)
        ),
        special=tiles * x.H * x.BT * x.BS,
        read=x.R * x.H * (x.line_bytes + 16) + x.n_keys_seen * (x.H_kv * x.key_bytes + 4 * bounds),
        written=out + SECTOR * listed,
    )


def lists_of_marks(x: _Arguments, of: Lists) -> Asked:
    words = 2 * x.H * int((x.rows // WORD.value + 1).sum())
    last = np.repeat(x.rows, x.H)[x.BL - 1 :: x.BL]  # of each program but a last one cut short
    chunks = 2 * int((np.append(last, x.rows[-1])[: x.grid[0]] // WORD.value // x.BW + 1).sum())
    out = 4 * (of.light + of.heavy) + 8 * x.R * x.H
    return Asked(
        loaded=16 * x.R * x.H + 4 * words,
        stored=out,
        vector=x.BL * x.BW * (25.7 * chunks + 14 * of.steps),
        read=4 * words,
        written=out,
    )


def light(x: _Arguments, of: Lists) -> Asked:
    lines = of.light_lines * (8 + x.g_bytes)
    values = x.V * x.b
    candidates = of.light_candidates * (4 + x.b + values)
    return Asked(
        products=of.light_tiles * x.BP * x.N * x.BV,
        loaded=4 * x.R * x.H + lines + of.light * (8 + values) + candidates,
        stored=4 * of.light,
        vector=of.light_tiles * x.BP * (4.9 * x.BV + 7.5 * x.N),
        masks=3.4 * of.light_lines * x.N * x.BV,
        read=4 * x.R * x.H + lines + (4 + SECTOR) * of.light
        + min(of.light, x.n_keys_seen * x.H_kv) * values
        + min(of.light_candidates * values, x.weight_bytes) + x.R * x.D * x.b,
        written=SECTOR * of.light,
    )  # fmt: skip


def heavy(x: _Arguments, of: Lists) -> Asked:
    values = x.V * x.b
    return Asked(
        products=of.heavy_tiles * blocks(x.D, x.BD) * x.BP * x.BD * x.BV,
        loaded=4 * x.H * x.grid[2] * x.R + of.heavy * (8 + x.g_bytes + values)
        + of.heavy_tiles * (4 * x.BP + x.D * values) + of.heavy * x.D * x.b,
        stored=4 * of.heavy,
        vector=of.heavy_tiles * x.BP * (9 * x.D + 6 * x.BT + 7 * x.BV),
        masks=(3.4 * of.heavy_tiles * x.D + 1.5 * math.prod(x.grid) * x.BD) * x.BV,
        read=4 * x.H * x.R + (4 + SECTOR) * of.heavy + x.R * x.H * x.g_bytes
        + min(of.heavy, x.n_keys_seen * x.H_kv) * values + x.weight_bytes + x.R * x.D * x.b,
        written=SECTOR * of.heavy,
    )  # fmt: skip


def parts(x: _Arguments, of: Lists) -> Asked:
    return _sums(x, 11, 4)


def ffn(x: _Arguments, of: Lists) -> Asked:
    return _sums(x, 14, 9)


def _sums(x: _Arguments, operations: int, out: int) -> Asked:
    size = 2 * x.R * x.D * x.b
    return Asked(
        loaded=size,
        stored=out * x.R,
        vector=operations * x.R * blocks(x.D, x.BD) * x.BD,
        read=size,
        written=out * x.R,
    )


def fold(x: _Arguments, of: Lists) -> Asked:
    listed = of.light + of.heavy
    keys = int((x.rows + 1).sum())
    tiles = int((x.rows // x.BS + 1).sum())
    programs = int((x.rows // x.BF + 1).sum())
    words = int((x.rows // WORD.value + 1).sum())
    return Asked(
        loaded=8 * x.R * x.grid[1] + 4 * keys + 8 * x.H * words + 4 * listed + 4 * x.H * tiles,
        stored=4 * x.H * programs + 4 * keys,
        vector=programs * x.BF * (6.1 * x.H + 8.3),
        read=4 * keys + x.H * keys / 4 + SECTOR * listed + 4 * x.H * tiles,
        written=4 * x.H * programs + 4 * keys,
    )


def totals(x: _Arguments, of: Lists) -> Asked:
    folded = 4 * x.H * int((x.rows // x.BF + 1).sum())
    lin = 4 * x.H * int((x.rows // x.BS + 1).sum())
    out = x.R * (4 * x.H + 13)
    return Asked(
        loaded=12 * x.R + folded + lin,
        stored=out,
        vector=(folded + lin) / 4 + 9 * x.R * x.BH,
        special=x.R * x.BH,
        read=12 * x.R + folded + lin,
        written=out,
    )


def edges(x: _Arguments, of: Lists) -> Asked:
    keys = int((x.rows + 1).sum())
    padded = x.BF * int((x.rows // x.BF + 1).sum())
    return Asked(
        loaded=13 * x.R + 4 * keys,
        stored=12 * of.edges + 4 * x.R,
        vector=16 * padded,
        special=padded,
        read=13 * x.R + 4 * keys,
        written=12 * of.edges + 4 * x.R,
    )


def head_weights(x: _Arguments, of: Lists) -> Asked:
    size = of.edges * (8 + x.H_kv * x.key_bytes + 8 * x.H) + 4 * of.listed_edges
    lines = of.edge_tiles * (13 + x.H * (x.line_bytes + 8))
    return Asked(
        loaded=4 * x.grid[0] * x.grid[1] + lines + size,
        stored=4 * of.edges * x.H,
        vector=of.edge_tiles * x.H * x.BE * (4.2 * x.BK + 4.4 * x.BV + 26),
        special=2 * of.edge_tiles * x.H * x.BE,
        read=4 * x.R + lines + of.edges * (8 + x.H_kv * x.key_bytes)
        + SECTOR * (2 * of.edges * x.H + of.listed_edges),
        written=4 * of.edges * x.H,
    )  # fmt: skip


FORMULAS: dict[str, Callable[[_Arguments, Lists], Asked]] = {
    "column_norms_kernel": column_norms,
    "spread_kernel": spread,
    "value_norms_kernel": value_norms,
    "half_values_kernel": half_values,
    "reach_kernel": values_reach,
    "value_space_signs_kernel": value_space_signs,
    "nearest_kernel": nearest,
    "breakpoints_kernel": breakpoints,
    "log_sum_exp_kernel": log_sum_exp,
    "combine_kernel": combine,
    "linear_kernel": linear_pass,
    "lists_kernel": lists_of_marks,
    "light_kernel": light,
    "heavy_kernel": heavy,
    "parts_kernel": parts,
    "ffn_kernel": ffn,
    "fold_kernel": fold,
    "totals_kernel": totals,
    "edges_kernel": edges,
    "head_weights_kernel": head_weights,
}


def lengths(block: Block) -> Lists:
    """The lists of a block that has run."""
    of = {launch.kernel: launch.names for launch in block}
    x = of["head_weights_kernel"]
    counts = x["counts"].cpu().numpy()
    candidates, light, heavy = (counts[i.value] for i in (CANDIDATES, LIGHT, HEAVY))  # [R, H]
    tile = of["heavy_kernel"]
    together = np.add.reduceat(heavy, np.arange(0, x["R"], tile["BT"]), axis=0)
    heavy_tiles = int((-(-together // tile["BP"])).sum())
    n_edges, marks = x["n_edges"].cpu().numpy(), x["marks"].cpu().numpy()  # [R], [2, R, H, W]
    listed = 0
    for r, n in enumerate(n_edges):
        source = x["source"][r, :n].cpu().numpy()
        words = (marks[0, r] | marks[1, r])[:, source // WORD.value]
        listed += int((words >> (source % WORD.value) & 1).sum())
    unseen = np.arange(marks.shape[-1]) > block[-1].rows[:, None, None] // WORD.value
    lines = np.bitwise_count(np.where(unseen, 0, marks).view(np.uint32)).reshape(
        2, -1, marks.shape[-1]
    )
    tile = of["lists_kernel"]
    most = np.maximum.reduceat(lines, np.arange(0, lines.shape[1], tile["BL"]), 1)
    most = np.maximum.reduceat(most, np.arange(0, lines.shape[2], tile["BW"]), 2)
    near = of["breakpoints_kernel"]
    return Lists(
        near=int((near["nearest"] < near["D"]).sum()),
        candidates=int(candidates.sum()),
        light=int(light.sum()),
        light_lines=int((light > 0).sum()),
        light_tiles=int((-(-light // of["light_kernel"]["BP"])).sum()),
        light_candidates=int(candidates[light > 0].sum()),
        heavy=int(heavy.sum()),
        heavy_tiles=heavy_tiles,
        steps=int(most.sum(dtype=np.int64)),
        edges=int(n_edges.sum()),
        edge_tiles=int((-(-n_edges // x["BE"])).sum()),
        listed_edges=listed,
    )
