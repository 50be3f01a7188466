"""Exact nearest neighbours by inner product, with an order among ties that one can rely on.

faiss searches; it promises no order among equal similarities and may leave any of them out at the
end of its list. So equal gallery rows are searched for once and listed by index afterwards, rows of
the answer with other ties are sorted by index, and those where a tie reaches beyond what faiss
returned are computed again in full.
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

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Neighbours beyond k that are asked for, so that few ties reach the end of the list.
_SPARE = 16
# Entries of the largest buffers of a chunk (4 to 8 bytes each, a few buffers).
_CHUNK_ENTRIES = 2**22


def nearest(
    queries: NDArray[Any],
    gallery: NDArray[Any],
    k: int,
    *,
    exclude_self: bool | Ints,
    chunk: int | None = None,
) -> Iterator[tuple[slice, Ints]]:
    """The k nearest gallery rows of every query, best first, equally similar ones by lower index.

    Similarity is the inner product of the float32 rows as given, computed in float32: two gallery
    rows of equal bits are equally similar to any query; for different rows a tie is a tie of the
    rounded results, whose last bit may vary with ``chunk`` and the machine.

    Args:
        queries: (Q, D) float.
        gallery: (G, D) float.
        k: neighbours a query; clipped to what there is.
        exclude_self: True: query i is gallery row i and is left out, by index. An array (Q,) int64:
            the gallery row that each query is, -1 for none. False: nothing is left out.
        chunk: queries searched at a time; None: as memory suggests (about 100 MiB).

    Yields:
        A slice of the queries, in order, and their neighbours: (q, k) int64 gallery indices; -1
        ends the row of a query that is left out itself where others get the whole gallery.

    Raises:
        UserError: shapes do not fit, or embeddings are NaN or infinite.
    """
    queries, gallery = _checked(queries, "queries"), _checked(gallery, "gallery")
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"queries have {queries.shape[1]} numbers an embedding, the gallery {gallery.shape[1]}"
        )
    own = _own_rows(exclude_self, len(queries), len(gallery))
    excluding = bool((own >= 0).any())
    k = max(0, min(k, len(gallery) - bool((own >= 0).all())))
    need = min(k + excluding, len(gallery))
    groups = _Groups(gallery, need)
    distinct = gallery if groups.trivial else gallery[groups.first]
    chunk = chunk or int(np.clip(_CHUNK_ENTRIES // max(1, need + _SPARE), 16, 4096))
    for start in range(0, len(queries), chunk):
        rows = slice(start, min(start + chunk, len(queries)))
        if k == 0:
            yield rows, np.empty((rows.stop - start, 0), np.int64)
            continue
        found = groups.expand(*_search(queries[rows], distinct, need))
        if excluding:
            if need == k:
                found = np.pad(found, ((0, 0), (0, 1)), constant_values=-1)
            found = _without(found, own[rows])
        yield rows, found


class _Groups:
    """Gallery rows of equal bits, as one distinct row each, in order of first appearance.

    faiss's own results for equal rows may differ in the last bit, by their place in a block.
    """

    def __init__(self, gallery: Floats, need: int) -> None:
        keys: dict[bytes, int] = {}
        ids = (keys.setdefault(row.tobytes(), len(keys)) for row in gallery)
        of_row = np.fromiter(ids, np.int64, len(gallery))
        self.trivial = len(keys) == len(gallery)
        self.members = np.argsort(of_row, kind="stable")
        sizes = np.bincount(of_row, minlength=len(keys))
        self.starts = np.cumsum(sizes) - sizes
        self.first = self.members[self.starts]
        # Nobody asks for more than the first `need` of a group.
        self.sizes = np.minimum(sizes, need)
        self.need = need

    def expand(self, similarity: Floats, found: Ints) -> Ints:
        """(q, n) distinct rows, best first, to (q, need) gallery rows."""
        if self.trivial:
            return found
        sizes = self.sizes[found]
        result = np.empty((len(found), self.need), np.int64)
        plain = (sizes == 1).all(axis=1) & (found.shape[1] >= self.need)
        result[plain, : found.shape[1]] = self.first[found[plain]]
        for row in np.flatnonzero(~plain):
            # The groups before the list is full, and all that tie with the last of them.
            last = min(int(np.searchsorted(sizes[row].cumsum(), self.need)), found.shape[1] - 1)
            stop = np.searchsorted(-similarity[row], -similarity[row, last], side="right")
            count = sizes[row, :stop]
            inside = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
            index = self.members[np.repeat(self.starts[found[row, :stop]], count) + inside]
            order = np.lexsort((index, -np.repeat(similarity[row, :stop], count)))
            result[row] = index[order[: self.need]]
        return result


@contextmanager
def _faiss_on_all_cores() -> Iterator[None]:
    """Inside the block faiss uses every core, whatever a training in this process has set.

    The last bit of its similarities depends on the number of threads.
    """
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_cores())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _search(queries: Floats, gallery: Floats, need: int) -> tuple[Floats, Ints]:
    """Similarities and indices of the `need` best rows (all, if fewer), ties by lower index."""
    need = min(need, len(gallery))
    asked = min(need + _SPARE, len(gallery))
    with _faiss_on_all_cores():
        similarity, found = faiss.knn(queries, gallery, asked, metric=faiss.METRIC_INNER_PRODUCT)
    tied = np.flatnonzero((similarity[:, 1:] == similarity[:, :-1]).any(axis=1))
    order = np.lexsort((found[tied], -similarity[tied]), axis=1)
    found[tied] = np.take_along_axis(found[tied], order, axis=1)
    if asked < len(gallery):
        cut = np.flatnonzero(similarity[:, need - 1] == similarity[:, -1])
        block = max(1, _CHUNK_ENTRIES // len(gallery))
        for start in range(0, len(cut), block):
            rows = cut[start : start + block]
            similarity[rows, :need], found[rows, :need] = _in_full(queries[rows], gallery, need)
    return similarity[:, :need], found[:, :need]


def _in_full(queries: Floats, gallery: Floats, need: int) -> tuple[Floats, Ints]:
    """As :func:`_search`, from all similarities."""
    similarity = queries @ gallery.T
    place = len(gallery) - need
    threshold = np.partition(similarity, place, axis=1)[:, place]
    found = np.empty((len(queries), need), np.int64)
    for row, (values, limit) in enumerate(zip(similarity, threshold, strict=True)):
        above = np.flatnonzero(values > limit)
        level = np.flatnonzero(values == limit)[: need - len(above)]
        above = above[np.argsort(-values[above], kind="stable")]
        found[row] = np.concatenate([above, level])
    return np.take_along_axis(similarity, found, axis=1), found


def _without(found: Ints, own: Ints) -> Ints:
    """(q, n) to (q, n - 1): drops each row's own index, or its last entry where it is not there."""
    drop = found == own[:, None]
    drop[~drop.any(axis=1), -1] = True
    kept: Ints = found[~drop].reshape(len(found), found.shape[1] - 1)
    return kept


def _checked(embeddings: NDArray[Any], name: str) -> Floats:
    array = np.asarray(embeddings)
    if array.ndim != 2 or array.shape[1] == 0:
        raise UserError(f"{name} must be embeddings of shape (N, D), not {array.shape}")
    array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        raise UserError(
            f"{len(bad)} of {len(array)} embeddings of the {name} are NaN or infinite, "
            f"the first is number {bad[0]}"
        )
    return array


def _own_rows(exclude_self: bool | Ints, num_queries: int, num_gallery: int) -> Ints:
    """(Q,) the gallery row that each query is, -1 for none."""
    if exclude_self is False:
        return np.full(num_queries, -1)
    if exclude_self is True:
        if num_queries != num_gallery:
            raise UserError(
                f"to leave out query i as gallery row i both must be as many: "
                f"{num_queries} queries, {num_gallery} in the gallery"
            )
        return np.arange(num_queries)
    return np.asarray(exclude_self, dtype=np.int64)
