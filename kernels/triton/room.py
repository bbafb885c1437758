"""Device memory that the kernels take beside inputs and results; this module needs no Triton."""

from __future__ import annotations

import torch

WORK_BYTES = 1 << 31  # for a block of rows, unless ROWS rows take more
MOST_BYTES = 1 << 34  # for a block of rows, where a quarter of the device's free memory suffices
EDGE_BYTES = 1 << 30  # for all rows' edges; where they could take more, each block's are packed
ROWS_PER_KEY = 1 / 8  # the least at which computing values' reach pays
PAIR_BYTES = 9  # list, proximity and marks
ROWS = 16  # a block's rows are a multiple, so that slices of aligned tensors stay aligned


def block_bytes(device: torch.device) -> int:
    """Bytes for a block of rows on a device: a power of two, so that repeated calls find the
    allocator's blocks again.
    """
    if device.type != "cuda":
        return WORK_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    granted: int = 1 << max(0, (free // 4).bit_length() - 1)
    return min(MOST_BYTES, max(WORK_BYTES, granted))


def block_rows(H: int, n_keys: int, n_bytes: int, n_slots: int = 0) -> int:
    """Rows of a block that sees up to `n_keys` keys, with room for `n_slots` edges each."""
    of_row = PAIR_BYTES * H * n_keys + edge_bytes(1, n_slots, H)
    return max(1, n_bytes // (ROWS * of_row)) * ROWS


def edge_bytes(R: int, n_slots: int, H: int) -> int:
    """Bytes of the edges of R rows: source, weight and each head's weight."""
    return R * n_slots * (12 + 4 * H)


def is_reach(R: int, S: int) -> bool:
    """True if rows are so many that values' reach is computed (reach.py)."""
    return R >= ROWS_PER_KEY * S


def work_bytes(R: int, S: int, H: int) -> int:
    """Bytes that R of S rows of one layer need. Where rows are split into blocks, the kernels take
    up to `block_bytes`.
    """
    return min(R, block_rows(H, S, WORK_BYTES)) * PAIR_BYTES * H * S
