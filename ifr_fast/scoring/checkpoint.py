"""The scored layers of a trace of all positions, a file each, from which it resumes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import FormatError, IfrError
from ..graph.table_files import named_tensors, take_table
from ..graph.tables import LayerTable
from ..recording.recording import Recording
from ..storage import load_tensors, save_tensors

FORMAT = "ifr_fast.layer_table"
VERSION = 1
_EDGES = "edges."  # before the names of the edges' columns


@dataclass(frozen=True)
class Checkpoint:
    """A folder of layer tables of one recording at one threshold."""

    folder: Path
    fields: dict[str, Any]  # model, text and threshold of the tables

    @staticmethod
    def of(folder: str | os.PathLike[str], recording: Recording, threshold: float) -> Checkpoint:
        """Makes the folder if need be."""
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise IfrError(f"{folder}: cannot be written ({error.strerror})") from error
        fields = {
            "model": recording.decoder.fingerprint(),
            "text": hashlib.sha256(recording.token_ids.numpy().tobytes()).hexdigest(),
            "threshold": threshold,
        }
        return Checkpoint(Path(folder), fields)

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03}.safetensors"

    def load(self, layer: int, device: torch.device) -> LayerTable | None:
        """A layer's table, on a device; None where it is not there yet.

        Raises FormatError for one of another model, text or threshold.
        """
        path = self._path(layer)
        if not path.exists():
            return None
        tensors, fields = load_tensors(path, FORMAT, VERSION)
        if fields != self.fields:
            raise FormatError(
                f"{path}: is of another model, text or threshold; expected an empty folder"
            )
        on_device = {name: x.to(device) for name, x in tensors.items()}
        try:
            parallel = "ffn_residual" not in tensors
            return take_table(on_device, parallel=parallel, edges=_EDGES).at_most_one()
        except KeyError as error:
            raise FormatError(f"{path}: not a whole {FORMAT} file ({error})") from error

    def save(self, layer: int, table: LayerTable) -> None:
        """Keeps a layer's table, whole or not at all."""
        tensors = named_tensors(table, edges=_EDGES)
        save_tensors(self._path(layer), FORMAT, VERSION, tensors, self.fields)
