"""The fast exact algorithm on GPUs (docs/design.md, section 3.1): the driver of the kernels.

For a block of rows, a kernel or two a step:

(a) prepare.py: column norms of W_O; norms of values; of lines, that is (row, head)s, g = W_O s in
    value space, the smallest breakpoint, and a short list of the coordinates that come first, the
    line's candidates, looked for where a row's coordinates are small; reach.py: where rows are
    many, a tighter bound than values' norms;
(b) linear.py: alpha from the log-sum-exp (taken here where the forward pass gave none), lin as a
    second attention-shaped product; pairs that lin is exact for are summed at once, the others
    marked, a bit each: light where the candidates hold all coordinates that can flip, else heavy;
(c) lists.py, correct.py: marks to lists, and the corrections: light pairs at their line's
    candidates alone, heavy ones at all coordinates, u formed on matrix units, never leaving the
    chip;
(d) proximity.py: the residual stream's and the FFN's proximities;
(e) compact.py: sums in fixed order, denominators, token edges above `keep`, their heads.

The host reads nothing back, and no size depends on what was computed: a line's list has room for
all of its keys, and edges come in as many slots a row as can exceed `keep`. What must have such
room, 8 bytes a pair and its marks, lives for a block of rows, and is touched where pairs are
listed. No sum depends on the order in which programs run: results are the same bit for bit.

T and S are runtime values: what kernels are compiled for are H, H_kv, K, V, D, the dtype, which
optional inputs there are, and whether the rows are few beside the keys (a frontier), where tiles
are narrower and a line's keys are shared out. Inputs are float32, bfloat16 or float16; float32
products are exact ones, not TF32; all sums are in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import AttentionScores, EdgeList, FFNScores, LayerInputs
from . import compact, correct, linear, lists, prepare, proximity, reach, room
from .common import WORD
from .launch import Names, blocks

ALIGNMENT = 16  # of tensors in bytes, as Triton's launcher looks at it
FEW_ROWS = 64
TILES = {
    "N": 64,  # candidates
    "M": 512,  # coordinates of a row that they are among
    "BF": 1024,  # keys of a tile in sums over heads
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def score_attention(inputs: LayerInputs, keep: float) -> AttentionScores:
    """Importances of all parts of the rows' nodes (contract.py); edges with weight > `keep`.

    Edges come in 1/keep slots a row, padded. Raises ValueError where the kernels cannot read a
    tensor: for its dtype, or for its device.
    """
    (R, H, _), S, device = inputs.q.shape, inputs.k.shape[0], inputs.q.device
    n_slots = S if keep * S < 1 else int(1 / keep)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    layer, of_rows = _prepared(inputs)
    of_rows |= {
        "p_residual": floats(R),
        "p_of_ffn": None if inputs.ffn is None else floats(R),
        "p_head_total": floats(R, H),
        "p_unattributed": torch.empty(R, dtype=torch.bool, device=device),
        "p_linear": floats(R),
        "p_total": floats(R),
        "p_source": torch.zeros(R, n_slots, dtype=torch.int64, device=device),
        "p_weight": torch.zeros(R, n_slots, device=device),
        "p_head_weight": torch.zeros(R, n_slots, H, device=device),
    }
    prepare.weights(layer)
    prepare.values(layer)
    if layer["REACH"]:
        reach.reach(layer)
    for cut, n_keys in _row_blocks(inputs.rows, H):
        block = layer | {name: None if x is None else x[cut] for name, x in of_rows.items()}
        block |= {"R": len(block["p_rows"]), "n_keys": n_keys, "n_slots": n_slots}
        _score_block(block | {"keep": float(keep)})
    row = torch.arange(R, device=device).repeat_interleave(n_slots, output_size=R * n_slots)
    source, weight = of_rows["p_source"].flatten(), of_rows["p_weight"].flatten()
    return AttentionScores(
        of_rows["p_residual"],
        of_rows["p_of_ffn"],
        of_rows["p_head_total"],
        EdgeList(row, source, weight, of_rows["p_head_weight"].flatten(0, 1)),
        of_rows["p_unattributed"],
        of_rows["p_linear"],
        of_rows["p_total"],
    )


def score_ffn(resid_mid: Tensor, resid_post: Tensor) -> FFNScores:
    """Importances of `resid_mid` [R, D], and of what the FFN adds to it, in `resid_post` [R, D]."""
    (R, D), device = resid_post.shape, resid_post.device
    scores = FFNScores(
        torch.empty(R, dtype=torch.float32, device=device),
        torch.empty(R, dtype=torch.float32, device=device),
        torch.empty(R, dtype=torch.bool, device=device),
    )
    names = {
        "p_mid": _dense(_readable("resid_mid", resid_mid, device)),
        "p_post": _dense(_readable("resid_post", resid_post, device)),
        "p_residual": scores.residual,
        "p_ffn": scores.ffn,
        "p_unattributed": scores.unattributed,
    }
    proximity.ffn(names | {"R": R, "D": D})
    return scores


def _score_block(x: Names) -> None:
    """All steps for a block of rows, into its rows of the results."""
    x = x | _work(x)
    prepare.lines(x)
    if x["p_log_sum_exp"] is None:
        linear.log_sum_exp(x)
    linear.linear(x)
    lists.lists(x)
    correct.light(x)
    correct.heavy(x)
    proximity.parts(x)
    compact.fold(x)
    compact.totals(x)
    compact.edges(x)


def _work(x: Names) -> Names:
    """Room for what the kernels hand each other, for a block of rows."""
    R, H, V, n_keys = x["R"], x["H"], x["V"], x["n_keys"]
    n_words = blocks(n_keys, WORD.value)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x["p_rows"].device)

    return {
        "few": R <= FEW_ROWS and n_keys >= 4 * R,
        "n_words": n_words,
        "p_g": empty(R, H, x["HALVES"], V, dtype=x["of_g"]),
        "p_lines": empty(4, R, H),
        "p_counts": empty(3, R, H, dtype=torch.int32),
        "p_nearest": empty(R, x["M"], dtype=torch.int32),
        "p_near": empty(R, x["M"]),
        "p_near_end": empty(R),
        "p_candidates": empty(R, H, x["N"], dtype=torch.int32),
        "p_token": empty(R, n_words * WORD.value),
        "p_marks": empty(2, R, H, n_words, dtype=torch.int32),
        "p_list": empty(R, H, n_words * WORD.value, dtype=torch.int32),
        "p_proximity": empty(R, H, n_words * WORD.value),
        "p_folded": empty(blocks(n_keys, x["BF"]), R, H),
        "p_n_edges": empty(R, dtype=torch.int32),
    }


def _prepared(inputs: LayerInputs) -> tuple[Names, Names]:
    """What the kernels are given: names that hold for the layer, and tensors [R, ...] by row."""
    H, K = inputs.q.shape[1:]
    (S, H_kv, V), D = inputs.v.shape, inputs.y.shape[1]
    device = inputs.q.device
    read = {
        name: _readable(name, x, device)
        for name, x in inputs._asdict().items()
        if isinstance(x, Tensor) and name != "rows"
    }
    # Operands of a product are in one dtype.
    dtype = functools.reduce(torch.promote_types, (read[n].dtype for n in ("q", "k", "v", "W_O")))
    q, k, v = (_strided(read[name].to(dtype)) for name in ("q", "k", "v"))
    W_T = read["W_O"].to(dtype).transpose(1, 2)
    W_T = _aligned(W_T if W_T.stride(-1) == 1 else W_T.contiguous())
    gate = read.get("value_gate")
    gate = None if gate is None else _strided(gate)
    unit_k, unit_v = _unit(K), _unit(V)
    offset, shifted = read.get("offset"), "offset" in read or inputs.floor > 0
    if shifted and offset is None:
        offset = torch.zeros(len(inputs.rows), device=device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    v_norm = floats(H_kv, S)
    is_reach = gate is None and room.is_reach(len(inputs.rows), S)
    is_halved = dtype == torch.bfloat16 and is_reach
    n_halves = 1 if is_halved or dtype == torch.float32 else 2
    of_g = torch.float16 if is_halved else dtype
    v16 = torch.empty(S, H_kv, V, dtype=torch.float16, device=device) if is_halved else v
    layer = TILES | {
        "S": S, "H": H, "H_kv": H_kv, "GROUP": H // H_kv, "K": K, "V": V, "D": D,
        "UNIT_K": unit_k, "UNIT_V": unit_v, "HALVES": n_halves,
        "HALVED": is_halved, "of_g": of_g, "WIDE": dtype == torch.float32,
        "GATED": gate is not None, "SCALED": inputs.row_scale is not None,
        "SOFTCAP": inputs.softcap is not None, "ALIBI": inputs.alibi_slopes is not None,
        "WINDOW": inputs.window is not None, "SINKS": inputs.sinks is not None,
        "FFN": inputs.ffn is not None, "SHIFTED": shifted,
        "SUMMED": inputs.log_sum_exp is not None,
        "scale": float(inputs.scale), "softcap": float(inputs.softcap or 0),
        "window": inputs.window or 0, "floor": float(inputs.floor),
        "p_k": k, "p_v": v, "p_w": W_T,
        "p_slopes": read.get("alibi_slopes"), "p_sinks": read.get("sinks"),
        "p_v16": v16, "p_v_size": floats(H_kv, S) if is_halved else None,
        "p_v_top": floats(H_kv), "p_v_scale": floats(H_kv) if is_halved else None,
        "p_rho_inv": floats(H, D), "p_rho_inv_t": floats(D, H), "p_rho_rms": floats(H),
        "p_spread_inv": floats(D), "p_v_norm": v_norm,
        "REACH": is_reach, "p_reach": floats(H, S) if is_reach else v_norm,
        "stride_qr": _stride(q, 0) // unit_k, "stride_qh": _stride(q, 1) // unit_k,
        "stride_ks": _stride(k, 0) // unit_k, "stride_kh": _stride(k, 1) // unit_k,
        "stride_vs": _stride(v, 0) // unit_v, "stride_vh": _stride(v, 1) // unit_v,
        "stride_us": _stride(v16, 0) // unit_v, "stride_uh": _stride(v16, 1) // unit_v,
        "stride_gate_r": 0 if gate is None else _stride(gate, 0) // unit_v,
        "stride_gate_h": 0 if gate is None else _stride(gate, 1) // unit_v,
        "stride_wh": W_T.stride(0), "stride_wd": W_T.stride(1),
    }  # fmt: skip
    of_rows = {
        "p_rows": inputs.rows.to(device, torch.int64, non_blocking=True),
        "p_q": q,
        "p_y": _dense(read["y"]),
        "p_resid_pre": _dense(read["resid_pre"]),
        "p_ffn": _dense(read.get("ffn")),
        "p_gate": gate,
        "p_row_scale": _dense(read.get("row_scale")),
        "p_offset": _dense(offset),
        "p_log_sum_exp": _dense(read.get("log_sum_exp")),
    }
    return layer, of_rows


def _readable(name: str, x: Tensor, device: torch.device) -> Tensor:
    """The tensor, without its gradient."""
    if x.device != device:
        raise ValueError(f"{name}: expected on {device}, where q is, got one on {x.device}")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name}: impl='triton' takes float32, bfloat16 or float16 and sums in float32, got "
            f"{x.dtype}; impl='eager' and 'reference' compute in float64"
        )
    return x.detach()


def _unit(width: int) -> int:
    """The power of two, up to 16, that strides of a tensor [.., .., width] are counted in, so that
    the compiler knows of their alignment whatever their values.
    """
    return math.gcd(width, 16)


def _stride(x: Tensor, dim: int) -> int:
    """Of a dimension of size 1 any stride would do: x's width, a multiple of its unit."""
    return x.stride(dim) if x.shape[dim] > 1 else x.shape[-1]


def _strided(x: Tensor) -> Tensor:
    """X [.., .., width], or a copy where the kernels could not rely on its alignment."""
    unit = _unit(x.shape[-1])
    if x.stride(-1) == 1 and _stride(x, 0) % unit == _stride(x, 1) % unit == 0:
        return _aligned(x)
    return x.clone(memory_format=torch.contiguous_format)


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else _aligned(x.contiguous())


def _row_blocks(rows: Tensor, H: int) -> Iterator[tuple[slice, int]]:
    """Slices of the rows, and how many keys each sees, so that room.WORK_BYTES suffice."""
    R = len(rows)
    if R == 0:
        return
    size = room.block_rows(H, int(rows[-1]) + 1)
    for start in range(0, R, size):
        stop = min(R, start + size)
        yield slice(start, stop), int(rows[stop - 1]) + 1
