"""What the kernels take of the device's memory beside their inputs and results; needs no Triton."""

from __future__ import annotations

WORK_BYTES = 1 << 31  # of a block of rows, unless ROWS rows take more
TABLE_BYTES = 1 << 32  # of all heads' cosines, or there are none
ROWS_PER_KEY = 1 / 8  # from which on taking values' reach pays
PAIR_BYTES = 9  # list, proximity and marks
ROWS = 16  # a block's are a multiple: what is cut off an aligned tensor stays aligned


def block_rows(H: int, n_keys: int) -> int:
    """Rows to a block, of those that see up to `n_keys` keys."""
    return max(1, WORK_BYTES // (ROWS * PAIR_BYTES * H * n_keys)) * ROWS


def is_reach(R: int, S: int) -> bool:
    """Whether rows are so many that values' reach is taken (reach.py)."""
    return R >= ROWS_PER_KEY * S


def table_bytes(R: int, S: int, H: int, D: int, itemsize: int) -> int:
    """Of cosines [H, S, D], of a model with elements of `itemsize` bytes; 0 where none are kept."""
    size = H * S * D * itemsize
    return size if is_reach(R, S) and size <= TABLE_BYTES else 0


def work_bytes(R: int, S: int, H: int, D: int, itemsize: int) -> int:
    """For R of S rows of one layer, at most."""
    rows = min(R, block_rows(H, S))
    return rows * PAIR_BYTES * H * S + table_bytes(R, S, H, D, itemsize)
