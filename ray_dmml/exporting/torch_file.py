"""Files of torch.export (.pt2)."""

from __future__ import annotations

import io
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
    content = io.BytesIO()  # where a file cannot be written, torch would end the process
    with quiet():
        torch.export.save(program, content, extra_files={METADATA: json.dumps(metadata, indent=1)})
    path.write_bytes(content.getbuffer())


def load_torch(path: Path) -> Callable[[Tensor], Tensor]:
    """The program of a file: (B, 3, S, S) uint8 -> (B, D) float32."""
    with path.open("rb") as file:
        module = torch.export.load(file).module()

    def embed(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)

    return embed
