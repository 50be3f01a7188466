"""A sample of the last embeddings, for the projector of TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

THUMBNAIL = 32
"""Side, in pixels, of the pictures of the sample."""


@dataclass(frozen=True, eq=False)
class EmbeddingSample:
    """Embeddings of some images by each system."""

    embeddings: Mapping[str, np.ndarray]
    """(n, D) float32 at unit length, by the name of a peer, and ``ensemble``."""
    classes: Sequence[str]
    names: Sequence[str]
    thumbnails: np.ndarray
    """(n, 32, 32, 3) uint8"""


def write_projector(sample: EmbeddingSample, folder: Path) -> None:
    """Writes the files of TensorBoard's projector: FOLDER/projector_config.pbtxt, and FOLDER/projector with the
    embeddings, the classes, and the pictures as one square. Raises OSError if they cannot be written."""
    files = folder / "projector"
    files.mkdir(parents=True, exist_ok=True)
    rows = [f"{_cell(label)}\t{_cell(name)}" for label, name in zip(sample.classes, sample.names, strict=True)]
    (files / "images.tsv").write_text("\n".join(["class\timage", *rows]) + "\n", encoding="utf-8")
    side = int(np.ceil(np.sqrt(len(rows))))
    square = np.full((side * side, THUMBNAIL, THUMBNAIL, 3), 255, dtype=np.uint8)
    square[: len(rows)] = sample.thumbnails
    square = square.reshape(side, side, THUMBNAIL, THUMBNAIL, 3).swapaxes(1, 2)
    Image.fromarray(square.reshape(side * THUMBNAIL, side * THUMBNAIL, 3)).save(files / "images.png")
    entries = []
    for name, embeddings in sample.embeddings.items():
        np.savetxt(files / f"{name}.tsv", embeddings, fmt="%.5g", delimiter="\t")
        entries.append(
            f'embeddings {{\n  tensor_name: "{name}"\n  tensor_path: "projector/{name}.tsv"\n'
            f'  metadata_path: "projector/images.tsv"\n  sprite {{\n    image_path: "projector/images.png"\n'
            f"    single_image_dim: {THUMBNAIL}\n    single_image_dim: {THUMBNAIL}\n  }}\n}}\n"
        )
    (folder / "projector_config.pbtxt").write_text("".join(entries), encoding="utf-8")


def _cell(text: str) -> str:
    """A cell of a table, in which tabs and line breaks have a meaning. It keeps no bytes that are not text."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()
