"""pyarrow, or a clear word that it is missing."""

from __future__ import annotations

from ..errors import needing

with needing("ifr_fast.survey", "pyarrow", "pip install 'ifr-fast[survey]'"):
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["pa", "pq"]
