"""Exact nearest neighbours by inner product, with ties in the order of their indices.

faiss searches, or torch where there is a GPU and the search is large. But they guarantee no order among equal
similarities, and at the end of their list they may omit any of them. Three steps make the order reliable:

1. Equal gallery rows are searched for once. Afterwards they are listed by index.
2. Other ties within a result are sorted by index.
3. Where a tie continues beyond the end of a result, the query is computed again against the whole gallery.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from ray_dmml.cores import num_cores
from ray_dmml.errors import UserError
from ray_dmml.evaluation.gpu_search import gallery_on_gpu

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_SPARE = 16  # neighbours beyond k in each search, so that few ties reach the end of a result
_CHUNK_ENTRIES = 2**22  # of the largest buffers of a chunk: a few buffers of 4 to 8 bytes an entry


def nearest(
    queries: NDArray[Any],
    gallery: NDArray[Any],
    k: int,
    *,
    exclude: tuple[Ints, Ints] | None = None,
    chunk: int | None = None,
) -> Iterator[tuple[slice, Ints, Floats]]:
    """Finds the k nearest gallery rows of every query, the most similar first, ties by lower index.

    Similarity is the inner product of the rows, computed in float32. Two equal gallery rows are equally
    similar to any query. Two different rows are tied when their rounded similarities are equal; the last
    bit of these may vary with ``chunk`` and the machine.

    Args:
        queries: (Q, D) float.
        gallery: (G, D) float.
        k: neighbours per query, at least 1. A k above the size of the gallery gives the whole gallery.
        exclude: (Q,) and (G,) int64, ids of the queries and of the gallery rows. A row with the id of a query is not
            its neighbour. None: every row may be.
        chunk: queries per search; None chooses as many as need about 200 MiB.

    Yields:
        A slice of the queries, in order, their neighbours as gallery indices, (q, k) int64, and the similarities of
        these, (q, k) float32. Where a query has fewer than k neighbours, its row ends with -1, and NaN.

    Raises:
        UserError: shapes do not fit, or embeddings are NaN or infinite.
    """
    queries, gallery = _checked(queries, "queries"), _checked(gallery, "gallery")
    if queries.shape[1] != gallery.shape[1]:
        sizes = f"{queries.shape[1]} dimensions, those of the gallery {gallery.shape[1]}"
        raise UserError(f"the embeddings of the queries have {sizes}")
    num_excluded = np.zeros(len(queries), np.int64) if exclude is None else _count(*exclude)
    k = min(k, len(gallery) - int(num_excluded.min(initial=len(gallery))))
    need = min(k + int(num_excluded.max(initial=0)), len(gallery))
    groups = _Groups(gallery, need)
    distinct = gallery if len(groups.first) == len(gallery) else gallery[groups.first]
    chunk = chunk or int(np.clip(_CHUNK_ENTRIES // (need + _SPARE), 16, 4096))
    search = _Search(distinct, len(queries))
    for start in range(0, len(queries), chunk):
        rows = slice(start, min(start + chunk, len(queries)))
        neighbors, similarities = groups.expand(*search.nearest(queries[rows], need))
        if exclude is not None and need > 0:
            allowed = exclude[1][neighbors] != exclude[0][rows, None]
            neighbors, similarities = _first(k, allowed, neighbors, similarities)
        yield rows, neighbors, similarities


@contextmanager
def faiss_threads(number: int) -> Iterator[None]:
    """faiss computes with this number of threads inside the block. Otherwise they are as many as torch's."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class _Groups:
    """Groups of equal gallery rows, in the order of their first rows.

    faiss needs one row of each group: its similarities of equal rows may differ in the last bit.
    """

    def __init__(self, gallery: Floats, need: int) -> None:
        keys: dict[bytes, int] = {}
        group_of_row = np.array([keys.setdefault(row.tobytes(), len(keys)) for row in gallery])
        sizes = np.bincount(group_of_row)
        self.members = np.argsort(group_of_row, kind="stable")
        self.starts = np.cumsum(sizes) - sizes
        self.first = self.members[self.starts]
        self.sizes = np.minimum(sizes, need)  # no result contains more rows of a group
        self.need = need

    def expand(self, similarity: Floats, distinct: Ints) -> tuple[Ints, Floats]:
        """(q, n) numbers of groups, the most similar first -> (q, need) gallery rows and their similarities."""
        num_distinct = distinct.shape[1]
        if num_distinct >= self.need and self.sizes.max() == 1:
            return self.first[distinct], similarity
        sizes = self.sizes[distinct]
        result = np.empty((len(distinct), self.need), np.int64)
        similarities = np.empty(result.shape, np.float32)
        plain = (sizes == 1).all(axis=1) & (num_distinct >= self.need)
        result[plain, :num_distinct] = self.first[distinct[plain]]
        similarities[plain, :num_distinct] = similarity[plain]
        for row in np.flatnonzero(~plain):
            # As many groups as fill the result, and all that tie with the last of them.
            last = min(int(np.searchsorted(sizes[row].cumsum(), self.need)), num_distinct - 1)
            stop = np.searchsorted(-similarity[row], -similarity[row, last], side="right")
            count = sizes[row, :stop]
            inside = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
            index = self.members[np.repeat(self.starts[distinct[row, :stop]], count) + inside]
            values = np.repeat(similarity[row, :stop], count)
            order = np.lexsort((index, -values))[: self.need]
            result[row], similarities[row] = index[order], values[order]
        return result, similarities


