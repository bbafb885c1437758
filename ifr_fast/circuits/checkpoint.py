"""A folder that keeps what patching has done, one file for each batch of texts and layer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..errors import FormatError
from ..storage.tensors import Format, load_tensors, save_tensors

FORMAT = Format("ifr_fast.patching", version=2, oldest=2, checked_from=2)
_COUNTED = ("runs", "row_layers", "seconds")


class LayerPatches(NamedTuple):
    """Results of one layer's patches on one batch of texts."""

    heads: Tensor  # [B, H, 1 or T] logit differences
    ffn: Tensor  # [B, 1 or T]
    runs: int
    row_layers: int  # computed rows, summed over layers
    seconds: float


class SweepFolder(NamedTuple):
    """A folder with one file for each batch and layer that is done."""

    folder: Path
    identity: str

    def _path(self, batch: int, layer: int) -> Path:
        return self.folder / f"{batch}-{layer}.safetensors"

    def load(self, batch: int, layer: int, texts: list[int]) -> LayerPatches | None:
        """The saved result for `texts`, those of a batch, or None.

        Raises FormatError if it belongs to other settings, another layer or other texts.
        """
        path = self._path(batch, layer)
        if not path.exists():
            return None
        tensors, fields = load_tensors(path, FORMAT)
        if fields.get("identity") != self.identity:
            raise FormatError(f"{path}: belongs to another model, task or kind of patching")
        if (fields.get("layer"), fields.get("texts")) != (layer, texts):
            raise FormatError(f"{path}: belongs to another layer or other texts; delete it")
        return LayerPatches(
            tensors["heads"], tensors["ffn"], **{name: fields[name] for name in _COUNTED}
        )

    def save(self, batch: int, layer: int, texts: list[int], part: LayerPatches) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        fields = {"identity": self.identity, "layer": layer, "texts": texts}
        fields |= {name: getattr(part, name) for name in _COUNTED}
        tensors = {"heads": part.heads, "ffn": part.ffn}
        save_tensors(self._path(batch, layer), FORMAT, tensors, fields)
