"""Builds an index of embeddings, and changes it: rows of new shards, rows removed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_dmml.data.decoding import printable
from ray_dmml.errors import UserError
from ray_dmml.index import ivf, store
from ray_dmml.index.embeddings import Embeddings, require_unique
from ray_dmml.index.image_index import ImageIndex, load_index
from ray_dmml.index.store import IndexInfo, Kind, Recall

logger = logging.getLogger(__name__)

MAX_FLAT = 200_000
"""Up to so many rows, every search is exact."""
GROWTH = 4
"""An IVF index that has grown by this factor chooses its lists again."""


def build_index(
    embeddings: Path | str,
    out: Path | str | None = None,
    *,
    kind: Kind | None = None,
    recall: float = 0.95,
    overwrite: bool = False,
) -> ImageIndex:
    """Builds an index of the embeddings that ``ray-dmml embed`` has written.

    Args:
        embeddings: the folder of ``ray-dmml embed``.
        out: the folder of the index. None: beside the embeddings, in their folder.
        kind: ``flat`` compares a query with every row. ``ivf`` compares it with the rows of a few lists. None takes
            flat up to 200,000 rows.
        recall: of ivf, the share of the 10 nearest rows that a search has to find.
        overwrite: replace an index that is there.

    Raises:
        UserError: there are no embeddings, a shard is damaged, or there is an index already.
    """
    source = Embeddings(Path(embeddings))
    folder = Path(out or embeddings)
    _require_recall(recall)
    shards = source.shards()
    if not shards:
        raise UserError(f"{source.folder} has no part-*.parquet: nothing is embedded yet")
    folder.mkdir(parents=True, exist_ok=True)
    with store.lock(folder):
        if store.is_index(folder) and not overwrite:
            raise UserError(f"{folder} has an index already; update it (--update) or replace it (--overwrite)")
        rows, num_unreadable = source.rows(list(shards), 0)
        require_unique(rows["path"])
        source.warn_if_unfinished(len(rows) + num_unreadable)
        if not len(rows):
            raise UserError(f"{source.folder} has no embeddings: none of its {num_unreadable} images could be read")
        automatic: Kind = "flat" if len(rows) <= MAX_FLAT else "ivf"
        info = IndexInfo(
            **source.info.model_dump(exclude={"run", "root", "num_images"}),
            run=source.info.run,
            root=source.info.root and _absolute(source.info.root),
            kind=kind or automatic,
            is_kind_given=kind is not None,
            num_unreadable=num_unreadable,
            next_id=len(rows),
            recall=Recall(target=recall),
            shards=shards,
            generation=store.next_generation(folder),
        )
        logger.debug("building the index of %s embeddings", f"{len(rows):,}")
        _build(folder, info, rows, partial(source.batches, list(shards), 0))
    return load_index(folder)


def update_index(embeddings: Path | str, index: Path | str | None = None, *, recall: float | None = None) -> ImageIndex:
    """Adds the rows of shards that are new since the index was built. The ids of other rows stay.

    Args:
        embeddings: the folder of ``ray-dmml embed``.
        index: the folder of the index. None: it is beside the embeddings.
        recall: as for :func:`build_index`. None: as before.

    Raises:
        UserError: another model has embedded the images, or a shard has changed or is damaged.
    """
    source = Embeddings(Path(embeddings))
    folder = Path(index or embeddings)
    info: IndexInfo
    with store.lock(folder):
        info, faiss_index, rows = store.read(folder, in_memory=True)
        target = _require_recall(info.recall.target if recall is None else recall)
        if source.info.model != info.model:
            raise UserError(f"the images of {source.folder} are embedded by another model than those of {folder}")
        shards = source.shards()
        for name, digest in shards.items():
            if info.shards.get(name, digest) != digest:
                raise UserError(f"{source.folder / name} has changed since it was indexed; build again (--overwrite)")
        new = [name for name in shards if name not in info.shards]
        if new or target != info.recall.target:
            added, num_unreadable = source.rows(new, info.next_id)
            blocks = partial(source.batches, new, info.next_id)
            all_rows = pa.concat_tables([rows, added])
            require_unique(all_rows["path"])
            outgrown = not info.is_kind_given and len(rows) <= MAX_FLAT < len(all_rows)
            if info.kind == "ivf":
                outgrown = len(all_rows) > GROWTH * (info.num_rows_trained or 0)
            info = store.changed(
                info,
                kind="ivf" if outgrown else info.kind,
                num_unreadable=info.num_unreadable + num_unreadable,
                next_id=info.next_id + len(added),
                recall=Recall(target=target),
                shards=info.shards | shards,
            )
            if outgrown:
                old = partial(ivf.stored, faiss_index, rows["id"].to_numpy())
                _build(folder, info, all_rows, ivf.in_turn(old, blocks))
            else:
                _add(faiss_index, blocks)
                _finish(folder, info, faiss_index, all_rows)
        source.warn_if_unfinished(info.next_id + info.num_unreadable)
    return load_index(folder)


def remove_rows(index: Path | str, paths: Iterable[str]) -> ImageIndex:
    """Removes the rows of these paths. The ids of other rows stay, and an update does not bring the removed ones back.

    Raises:
        UserError: a path is not in the index, or no row would be left.
    """
    folder = Path(index)
    gone = pa.array(sorted(set(paths)), pa.string())
    with store.lock(folder):
        info, faiss_index, rows = store.read(folder, in_memory=True)
        unknown = gone.filter(pc.invert(pc.is_in(gone, rows["path"])))
        if len(unknown):
            more = f" ({len(unknown)} of {len(gone)} are not)" if len(unknown) > 1 else ""
            raise UserError(f"{printable(unknown[0].as_py())} is not an image of the index {folder}{more}")
        is_gone = pc.is_in(rows["path"], gone)
        kept = rows.filter(pc.invert(is_gone))
        if not len(kept):
            raise UserError(f"the index {folder} would have no rows left")
        if len(kept) < len(rows):
            # A flat index numbers its rows by their place. An IVF index has their ids.
            numbers = rows["id"].to_numpy() if info.kind == "ivf" else np.arange(len(rows))
            faiss_index.remove_ids(numbers[is_gone.to_numpy()])
            _finish(folder, store.changed(info), faiss_index, kept)
    return load_index(folder)


def _build(folder: Path, info: IndexInfo, rows: pa.Table, blocks: ivf.Source) -> None:
    """Makes a new index of all rows and writes it."""
    if info.kind == "ivf":
        with ivf.threads():
            index = ivf.train(info.size, blocks, rows["id"].to_numpy())
        info = info.model_copy(update={"num_lists": index.nlist, "num_rows_trained": len(rows)})
    else:
        index = faiss.IndexFlatIP(info.size)
    _add(index, blocks)
    _finish(folder, info, index, rows)


def _add(index: Any, blocks: ivf.Source) -> None:
    with ivf.threads():
        for ids, vectors in blocks():
            if isinstance(index, faiss.IndexIVF):
                index.add_with_ids(vectors, ids)
            else:
                index.add(vectors)


def _finish(folder: Path, info: IndexInfo, index: Any, rows: pa.Table) -> None:
    """Measures the recall of an index and writes it."""
    changes: dict[str, Any] = {"num_rows": len(rows)}
    if info.kind == "ivf":
        with ivf.threads():
            changes["recall"] = ivf.measure(index, rows["id"].to_numpy(), info.recall.target)
        changes["num_probed"] = index.nprobe
    store.write(folder, info.model_copy(update=changes), index, rows)


def _absolute(place: str) -> str:
    return place if "://" in place else os.path.abspath(place)


def _require_recall(recall: float) -> float:
    if not 0 < recall <= 1:
        raise UserError(f"the recall must be above 0 and at most 1, not {recall:g}")
    return recall
