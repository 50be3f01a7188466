"""An index of images in use: nearest rows, their paths and vectors."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_dmml.data.decoding import printable
from ray_dmml.errors import UserError
from ray_dmml.index import ivf
from ray_dmml.index.embeddings import UNIT_TOLERANCE, Floats, Ints
from ray_dmml.index.store import IndexInfo, read


class _Among(NamedTuple):
    """Some rows, among which is searched."""

    number: int
    selector: Any
    """None: all rows."""


class ImageIndex:
    """Nearest images by the inner product of unit vectors. Several threads may search at the same time.

    Attributes:
        folder: where the index is.
        info: the content of its index.json.
        rows: a table of the rows, in the order of their ids: id (int64), path, width, height (int32).
    """

    def __init__(self, folder: Path, info: IndexInfo, index: Any, rows: pa.Table) -> None:
        self.folder, self.info, self.rows = folder, info, rows
        self._ids: Ints = rows["id"].to_numpy()
        self._index = index
        self._lock, self._has_places = threading.Lock(), False
        self._among = lru_cache(maxsize=64)(self._rows_with)
        if info.num_probed is not None:
            index.nprobe = info.num_probed

    def __len__(self) -> int:
        return self.info.num_rows

    @property
    def model(self) -> str:
        """The hash of the model that embedded the images."""
        return self.info.model

    @property
    def size(self) -> int:
        """The size D of an embedding."""
        return self.info.size

    @property
    def root(self) -> str | None:
        """Where paths are relative to."""
        return self.info.root

    def search(self, embeddings: Floats, k: int, *, prefix: str = "") -> tuple[Floats, Ints]:
        """Finds the ``k`` rows that are most similar to each query.

        Args:
            embeddings: (Q, D) float32, of unit length.
            k: at least 1.
            prefix: only rows whose path begins with it, such as the name of a folder and a slash.

        Returns:
            Similarities (Q, k) float32, the highest first, and ids (Q, k) int64. Where there are fewer than ``k``
            rows, the last similarities are -inf and their ids -1.

        Raises:
            UserError: the embeddings are not of size D or not of unit length, or ``k`` is below 1.
        """
        queries = self._checked(embeddings)
        if k < 1:
            raise UserError(f"k must be at least 1, not {k}")
        among = self._among(prefix)
        found = min(k, among.number)
        similarities = np.full((len(queries), k), -np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int64)
        if len(queries) and found:
            with ivf.threads():
                similarities[:, :found], ids[:, :found] = self._nearest(queries, found, among)
        return similarities, ids

    def _nearest(self, queries: Floats, k: int, among: _Among) -> tuple[Floats, Ints]:
        if self.info.kind == "flat":
            similarities, labels = ivf.search(self._index, queries, k, selector=among.selector)
            return similarities, self._ids[labels]
        # Few of the rows in a list may be wanted, so more lists are read for as many rows.
        probed = min(-(-self._index.nprobe * len(self) // among.number), self._index.nlist)
        similarities, labels = ivf.search(self._index, queries, k, probed, among.selector)
        # The lists that were read may have too few rows. These queries are repeated in more lists.
        while len(short := np.flatnonzero((labels < 0).any(axis=1))):
            probed = min(4 * probed, self._index.nlist)
            similarities[short], labels[short] = ivf.search(self._index, queries[short], k, probed, among.selector)
        return similarities, labels

    def _rows_with(self, prefix: str) -> _Among:
        if not prefix:
            return _Among(len(self), None)
        places = np.flatnonzero(pc.starts_with(self.rows["path"], prefix).to_numpy())
        labels = places if self.info.kind == "flat" else self._ids[places]
        is_wanted = np.zeros(labels.max(initial=0) + 1, bool)
        is_wanted[labels] = True
        return _Among(len(places), ivf.selector(is_wanted))

    def paths(self, ids: Iterable[int]) -> list[str]:
        """The paths of rows, in the order of their ids given.

        Raises:
            UserError: there is no such row.
        """
        places = self._places(np.fromiter(ids, np.int64))
        return self.rows["path"].take(pa.array(places)).to_pylist()

    def id_of(self, path: str) -> int:
        """The id of the row with this path, as it is written in the index.

        Raises:
            UserError: there is no such row.
        """
        place = pc.index(self.rows["path"], path).as_py()
        if place < 0:
            where = f"; paths are relative to {self.root}" if self.root else ""
            raise UserError(f"{printable(path)} is not an image of the index {self.folder}{where}")
        return int(self._ids[place])

    def vector(self, id: int) -> Floats:
        """The embedding of a row, (D,) float32.

        Raises:
            UserError: there is no such row.
        """
        [place] = self._places(np.array([id]))
        if self.info.kind == "flat":
            return np.asarray(self._index.reconstruct(int(place)))
        with self._lock:
            if not self._has_places:  # the first call reads all ids
                self._index.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
                self._has_places = True
        return np.asarray(self._index.reconstruct(int(id)))

    def _places(self, ids: Ints) -> Ints:
        places = np.searchsorted(self._ids, ids)
        known = self._ids[places.clip(max=len(self) - 1)] == ids
        if not known.all():
            raise UserError(f"the index {self.folder} has no row {ids[~known][0]}")
        return places

    def _checked(self, embeddings: Floats) -> Floats:
        queries = np.ascontiguousarray(embeddings, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.size:
            raise UserError(f"queries must be embeddings of shape (Q, {self.size}), not {np.shape(embeddings)}")
        lengths = np.linalg.norm(queries, axis=1)
        bad = np.flatnonzero(~(np.abs(lengths - 1) < UNIT_TOLERANCE))
        if len(bad):
            raise UserError(f"query {bad[0]} has length {lengths[bad[0]]:g}; embeddings must have length 1")
        return queries


def load_index(folder: Path | str) -> ImageIndex:
    """Loads the index that ``ray-dmml index`` has written. The vectors stay on the disk and are mapped into memory.

    Raises:
        UserError: the folder is not an index, or it is damaged.
    """
    return ImageIndex(Path(folder), *read(Path(folder)))