def _count(queries: Ints, gallery: Ints) -> Ints:
    """(Q,) how many gallery rows have the id of each query."""
    ids, counts = np.unique(gallery, return_counts=True)
    place = np.minimum(np.searchsorted(ids, queries), len(ids) - 1)
    return np.where(ids[place] == queries, counts[place], 0)


def _first(k: int, allowed: NDArray[np.bool_], neighbors: Ints, similarities: Floats) -> tuple[Ints, Floats]:
    """The first k entries of each row that are allowed."""
    allowed &= np.cumsum(allowed, axis=1, dtype=np.int32) <= k
    is_filled = np.arange(k) < allowed.sum(axis=1)[:, None]
    first, their_similarities = np.full(is_filled.shape, -1), np.full(is_filled.shape, np.nan, np.float32)
    first[is_filled], their_similarities[is_filled] = neighbors[allowed], similarities[allowed]
    return first, their_similarities


class _Search:
    """A search in different gallery rows, on a GPU or a CPU."""

    def __init__(self, gallery: Floats, num_queries: int) -> None:
        self._gallery = gallery
        self._on_gpu = gallery_on_gpu(gallery, num_queries)

    def nearest(self, queries: Floats, need: int) -> tuple[Floats, Ints]:
        """Similarities and indices of the `need` most similar rows (or of all rows), ties by lower index."""
        need = min(need, len(self._gallery))
        similarity, indices = self._knn(queries, min(need + _SPARE, len(self._gallery)))
        return _in_order(queries, self._gallery, need, similarity, indices)

    def _knn(self, queries: Floats, k: int) -> tuple[Floats, Ints]:
        if self._on_gpu is not None:
            if (found := self._on_gpu.nearest(queries, k)) is not None:
                return found
            self._on_gpu = None  # the peers may be on it, too
        # The last bit of faiss's similarities depends on the number of threads, which a training may have set.
        with faiss_threads(num_cores()):
            similarity, indices = faiss.knn(queries, self._gallery, k, metric=faiss.METRIC_INNER_PRODUCT)
        return similarity, indices


def _in_order(queries: Floats, gallery: Floats, need: int, similarity: Floats, indices: Ints) -> tuple[Floats, Ints]:
    """The first `need` of (q, n >= need) nearest rows, ties by lower index, also those beyond the n."""
    searched = similarity.shape[1]
    tied = np.flatnonzero((similarity[:, 1:] == similarity[:, :-1]).any(axis=1))
    order = np.lexsort((indices[tied], -similarity[tied]), axis=1)
    indices[tied] = np.take_along_axis(indices[tied], order, axis=1)
    if searched < len(gallery):
        cut = np.flatnonzero(similarity[:, need - 1] == similarity[:, -1])
        block = max(1, _CHUNK_ENTRIES // len(gallery))
        for start in range(0, len(cut), block):
            rows = cut[start : start + block]
            to_all = queries[rows] @ gallery.T
            indices[rows, :need] = np.argsort(-to_all, axis=1, kind="stable")[:, :need]
            similarity[rows, :need] = np.take_along_axis(to_all, indices[rows, :need], axis=1)
    return similarity[:, :need], indices[:, :need]


def _checked(embeddings: NDArray[Any], name: str) -> Floats:
    array = np.asarray(embeddings)
    if array.ndim != 2 or array.shape[1] == 0:
        raise UserError(f"{name} must be embeddings of shape (N, D), not {array.shape}")
    array = np.ascontiguousarray(array, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        what = f"{len(bad)} of {len(array)} embeddings of the {name} are NaN or infinite"
        raise UserError(f"{what}, the first is number {bad[0]}")
    return array
