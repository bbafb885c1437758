"""The scored layers of a trace of all positions, a file each, from which it resumes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_path
from ..errors import FormatError, IfrError
from ..graph.checks import check_layer
from ..graph.table_files import named_tensors, take_table
from ..graph.tables import LayerTable
from ..model.block import error_of_runs, rounding_tolerance
from ..recording.recording import Recording
from ..storage.tensors import Format, load_tensors, save_tensors

FORMAT = Format("ifr_fast.layer_table", version=2, oldest=2, checked_from=2)
_EDGES = "edges."  # before the names of the edges' columns


@dataclass(frozen=True)
class Checkpoint:
    """A folder of layer tables of one recording at one threshold."""

    folder: Path
    fields: dict[str, Any]  # model, text and threshold of the tables
    recording: Recording

    @staticmethod
    def of(folder: str | os.PathLike[str], recording: Recording, threshold: float) -> Checkpoint:
        """Makes the folder if need be."""
        folder = check_path("checkpoint", folder)
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise IfrError(f"{folder}: cannot be written ({error.strerror})") from error
        fields = {
            "model": recording.decoder.fingerprint(),
            "text": hashlib.sha256(recording.token_ids.numpy().tobytes()).hexdigest(),
            "threshold": threshold,
        }
        return Checkpoint(folder, fields, recording)

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03}.safetensors"

    def _sample(self, layer: int) -> dict[str, Tensor]:
        """A few rows of the residual stream before and after a layer, by which a model is told
        apart whose hooks read something that its fingerprint does not see.
        """
        rows = self.recording.checked_rows
        streams = self.recording.layers[layer].resid_pre, self.recording.resid_post(layer)
        before, after = (x[rows.to(x.device)].cpu() for x in streams)
        return {"sample.resid_pre": before, "sample.resid_post": after}

    def load(self, layer: int, device: torch.device) -> LayerTable | None:
        """A layer's table, on a device; None where it is not there yet.

        Raises FormatError for one of another model, text or threshold, or damaged.
        """
        path = self._path(layer)
        if not path.exists():
            return None
        tensors, fields = load_tensors(path, FORMAT)
        if fields != self.fields:
            raise FormatError(
                f"{path}: is of another model, text or threshold; expected an empty folder"
            )
        try:
            for name, x in self._sample(layer).items():
                if error_of_runs(tensors.pop(name), x) > rounding_tolerance(x.dtype):
                    raise FormatError(
                        f"{path}: is of other states of the residual stream, by a hook perhaps; "
                        "expected an empty folder"
                    )
            on_device = {name: x.to(device) for name, x in tensors.items()}
            block = self.recording.decoder.blocks[layer]
            table = take_table(on_device, parallel=block.parallel, edges=_EDGES).at_most_one()
            check_layer(table, len(self.recording), len(block.W_O))
            return table._replace(value_layer=block.value_layer)
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise FormatError(f"{path}: not a whole {FORMAT.name} file ({error})") from error

    def save(self, layer: int, table: LayerTable) -> None:
        """Keeps a layer's table, whole or not at all."""
        tensors = named_tensors(table, edges=_EDGES) | self._sample(layer)
        save_tensors(self._path(layer), FORMAT, tensors, self.fields)
