"""The folder of an index, and that a change of it happens in one move.

index.json      what is in it: model, size, kind, parameters, measured recall, and the names of the other two files
index.faiss     the vectors, as faiss writes them
rows.parquet    id, path, width and height of each row, in the order of their ids

A change writes new files beside the old ones (``index-1.faiss``), and then replaces index.json. Whoever has loaded the
old files keeps them.
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ray_dmml.atomic_files import wait_for_disk
from ray_dmml.errors import UserError, first_fault
from ray_dmml.index.embeddings import ROWS
from ray_dmml.training.run_dir import lock_folder

Kind = Literal["flat", "ivf"]
_OURS = re.compile(r"index(-\d+)?\.faiss|rows(-\d+)?\.parquet|index\.json\.tmp")


def _versions() -> dict[str, str]:
    """Of the packages that make an index."""
    return {name: metadata.version(name) for name in ("ray-dmml", "faiss-cpu", "pyarrow", "numpy")}


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Recall(Strict):
    """How many of the true ``k`` nearest neighbours a search finds."""

    target: float
    k: int = 10
    measured: float = 1
    num_queries: int = 0
    """Rows of the index that were searched for, without themselves in the result. 0: the search is exact."""


class Files(Strict):
    vectors: str
    vectors_bytes: int
    rows: str


class IndexInfo(Strict):
    """The content of index.json."""

    model: str
    """The hash of the model that embedded the images."""
    peer: str
    run: str
    weights: str | None
    root: str | None
    size: int
    kind: Kind
    is_kind_given: bool
    """Whether the user has chosen the kind. Otherwise a flat index that grows too large becomes an IVF index."""
    num_rows: int = 0
    num_unreadable: int
    """Images without an embedding, which are left out."""
    next_id: int
    """The id of the next new row. Ids of removed rows are not used again."""
    num_lists: int | None = None
    """Of an IVF index: into how many lists the vectors are divided."""
    num_probed: int | None = None
    """Of an IVF index: how many lists a search reads."""
    num_rows_trained: int | None = None
    """Of an IVF index: its rows when the lists were chosen."""
    recall: Recall
    shards: dict[str, str]
    """The shards whose rows were added, with a hash."""
    versions: dict[str, str] = Field(default_factory=_versions)
    generation: int
    """The number of changes."""


class StoredInfo(IndexInfo):
    """The content of index.json with the names of the other files."""

    files: Files


def changed(info: IndexInfo, **updates: Any) -> IndexInfo:
    """The content of index.json after a change."""
    return info.model_copy(update={"versions": _versions(), "generation": info.generation + 1, **updates})


def next_generation(folder: Path) -> int:
    """0 for a new index. A damaged one is replaced by whatever number."""
    try:
        return read_info(folder).generation + 1
    except UserError:
        return int(is_index(folder))


def is_index(folder: Path) -> bool:
    """Whether there is an index in the folder, damaged or not."""
    return os.path.isfile(folder / "index.json")


def read_info(folder: Path) -> StoredInfo:
    """Raises UserError if the folder is not an index or its index.json is damaged."""
    file = folder / "index.json"
    try:
        return StoredInfo.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not an index: it has no index.json; `ray-dmml index` writes one") from None
    except ValidationError as error:
        raise UserError(f"{file} is damaged: {first_fault(error)}") from None


def read(folder: Path, *, in_memory: bool = False) -> tuple[StoredInfo, Any, pa.Table]:
    """The index of a folder: what index.json says, the faiss index, and the rows.

    Args:
        in_memory: read the vectors into memory, where they can be changed. Otherwise the file is mapped.

    Raises:
        UserError: the folder is not an index, or it is damaged.
    """
    info = read_info(folder)
    try:
        return info, *_read_files(folder, info, in_memory)
    except FileNotFoundError:  # a change may have removed the files of the index.json that was just read
        newer = read_info(folder)
        if newer == info:
            raise UserError(f"the index {folder} is damaged: it has lost a file that its index.json names") from None
        return newer, *_read_files(folder, newer, in_memory)


def _read_files(folder: Path, info: StoredInfo, in_memory: bool) -> tuple[Any, pa.Table]:
    file = folder / info.files.vectors
    damaged = f"the index {folder} is damaged: "
    if (size := os.stat(file).st_size) != info.files.vectors_bytes:
        raise UserError(f"{damaged}{file.name} has {size:,} bytes instead of {info.files.vectors_bytes:,}")
    try:
        index = faiss.read_index(str(file), 0 if in_memory else faiss.IO_FLAG_MMAP_IFC)
        rows = pq.read_table(folder / info.files.rows, memory_map=True).combine_chunks()
    except (RuntimeError, MemoryError, pa.ArrowException) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"{damaged}{file.name} or {info.files.rows} cannot be read") from None
    has_ids = rows.schema.equals(ROWS) and bool((np.diff(rows["id"].to_numpy()) > 0).all())
    kind = {faiss.IndexFlatIP: "flat", faiss.IndexFlat: "flat", faiss.IndexIVFFlat: "ivf"}.get(type(index))
    found = (kind, index.d, index.ntotal, len(rows), index.metric_type)
    if not has_ids or found != (info.kind, info.size, info.num_rows, info.num_rows, faiss.METRIC_INNER_PRODUCT):
        raise UserError(f"{damaged}its files do not belong together")
    return index, rows


def write(folder: Path, info: IndexInfo, index: Any, rows: pa.Table) -> None:
    """Makes this the index of the folder, in one move. The folder must be locked.

    Raises:
        UserError: the disk is full or cannot be written; the old index is then unchanged.
    """
    suffix = f"-{info.generation}" if info.generation else ""
    names = {"vectors": f"index{suffix}.faiss", "rows": f"rows{suffix}.parquet"}
    _remove_others(folder, _names_in_use(folder))  # of a process that was killed
    written = [folder / name for name in (*names.values(), "index.json.tmp")]
    try:
        faiss.write_index(index, str(written[0]))
        pq.write_table(rows, written[1])
        size = written[0].stat().st_size
        content = info.model_dump() | {"files": {**names, "vectors_bytes": size}}
        written[2].write_text(StoredInfo.model_validate(content).model_dump_json(indent=1))
        for file in (*written, folder):
            wait_for_disk(file)
        os.replace(written[2], folder / "index.json")
    except (OSError, RuntimeError) as error:  # faiss raises RuntimeError where it cannot write
        for file in written:
            with suppress(OSError):
                file.unlink()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is the disk full?"
        raise UserError(f"the index {folder} cannot be written: {reason}") from None
    wait_for_disk(folder)
    _remove_others(folder, set(names.values()))


def lock(folder: Path) -> AbstractContextManager[None]:
    """Keeps other processes from changing what is in this folder, see :mod:`~ray_dmml.training.run_dir`."""
    return lock_folder(folder, "embedding or indexing")


def _names_in_use(folder: Path) -> set[str]:
    with suppress(UserError):
        files = read_info(folder).files
        return {files.vectors, files.rows}
    return set()


def _remove_others(folder: Path, in_use: set[str]) -> None:
    """Removes files that an index has written and index.json does not name."""
    for file in folder.iterdir():
        if _OURS.fullmatch(file.name) and file.name not in in_use:
            with suppress(OSError):
                file.unlink()
