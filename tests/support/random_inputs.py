"""Random kernel inputs at any shape, in which signs do flip."""

from __future__ import annotations

from typing import Any

import torch

from ifr_fast.kernels.contract import LayerInputs


def random_inputs(
    R: int,
    S: int,
    H: int,
    H_kv: int,
    K: int,
    V: int,
    D: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    flags: frozenset[str] | set[str] = frozenset(),
) -> LayerInputs:
    """R rows among S positions. `flags` names optional fields of LayerInputs to fill in.

    Values are exact in `dtype`, and given in float64: cast with `LayerInputs.to`.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).double()

    optional: dict[str, Any] = {
        "row_scale": normal(R).abs() + 0.1,
        "value_gate": normal(R, H, V),
        "window": max(1, S // 3),
        "softcap": 3.0,
        "sinks": normal(H),
        "alibi_slopes": normal(H).abs() / 8,
        "ffn": normal(R, D),
        "offset": torch.linspace(-0.7, 0.7, R, dtype=torch.float64).to(dtype).double(),
        "floor": 0.5,
    }
    rows = torch.randperm(S, generator=generator)[:R].sort().values
    return LayerInputs(
        rows=rows,
        resid_pre=normal(R, D),
        y=normal(R, D),
        q=2 * normal(R, H, K),
        k=normal(S, H_kv, K),
        v=normal(S, H_kv, V),
        W_O=0.5 * normal(H, V, D),
        scale=K**-0.5,
        **{flag: optional[flag] for flag in flags},
    )
