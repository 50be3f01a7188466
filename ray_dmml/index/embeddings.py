"""Reads the folder that ``ray-dmml embed`` has written: embed.json and part-*.parquet, within bounds on memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from ray_dmml.data.decoding import printable
from ray_dmml.errors import UserError, first_fault

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

BLOCK_BYTES = 2**25
"""Of the embeddings that are read at a time, as float32."""

ROWS = pa.schema([("id", pa.int64()), ("path", pa.string()), ("width", pa.int32()), ("height", pa.int32())])
"""The columns of rows.parquet."""

UNIT_TOLERANCE = 0.01
"""Of the length of an embedding. Rounding to float16 changes it by less than 0.001."""

logger = logging.getLogger(__name__)


class EmbedInfo(BaseModel):
    """What embed.json says. Other keys are ignored."""

    model: str
    peer: str
    size: int
    root: str | None = None
    run: str
    weights: str | None = None
    num_images: int | None = None


class Embeddings:
    """The embeddings of a folder of shards. Rows with an error are left out.

    Raises:
        UserError: the folder is not written by ``ray-dmml embed``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.info = EmbedInfo.model_validate_json((folder / "embed.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder} has no embed.json: it is not a folder of `ray-dmml embed`") from None
        except ValidationError as error:
            raise UserError(f"{folder / 'embed.json'} is damaged: {first_fault(error)}") from None
        self.block_rows = max(256, BLOCK_BYTES // (4 * self.info.size))

    def shards(self) -> dict[str, str]:
        """The shards' names in order, and a hash of each one's footer, which has statistics of all its columns."""
        files = sorted(self.folder.glob("part-*.parquet"))
        return {file.name: self._footer_hash(file) for file in files}

    def rows(self, shards: Sequence[str], first_id: int) -> tuple[pa.Table, int]:
        """The rows of shards that have an embedding, numbered from ``first_id``, and how many have none.

        Raises:
            UserError: a shard is damaged.
        """
        parts = [ROWS.empty_table()]
        num_rows = 0
        for shard in shards:
            read = self._read(shard).iter_batches(columns=["path", "width", "height", "error"])
            for batch in self._guarded(shard, read):
                num_rows += len(batch)
                fine = batch.filter(pc.is_null(batch["error"]))
                ids = pa.array(np.arange(first_id, first_id + len(fine)))
                first_id += len(fine)
                columns = [ids, *(fine[name] for name in ROWS.names[1:])]
                parts.append(pa.table(columns, names=ROWS.names).cast(ROWS))
        rows = pa.concat_tables(parts)
        return rows, num_rows - len(rows)

    def batches(self, shards: Sequence[str], first_id: int) -> Iterator[tuple[Ints, Floats]]:
        """Ids (n,) and embeddings (n, D) of the same rows, in the same order, a block at a time.

        Raises:
            UserError: a shard is damaged, or its embeddings are not of size D and of unit length.
        """
        for shard in shards:
            read = self._read(shard).iter_batches(self.block_rows, columns=["embedding", "error"])
            for batch in self._guarded(shard, read):
                vectors = self._vectors(batch, shard)
                yield np.arange(first_id, first_id + len(vectors)), vectors
                first_id += len(vectors)

    def _vectors(self, batch: pa.RecordBatch, shard: str) -> Floats:
        """The embeddings of a batch, (n, D) float32 of unit length."""
        lists = batch["embedding"].filter(pc.is_null(batch["error"]))
        width = lists.type.list_size if pa.types.is_fixed_size_list(lists.type) else None
        if width != self.info.size or lists.null_count:
            raise UserError(
                f"{self.folder / shard} is damaged: not every row has an embedding of size {self.info.size}"
            )
        flat = lists.flatten().to_numpy(zero_copy_only=False)
        vectors = np.ascontiguousarray(flat.reshape(-1, width), dtype=np.float32)
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        bad = np.flatnonzero(~(np.abs(lengths - 1) < UNIT_TOLERANCE))
        if len(bad):
            raise UserError(
                f"{self.folder / shard} is damaged: an embedding has length {lengths[bad[0]]:g} instead of 1"
            )
        return vectors / lengths[:, None] if flat.dtype == np.float16 else vectors

    def _read(self, shard: str) -> pq.ParquetFile:
        file = self.folder / shard
        try:
            opened = pq.ParquetFile(file, buffer_size=2**20)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} cannot be read: {_first_line(error)}") from None
        missing = {"path", "embedding", "width", "height", "error"} - set(opened.schema_arrow.names)
        if missing:
            raise UserError(f"{file} is not a shard of `ray-dmml embed`: it has no column {', '.join(sorted(missing))}")
        return opened

    def _guarded(self, shard: str, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.folder / shard} is damaged: {_first_line(error)}") from None

    def _footer_hash(self, file: Path) -> str:
        with open(file, "rb") as opened:
            opened.seek(0, 2)
            size = opened.tell()
            opened.seek(max(0, size - 8))
            length = int.from_bytes(opened.read(4), "little")
            opened.seek(max(0, size - 8 - length))
            return hashlib.sha256(opened.read()).hexdigest()

    def warn_if_unfinished(self, num_rows: int) -> None:
        """Warns that shards are missing, when those that are there have so many rows."""
        if self.info.num_images is not None and num_rows < self.info.num_images:
            done = f"{num_rows:,} of {self.info.num_images:,} images"
            logger.warning(f"{self.folder} has {done}: the rest can be added with --update when they are embedded")


def require_unique(paths: pa.ChunkedArray) -> None:
    """Raises UserError if a path is there twice."""
    counts = pc.value_counts(paths)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise UserError(f"{printable(str(twice[0]['values']))} has two rows; every path must have one")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
