"""What several tests of embeddings use: a folder of photos, and how the output is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def write_photos(folder: Path, num_images: int = 21) -> list[str]:
    """JPEG and PNG images of different sizes in folders, one of them in another orientation; returns their paths in
    order."""
    rng = np.random.default_rng(1)
    paths = []
    for number in range(num_images):
        path = folder / ("a-b", "a", "b/c")[number % 3] / f"{number:03d}.{('jpg', 'png')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (30 + number, 40, 3), dtype=np.uint8)
        exif = Image.Exif()
        if number == 0:
            exif[0x112] = 6  # to be turned by 90 degrees
        Image.fromarray(pixels).save(path, exif=exif)
        paths.append(path.relative_to(folder).as_posix())
    return sorted(paths)


def rows_of(out: Path) -> pa.Table:
    """All rows, in the order of the files' names, as any reader gets them."""
    return pa.concat_tables([pq.read_table(file) for file in sorted(out.glob("part-*.parquet"))])


def vectors_of(table: pa.Table) -> np.ndarray:
    """(N, D); rows without an embedding are left out."""
    column = table["embedding"].combine_chunks().drop_null()
    return column.flatten().to_numpy().reshape(len(column), -1)
