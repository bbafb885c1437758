"""pyarrow, or a clear word that it is missing."""

from __future__ import annotations

from ..errors import IfrError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise IfrError(
        "ifr_fast.survey needs pyarrow, which is not installed: pip install 'ifr-fast[survey]'"
    ) from error

__all__ = ["pa", "pq"]
