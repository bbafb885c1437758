"""Available memory, and sizes in bytes as text."""

from __future__ import annotations

import re
from math import isfinite

import psutil
import torch

from ..arguments import check_count, shown

_MOST_BYTES = 1 << 62
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available) if device.type == "cpu" else None


def describe_bytes(n: float) -> str:
    """A size in bytes as text, in powers of 1000: 1536 -> '1.54 kB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def parse_bytes(text: str | int, name: str = "max_memory") -> int:
    """The number of bytes in '8GB', '500 MB', '1.5g' or a plain number.

    Units are powers of 1000, or of 1024 with an i. Raises ValueError for any other text.
    """
    wrong = f"{name}: expected a size such as 8GB or 500MB, got {shown(text)}"
    if not isinstance(text, str):
        try:
            return check_count(name, text, most=_MOST_BYTES)
        except ValueError:
            raise ValueError(wrong) from None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if found is None or (found[3] and not found[2]):
        raise ValueError(wrong)
    unit = _UNITS[found[2]]
    if found[3]:
        unit = 1024 ** (len(str(unit)) // 3)
    size = float(found[1]) * unit
    n = int(size) if isfinite(size) else 0
    if not 1 <= n <= _MOST_BYTES:
        raise ValueError(wrong)
    return n
