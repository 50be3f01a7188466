"""The file of ``ray-dmml evaluate --embeddings``: paths, classes and embeddings of the evaluated images, as Parquet."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from ray_dmml.data.dataset import ImageSet
from ray_dmml.errors import UserError

NAMES = ("path", "label")
"""The first columns. The others are named after peers."""

ROWS_AT_A_TIME = 8192


def require_new(path: Path) -> None:
    """Raises UserError if the file exists, or its folder does not or cannot be written to."""
    if os.path.lexists(path):
        raise UserError(f"{path} already exists; remove it, or give another file")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: {path.parent} is not an existing folder")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: {path.parent} is a folder without the permission to write")


def require_columns(systems: Collection[str]) -> None:
    """Raises UserError if a peer has the name of another column."""
    if taken := [name for name in systems if name in NAMES]:
        raise UserError(f"the embeddings of a peer named {taken[0]} have no column: {' and '.join(NAMES)} are taken")


def write_embeddings(path: Path, images: ImageSet, embeddings: Mapping[str, np.ndarray]) -> None:
    """Writes a row for each image: ``path`` (its name), ``label`` (its class), and a column of each system.

    The file gets its name when it is complete. The names of images that are not UTF-8 have escaped bytes.

    Args:
        path: the file, which must not exist.
        images: the N images.
        embeddings: (N, D) float32 of each system, a list of D numbers in each row.

    Raises:
        UserError: the file exists or cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    require_new(path)
    require_columns(embeddings)
    fields = [(name, pa.list_(pa.float32(), vectors.shape[1])) for name, vectors in embeddings.items()]
    schema = pa.schema([*((name, pa.string()) for name in NAMES), *fields])
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # no file of somebody else
    try:
        with pq.ParquetWriter(aside, schema) as writer:
            for start in range(0, len(images), ROWS_AT_A_TIME):
                rows = range(start, min(start + ROWS_AT_A_TIME, len(images)))
                columns = [
                    [_text(images.source.name(row)) for row in rows],
                    [_text(images.class_names[images.labels[row]]) for row in rows],
                ]
                for vectors in embeddings.values():
                    flat = pa.array(np.asarray(vectors[rows.start : rows.stop], np.float32).reshape(-1))
                    columns.append(pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
                writer.write_table(pa.table(columns, schema))
        require_new(path)
        os.replace(aside, path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    finally:
        with suppress(OSError):
            aside.unlink()


def _text(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
