"""The kernels' arguments as records: a layer, some of its rows, and room for their work.

Kernels find their parameters by the names of these fields (launch.py). Sizes: R rows, S keys, H
heads of H_kv groups, widths K of keys, V of values, D of the model, N candidates of a line, M
nearest coordinates of a row, W words of 32 keys.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import LayerInputs
from ..rows import on_device
from . import room, tiles
from .common import WORD
from .launch import blocks

ALIGNMENT = 16  # bytes; Triton's launcher looks at it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layer(NamedTuple):
    """One layer: sizes, options of its attention, weights, keys and values, and tensors that
    prepare.py and reach.py derive from them. An option that the layer does not have is None.
    """

    S: int
    H: int
    H_kv: int
    GROUP: int  # heads that share a KV head
    K: int
    V: int
    D: int
    N: int
    M: int
    BF: int  # keys of a tile in sums over heads
    UNIT_K: int  # strides of q and k are counted in units of so many elements
    UNIT_V: int  # strides of values likewise
    HALVES: int  # numbers that a g is split into
    REACH: bool  # `reach` holds values' reach, otherwise their norms

    scale: float
    softcap: float | None
    window: int | None
    floor: float

    k: Tensor  # [S, H_kv, K]
    v: Tensor  # [S, H_kv, V]
    w: Tensor  # [H, D, V] W_O transposed, V contiguous
    slopes: Tensor | None  # [H] ALiBi's
    sinks: Tensor | None  # [H]
    v16: Tensor  # [S, H_kv, V] float16 values divided by v_scale; v itself where v_scale is None
    v_size: Tensor | None  # [H_kv, S] largest coordinate
    v_top: Tensor | None  # [H_kv] the largest of these
    v_scale: Tensor | None  # [H_kv]
    rho_inv: Tensor  # [H, D] 1 / column norms of W_O, 0 where a norm is 0
    rho_inv_t: Tensor  # [D, H]
    rho_rms: Tensor  # [H]
    spread_inv: Tensor  # [D]
    v_norm: Tensor  # [H_kv, S]
    reach: Tensor  # [H, S], or v_norm

    stride_ks: int
    stride_kh: int
    stride_vs: int
    stride_vh: int
    stride_us: int  # of v16
    stride_uh: int
    stride_wh: int
    stride_wd: int

    g_dtype: torch.dtype

    @property
    def wide(self) -> bool:
        """True if operands of products are float32."""
        return self.v.dtype == torch.float32


class Rows(NamedTuple):
    """Rows of a layer to score, and their results."""

    R: int
    n_keys: int  # keys that some row sees
    n_slots: int  # edges that a row may have
    keep: float
    few: bool  # rows are few beside their keys

    rows: Tensor  # [R] int64 positions
    q: Tensor  # [R, H, K]
    y: Tensor  # [R, D]
    resid_pre: Tensor  # [R, D]
    ffn: Tensor | None  # [R, D]
    gate: Tensor | None  # [R, H, V]
    row_scale: Tensor | None  # [R]
    offset: Tensor | None  # [R]
    log_sum_exp: Tensor | None  # [R, H] the forward pass's

    residual: Tensor  # [R]
    of_ffn: Tensor | None  # [R]
    head_total: Tensor  # [R, H]
    unattributed: Tensor  # [R] bool
    linear: Tensor  # [R]
    total: Tensor  # [R]
    source: Tensor | None  # [R, slots] int64; None until a block has room for its edges
    weight: Tensor | None  # [R, slots]
    head_weight: Tensor | None  # [R, slots, H]

    stride_qr: int
    stride_qh: int

    def cut(self, chosen: slice, n_keys: int) -> Rows:
        """Some of the rows."""
        fields: dict[str, Any] = {
            name: x[chosen] for name, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(**fields, R=len(fields["rows"]), n_keys=n_keys)

    def with_room_for_edges(self) -> Rows:
        """The rows with `n_slots` empty edges each, at most one for each key."""
        R, H = self.head_total.shape
        slots = min(self.n_slots, self.n_keys)
        return self._replace(
            n_slots=slots,
            source=self.rows.new_zeros(R, slots),
            weight=self.total.new_zeros(R, slots),
            head_weight=self.total.new_zeros(R, slots, H),
        )


class Work(NamedTuple):
    """Room for the results that kernels pass on to each other, for a block of rows."""

    n_words: int
    BS: int  # keys of a tile of the linear pass

    g: Tensor  # [R, H, HALVES, V]
    lines: Tensor  # [4, R, H] (common.py)
    counts: Tensor  # [3, R, H] int32 (common.py)
    nearest: Tensor  # [R, M] int32 coordinates
    near: Tensor  # [R, M] |y / row_scale| of these
    near_end: Tensor  # [R]
    candidates: Tensor  # [R, H, N] int32 coordinates
    token: Tensor  # [R, 32 W] proximities summed over heads
    partial: Tensor  # [S / BS, R, H] proximities that are linear, summed over a tile's keys
    partial_lin: Tensor  # [S / BS, R, H] lin, summed over a tile's keys
    marks: Tensor  # [2, R, H, W] int32 bits: light pairs, heavy pairs
    pairs: Tensor  # [R, H, 32 W] int32 keys of the light pairs from the front, heavy from the end
    proximity: Tensor  # [R, H, 32 W] of light and heavy pairs; alpha, until they are corrected
    folded: Tensor  # [S / BF, R, H]
    n_edges: Tensor  # [R] int32


class Block(NamedTuple):
    """A block of rows of a layer: all that its kernels read and write."""

    layer: Layer
    rows: Rows
    work: Work


class FFNRows(NamedTuple):
    """Rows of an FFN node, and their results."""

    R: int
    D: int
    mid: Tensor  # [R, D]
    post: Tensor  # [R, D]
    residual: Tensor  # [R]
    ffn: Tensor  # [R]
    unattributed: Tensor  # [R] bool


def prepared(inputs: LayerInputs, keep: float) -> tuple[Layer, Rows]:
    """The inputs as the kernels read them, with room for results.

    Raises ValueError where the kernels cannot read a tensor: for its dtype, or for its device.
    """
    (R, H, K), device = inputs.q.shape, inputs.q.device
    (S, H_kv, V), D = inputs.v.shape, inputs.y.shape[1]
    read = {
        name: readable(name, x, device)
        for name, x in inputs._asdict().items()
        if isinstance(x, Tensor) and name != "rows"
    }
    # Operands of a product are in one dtype.
    dtype = functools.reduce(torch.promote_types, (read[n].dtype for n in ("q", "k", "v", "W_O")))
    q, k, v = (_strided(read[name].to(dtype)) for name in ("q", "k", "v"))
    W_T = read["W_O"].to(dtype).transpose(1, 2)
    W_T = _aligned(W_T if W_T.stride(-1) == 1 else W_T.contiguous())
    offset = read.get("offset")
    if offset is None and inputs.floor > 0:
        offset = torch.zeros(R, device=device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    unit_k, unit_v = _unit(K), _unit(V)
    v_norm = floats(H_kv, S)
    is_reach = inputs.value_gate is None and room.is_reach(R, S)
    is_halved = dtype == torch.bfloat16 and is_reach
    v16 = torch.empty(S, H_kv, V, dtype=torch.float16, device=device) if is_halved else v
    n_slots = S if keep * S < 1 else int(1 / keep)
    layer = Layer(
        S=S,
        H=H,
        H_kv=H_kv,
        GROUP=H // H_kv,
        K=K,
        V=V,
        D=D,
        N=tiles.CANDIDATES,
        M=tiles.NEAREST,
        BF=tiles.FOLD,
        UNIT_K=unit_k,
        UNIT_V=unit_v,
        HALVES=1 if is_halved or dtype == torch.float32 else 2,
        REACH=is_reach,
        scale=float(inputs.scale),
        softcap=None if inputs.softcap is None else float(inputs.softcap),
        window=inputs.window,
        floor=float(inputs.floor),
        k=k,
        v=v,
        w=W_T,
        slopes=read.get("alibi_slopes"),
        sinks=read.get("sinks"),
        v16=v16,
        v_size=floats(H_kv, S) if is_halved else None,
        v_top=floats(H_kv) if is_halved else None,
        v_scale=floats(H_kv) if is_halved else None,
        rho_inv=floats(H, D),
        rho_inv_t=floats(D, H),
        rho_rms=floats(H),
        spread_inv=floats(D),
        v_norm=v_norm,
        reach=floats(H, S) if is_reach else v_norm,
        stride_ks=_stride(k, 0) // unit_k,
        stride_kh=_stride(k, 1) // unit_k,
        stride_vs=_stride(v, 0) // unit_v,
        stride_vh=_stride(v, 1) // unit_v,
        stride_us=_stride(v16, 0) // unit_v,
        stride_uh=_stride(v16, 1) // unit_v,
        stride_wh=W_T.stride(0),
        stride_wd=W_T.stride(1),
        g_dtype=torch.float16 if is_halved else dtype,
    )
    rows = Rows(
        R=R,
        n_keys=S,
        n_slots=n_slots,
        keep=float(keep),
        few=tiles.is_few(R, S),
        rows=on_device(inputs.rows, device),
        q=q,
        y=dense(read["y"]),
        resid_pre=dense(read["resid_pre"]),
        ffn=_dense_or_none(read.get("ffn")),
        gate=_dense_or_none(read.get("value_gate")),
        row_scale=_dense_or_none(read.get("row_scale")),
        offset=_dense_or_none(offset),
        log_sum_exp=_dense_or_none(read.get("log_sum_exp")),
        residual=floats(R),
        of_ffn=None if inputs.ffn is None else floats(R),
        head_total=floats(R, H),
        unattributed=torch.empty(R, dtype=torch.bool, device=device),
        linear=floats(R),
        total=floats(R),
        source=None,
        weight=None,
        head_weight=None,
        stride_qr=_stride(q, 0) // unit_k,
        stride_qh=_stride(q, 1) // unit_k,
    )
    return layer, rows


def block(layer: Layer, rows: Rows) -> Block:
    """The rows as one block, with room for their work."""
    R, H, n_keys = rows.R, layer.H, rows.n_keys
    n_words = blocks(n_keys, WORD.value)
    BS = tiles.linear(rows.few, layer.wide).BS

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=rows.rows.device)

    work = Work(
        n_words=n_words,
        BS=BS,
        g=empty(R, H, layer.HALVES, layer.V, dtype=layer.g_dtype),
        lines=empty(4, R, H),
        counts=empty(3, R, H, dtype=torch.int32),
        nearest=empty(R, layer.M, dtype=torch.int32),
        near=empty(R, layer.M),
        near_end=empty(R),
        candidates=empty(R, H, layer.N, dtype=torch.int32),
        token=empty(R, n_words * WORD.value),
        partial=empty(blocks(n_keys, BS), R, H),
        partial_lin=empty(blocks(n_keys, BS), R, H),
        marks=empty(2, R, H, n_words, dtype=torch.int32),
        pairs=empty(R, H, n_words * WORD.value, dtype=torch.int32),
        proximity=empty(R, H, n_words * WORD.value),
        folded=empty(blocks(n_keys, layer.BF), R, H),
        n_edges=empty(R, dtype=torch.int32),
    )
    return Block(layer, rows, work)


def readable(name: str, x: Tensor, device: torch.device) -> Tensor:
    """The tensor, without its gradient."""
    if x.device != device:
        raise ValueError(f"{name}: expected on {device}, where q is, got one on {x.device}")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name}: impl='triton' takes float32, bfloat16 or float16 and sums in float32, got "
            f"{x.dtype}; impl='eager' and 'reference' compute in float64"
        )
    return x.detach()


def dense(x: Tensor) -> Tensor:
    """The tensor, contiguous and aligned."""
    return _aligned(x.contiguous())


def _dense_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else dense(x)


def _unit(width: int) -> int:
    """The power of two, up to 16, that strides of a tensor [.., .., width] are counted in. The
    compiler thus knows of their alignment, whatever their values.
    """
    return math.gcd(width, 16)


def _stride(x: Tensor, dim: int) -> int:
    """The stride of a dimension; its width, a multiple of the unit, where the size is 1 and any
    stride would do.
    """
    return x.stride(dim) if x.shape[dim] > 1 else x.shape[-1]


def _strided(x: Tensor) -> Tensor:
    """x [.., .., width], or a copy where the kernels could not rely on its alignment."""
    unit = _unit(x.shape[-1])
    if x.stride(-1) == 1 and _stride(x, 0) % unit == _stride(x, 1) % unit == 0:
        return _aligned(x)
    return x.clone(memory_format=torch.contiguous_format)


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()
