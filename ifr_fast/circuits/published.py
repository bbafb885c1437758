"""Heads that others found in GPT-2 small, to compare with when that model is examined.

- Indirect object identification: Wang et al. 2022, arXiv 2211.00593, figure 2 and appendix F.
- Greater-than: Hanna et al. 2023, arXiv 2305.00586, section 3. The early heads that read the
  year are those of the circuit of Conmy et al. 2023, arXiv 2304.14997.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Circuit = Mapping[str, tuple[tuple[int, int], ...]]  # role -> (layer, head)

GPT2_SMALL = ("gpt2", "openai-community/gpt2")

IOI: Circuit = {
    "name mover": ((9, 9), (9, 6), (10, 0)),
    "negative name mover": ((10, 7), (11, 10)),
    "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
    "induction": ((5, 5), (5, 8), (5, 9), (6, 9)),
    "duplicate token": ((0, 1), (0, 10), (3, 0)),
    "previous token": ((2, 2), (4, 11)),
    "backup name mover": (
        (9, 0), (9, 7), (10, 1), (10, 2), (10, 6), (10, 10), (11, 2), (11, 9),
    ),
}  # fmt: skip
GREATER_THAN: Circuit = {
    "reads the year": ((0, 1), (0, 3), (0, 5)),
    "attends to it from the end": ((5, 5), (6, 1), (6, 9), (7, 10), (8, 11), (9, 1)),
}
_CIRCUITS = {"ioi": IOI, "greater-than": GREATER_THAN}


def published_circuit(task: str, model_name: str | None) -> Circuit | None:
    """The published circuit of a task in the model of that name, or None."""
    return _CIRCUITS.get(task) if model_name in GPT2_SMALL else None


def as_mask(circuit: Circuit, n_layers: int, n_heads: int) -> Tensor:
    """The circuit's heads, bool [L, H]. Raises ValueError where the model has no such head."""
    mask = torch.zeros(n_layers, n_heads, dtype=torch.bool)
    for role, heads in circuit.items():
        for layer, head in heads:
            if not (0 <= layer < n_layers and 0 <= head < n_heads):
                raise ValueError(
                    f"circuit: expected {n_layers} layers of {n_heads} heads, got {role} "
                    f"{layer}.{head}"
                )
            mask[layer, head] = True
    return mask
