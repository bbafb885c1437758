"""One layer's table, as tensors by name: the form in which files keep it, `value_layer` apart."""

from __future__ import annotations

from torch import Tensor

from ..kernels.contract import EdgeList
from .tables import LayerTable


def named_tensors(table: LayerTable, prefix: str = "", edges: str = "") -> dict[str, Tensor]:
    """The tensors of a table by their names in a file.

    prefix: of all names; edges: of the names of the edges' columns, after it.
    """
    columns = {edges + name: x for name, x in table.edges._asdict().items()}
    others = table._asdict() | {"edges": None, "value_layer": None}
    own = {name: x for name, x in others.items() if x is not None}
    return {prefix + name: x for name, x in (own | columns).items()}


def take_table(
    tensors: dict[str, Tensor],
    *,
    parallel: bool,
    prefix: str = "",
    edges: str = "",
    rows: Tensor | None = None,
) -> LayerTable:
    """The table that `named_tensors` named, taken out of `tensors`. Raises KeyError for a tensor
    that is missing.

    rows: the table's rows [R], where the file does not hold them.
    """
    columns = EdgeList(*(tensors.pop(prefix + edges + name) for name in EdgeList._fields))
    return LayerTable(
        rows=tensors.pop(prefix + "rows") if rows is None else rows,
        residual=tensors.pop(prefix + "residual"),
        ffn=tensors.pop(prefix + "ffn"),
        ffn_residual=None if parallel else tensors.pop(prefix + "ffn_residual"),
        edges=columns,
        unattributed=tensors.pop(prefix + "unattributed"),
        ffn_unattributed=None if parallel else tensors.pop(prefix + "ffn_unattributed"),
    )
