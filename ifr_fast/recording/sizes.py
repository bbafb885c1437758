"""The sizes of a model that decide how much memory a recording and its scores take."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..model.attention import may_sum
from ..model.block import Block
from ..model.decoder import Decoder
from . import prefill
from .layer_inputs import block_rows
from .recording import RecordingMode

_SCORING = 64 << 20  # bytes of a kernel's row blocks, at most
_SCORED = 2048  # bytes of a row's scores: totals of heads, and edges


class LayerSizes(NamedTuple):
    """Numbers per token that are recorded for one layer."""

    k: int  # 0 where it shares a lower layer's
    v: int
    q: int
    z: int  # attention output; 0 unless `Block.fits_rows`
    heads: int
    sums: int  # log-sum-exps, at most; in float32 or wider
    recurrence: int = 0  # what linear attention's weights are made of; in float32 or wider
    output: int = 0  # its output


class Sizes(NamedTuple):
    """The properties of a model that decide the size of a recording."""

    layers: tuple[LayerSizes, ...]
    d_model: int
    width: int  # numbers per token in a layer's widest intermediate
    itemsize: int
    weights_bytes: int  # the model's weights
    maps_bytes: int  # effective W_O of all layers
    device: torch.device
    chunkable: bool

    @staticmethod
    def of(decoder: Decoder) -> Sizes:
        """The sizes that the opening probe found."""

        def of_block(block: Block) -> LayerSizes:
            H, V, _ = block.W_O.shape
            shares = block.value_layer is not None
            if block.recurrence_size:
                return LayerSizes(0, H * V, 0, 0, H, 0, block.recurrence_size, H * V)
            z = H * V if block.fits_rows else 0
            H_kv, K = block.kv_heads, block.d_key
            sums = H if may_sum(K, V) else 0
            k, v = (0, 0) if shares else (H_kv * K, H_kv * V)
            return LayerSizes(k, v, H * K, z, H, sums)

        return Sizes(
            tuple(map(of_block, decoder.blocks)),
            decoder.d_model,
            max(block.width for block in decoder.blocks),
            decoder.dtype.itemsize,
            sum(p.nbytes for p in decoder.model.parameters() if not p.is_meta),
            sum(block.W_O.nbytes for block in decoder.blocks),
            decoder.device,
            prefill.is_chunkable(decoder),
        )

    def lean_bytes(self, n_tokens: int) -> int:
        """Bytes of the stream at each layer and after the last, head input, keys and values, and
        what linear attention has in their place.
        """
        numbers = (len(self.layers) + 2) * self.d_model
        numbers += sum(x.k + x.v + x.output for x in self.layers)
        made_of = sum(x.recurrence for x in self.layers)
        return n_tokens * (self.itemsize * numbers + max(4, self.itemsize) * made_of)

    def full_bytes(self, n_tokens: int) -> int:
        """Bytes of `lean_bytes`, q, resid_mid, log-sum-exps, and z in row-scaled blocks."""
        more = sum(self.d_model + x.q + x.z for x in self.layers)
        sums = max(4, self.itemsize) * sum(x.sums for x in self.layers)
        return self.lean_bytes(n_tokens) + n_tokens * (self.itemsize * more + sums)

    def working_bytes(self, n_tokens: int, chunk_rows: int | None) -> int:
        """Bytes of a layer's activations on all rows or on a chunk of rows, at most."""
        rows = n_tokens if chunk_rows is None else min(chunk_rows, n_tokens)
        activations = rows * self.itemsize * (3 * self.width + 6 * self.d_model)
        if chunk_rows is None or self.device.type == "cuda":
            return activations
        return activations + rows * (rows + n_tokens) * self.itemsize  # the last term is a mask

    def scoring_bytes(self, n_tokens: int, mode: RecordingMode) -> int:
        """Bytes for scoring all rows of a layer, at most: the kernel's blocks, its float32 copies,
        and each row's scores. Lean recordings are scored in row blocks.
        """
        rows = n_tokens
        if mode is RecordingMode.LEAN:
            rows = min(rows, block_rows(self.device))
        if self.device.type == "cuda":
            from ..kernels.triton import room

            H = max(x.heads for x in self.layers)
            return room.work_bytes(rows, n_tokens, H) + n_tokens * _SCORED
        taken = 0
        if self.itemsize < 4:
            taken = 4 * n_tokens * max(x.k + x.v for x in self.layers)
            taken += 4 * rows * max(2 * self.d_model + x.q for x in self.layers)
        return _SCORING + taken + n_tokens * _SCORED
