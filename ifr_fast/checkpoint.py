"""The layers of a trace of all positions that are done, a file each, to go on with."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import FormatError, IfrError
from .graph import LayerTable
from .kernels.contract import EdgeList
from .recording import Recording
from .storage import load_tensors, save_tensors

FORMAT = "ifr_fast.layer_table"
VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A folder of layer tables of one recording at one threshold."""

    folder: Path
    fields: dict[str, Any]  # what they are of

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
        try:
            found: dict[str, Any] = {name: x.to(device) for name, x in tensors.items()}
            edges = EdgeList(*(found[f"edges.{name}"] for name in EdgeList._fields))
            return LayerTable(
                found["rows"],
                found["residual"],
                found["ffn"],
                found.get("ffn_residual"),
                edges,
                found["unattributed"],
                found.get("ffn_unattributed"),
            )
        except KeyError as error:
            raise FormatError(f"{path}: not a whole {FORMAT} file ({error})") from error

    def save(self, layer: int, table: LayerTable) -> None:
        """Keeps a layer's table, whole or not at all."""
        found = table._asdict()
        edges = found.pop("edges")
        tensors = {name: x for name, x in found.items() if x is not None}
        tensors |= {f"edges.{name}": x for name, x in edges._asdict().items()}
        save_tensors(self._path(layer), FORMAT, VERSION, tensors, self.fields)
