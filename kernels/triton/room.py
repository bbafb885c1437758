"""Device memory that the kernels take beside inputs and results; this module needs no Triton."""

from __future__ import annotations

WORK_BYTES = 1 << 31  # for a block of rows, unless ROWS rows take more
ROWS_PER_KEY = 1 / 8  # the least at which computing values' reach pays
PAIR_BYTES = 9  # list, proximity and marks
ROWS = 16  # a block's rows are a multiple, so that slices of aligned tensors stay aligned


def block_rows(H: int, n_keys: int) -> int:
    """Rows of a block that sees up to `n_keys` keys."""
    return max(1, WORK_BYTES // (ROWS * PAIR_BYTES * H * n_keys)) * ROWS


def is_reach(R: int, S: int) -> bool:
    """True if rows are so many that values' reach is computed (reach.py)."""
    return R >= ROWS_PER_KEY * S


def work_bytes(R: int, S: int, H: int) -> int:
    """Bytes for R of S rows of one layer, at most."""
    return min(R, block_rows(H, S)) * PAIR_BYTES * H * S
