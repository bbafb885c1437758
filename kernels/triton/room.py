"""What the kernels take of the device's memory beside their inputs and results; needs no Triton."""

from __future__ import annotations

WORK_BYTES = 1 << 31  # of a block of rows, unless ROWS rows take more
ROWS_PER_KEY = 1 / 8  # from which on taking values' reach pays
PAIR_BYTES = 9  # list, proximity and marks
ROWS = 16  # a block's are a multiple: what is cut off an aligned tensor stays aligned


def block_rows(H: int, n_keys: int) -> int:
    """Rows to a block, of those that see up to `n_keys` keys."""
    return max(1, WORK_BYTES // (ROWS * PAIR_BYTES * H * n_keys)) * ROWS


def is_reach(R: int, S: int) -> bool:
    """Whether rows are so many that values' reach is taken (reach.py)."""
    return R >= ROWS_PER_KEY * S


def work_bytes(R: int, S: int, H: int) -> int:
    """For R of S rows of one layer, at most."""
    return min(R, block_rows(H, S)) * PAIR_BYTES * H * S
