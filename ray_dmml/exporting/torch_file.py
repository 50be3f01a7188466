"""Files of torch.export (.pt2)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ray_dmml.exporting.quiet import quiet

METADATA = "metadata.json"
"""The extra file that holds the metadata."""


def write_torch(program: ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a program with its metadata, as JSON in the extra file :data:`METADATA`."""
    with quiet(), path.open("wb") as file:  # a file whatever its suffix: torch warns of others than .pt2
        torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata, indent=1)})


def load_torch(path: Path) -> Callable[[Tensor], Tensor]:
    """The program of a file: (B, 3, S, S) uint8 -> (B, D) float32."""
    with path.open("rb") as file:
        module = torch.export.load(file).module()

    def embed(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)

    return embed
