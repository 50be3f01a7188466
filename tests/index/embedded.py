"""Folders as ``ray-dmml embed`` writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def unit_vectors(number: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """(number, size) float32 of unit length, around centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, size))
    points = centres[rng.integers(0, len(centres), number)] + 0.5 * rng.standard_normal((number, size))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points.astype(np.float32)


def write_info(folder: Path, size: int, **changes: Any) -> None:
    info = {
        "model": "a" * 64,
        "peer": "ensemble",
        "size": size,
        "dtype": "float32",
        "preprocessing": {},
        "root": "photos",
        "run": "runs/photos",
        "num_images": 0,
        "versions": {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "embed.json").write_text(json.dumps(info | changes))


def write_shard(
    folder: Path,
    number: int,
    paths: Sequence[str],
    vectors: Sequence[np.ndarray | None],
    dtype: pa.DataType | None = None,
) -> Path:
    """One shard. An image without a vector is unreadable."""
    size = next(len(vector) for vector in vectors if vector is not None)
    kind = pa.list_(dtype or pa.float32(), size)
    half = dtype == pa.float16()
    values = [None if v is None else list(v.astype(np.float16) if half else v) for v in vectors]
    fine = [vector is not None for vector in vectors]
    table = pa.table(
        {
            "path": pa.array(list(paths), pa.string()),
            "embedding": pa.array(values, kind),
            "width": pa.array([640 if ok else None for ok in fine], pa.int32()),
            "height": pa.array([480 if ok else None for ok in fine], pa.int32()),
            "error": pa.array([None if ok else "the file is empty" for ok in fine], pa.string()),
        }
    )
    file = folder / f"part-{number:05d}.parquet"
    pq.write_table(table, file)
    return file


def write_embeddings(folder: Path, vectors: np.ndarray, num_shards: int = 2, **changes: Any) -> list[str]:
    """All of a folder; the paths of its images."""
    write_info(folder, vectors.shape[1], **changes)
    paths = [f"c{number % 7}/{number:06d}.jpg" for number in range(len(vectors))]
    for number, rows in enumerate(np.array_split(np.arange(len(vectors)), num_shards)):
        write_shard(folder, number, [paths[row] for row in rows], list(vectors[rows]))
    return paths
