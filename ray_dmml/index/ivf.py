"""Approximate search: vectors are divided into lists by k-means, and a search reads the lists nearest to its query.

How many lists it has to read for a recall is measured: the index searches for a sample of its own rows, and the result
is compared with an exact search.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from ray_dmml.cores import num_cores
from ray_dmml.evaluation.neighbors import faiss_threads
from ray_dmml.index.embeddings import BLOCK_BYTES, Floats, Ints
from ray_dmml.index.store import Recall

Source = Callable[[], Iterable[tuple[Ints, Floats]]]
"""Gives the ids (n,) and vectors (n, D) of all rows, a block at a time, and can be called again."""

TRAINING_ROWS_PER_LIST = 40  # faiss asks for 39
NUM_QUERIES = 500
K = 10
_ROUNDING = 1e-6  # by which the same inner product may differ between two ways to compute it

logger = logging.getLogger(__name__)


def threads() -> AbstractContextManager[None]:
    """faiss uses all cores inside the block, or as many as OMP_NUM_THREADS or ``torch.set_num_threads`` say."""
    return faiss_threads(min(num_cores(), faiss.omp_get_max_threads()))


def num_lists(num_rows: int) -> int:
    """The power of two that is nearest to 4 sqrt(n), as faiss recommends, as far as there are rows to train it."""
    wanted = 2 ** round(np.log2(4 * num_rows**0.5))
    return int(max(1, min(wanted, num_rows // TRAINING_ROWS_PER_LIST)))


def train(size: int, source: Source, ids: Ints) -> Any:
    """An IVF index without rows, in memory. Its lists are chosen by k-means on a sample of the rows."""
    lists = num_lists(len(ids))
    sample = _sample(ids, TRAINING_ROWS_PER_LIST * lists)
    logger.info(f"choosing {lists:,} lists by k-means on {len(sample):,} of {len(ids):,} rows")
    index: Any = faiss.index_factory(size, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # few rows are no reason for a warning
    index.train(gather(source(), sample, size))
    return index


def stored(index: Any, ids: Ints) -> Iterator[tuple[Ints, Floats]]:
    """Ids and vectors of an index's rows, a block at a time. The ids of a flat index are given in their order."""
    block = max(256, BLOCK_BYTES // (4 * index.d))
    if not isinstance(index, faiss.IndexIVF):
        for start in range(0, index.ntotal, block):
            rows = ids[start : start + block]
            yield rows, np.asarray(index.reconstruct_n(start, len(rows)))  # a tensor beside faiss.contrib.torch_utils
        return
    lists: Any = index.invlists
    held: list[tuple[Ints, Floats]] = []
    num_held = 0
    for number in range(index.nlist):
        if length := lists.list_size(number):
            codes = faiss.rev_swig_ptr(lists.get_codes(number), length * index.d * 4)
            list_ids = faiss.rev_swig_ptr(lists.get_ids(number), length)
            held.append((list_ids, codes.view(np.float32).reshape(-1, index.d)))
            num_held += length
        if num_held >= block or (held and number == index.nlist - 1):
            yield np.concatenate([one for one, _ in held]), np.concatenate([one for _, one in held])
            held, num_held = [], 0


def gather(blocks: Iterable[tuple[Ints, Floats]], ids: Ints, size: int) -> Floats:
    """The vectors of some ids, which are sorted: (len(ids), size)."""
    vectors = np.empty((len(ids), size), np.float32)
    for block_ids, block in blocks:
        place = np.searchsorted(ids, block_ids).clip(max=len(ids) - 1)
        wanted = ids[place] == block_ids
        vectors[place[wanted]] = block[wanted]
    return vectors


def measure(index: Any, ids: Ints, target: float) -> Recall:
    """Sets ``index.nprobe`` to the fewest lists with which the index reaches the recall, and measures it."""
    k = min(K, len(ids) - 1)
    if k == 0:
        index.nprobe = 1
        return Recall(target=target)
    sample = _sample(ids, NUM_QUERIES)
    queries = gather(stored(index, ids), sample, index.d)
    worst = _exact(stored(index, ids), queries, sample, k)[:, -1:] - _ROUNDING

    def recall(num_probed: int) -> float:
        index.nprobe = num_probed
        similarities, found = index.search(queries, k + 1)
        return float((_without_self(similarities, found, sample, k) >= worst).mean())

    enough = 1
    while enough < index.nlist and recall(enough) < target:
        enough *= 2
    too_few, enough = enough // 2, min(enough, index.nlist)
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if recall(middle) < target:
            too_few = middle
        else:
            enough = middle
    return Recall(target=target, k=k, measured=recall(enough), num_queries=len(sample))


def search(
    index: Any, queries: Floats, k: int, num_probed: int | None = None, selector: Any = None
) -> tuple[Floats, Ints]:
    """Searches a flat index, or so many lists of an IVF index, among the rows of the selector."""
    params: Any = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]  # faiss's types lack it
    if num_probed is not None:
        params = faiss.SearchParametersIVF(nprobe=num_probed, sel=selector)  # type: ignore[call-arg]
    # pytorch-metric-learning imports faiss's wrapper for torch. Its search takes no parameters; it keeps the first one.
    return getattr(index, "search_numpy", index.search)(queries, k, params=params)


def selector(is_wanted: NDArray[np.bool_]) -> Any:
    """Selects the rows whose ids, or places in a flat index, are True."""
    return faiss.IDSelectorBitmap(np.packbits(is_wanted, bitorder="little"))  # type: ignore[call-arg, arg-type]


def _exact(blocks: Iterable[tuple[Ints, Floats]], queries: Floats, own: Ints, k: int) -> Floats:
    """The ``k`` highest similarities of each query to all rows but its own, (Q, k), the highest first."""
    best = np.full((len(queries), 0), -np.inf, np.float32)
    for ids, vectors in blocks:
        length = min(k + 1, len(ids))
        similarities, rows = faiss.knn(queries, vectors, length, metric=faiss.METRIC_INNER_PRODUCT)
        both = np.concatenate([best, _without_self(similarities, ids[rows], own, length)], axis=1)
        best = -np.sort(-both, axis=1)[:, :k]
    return best


def _without_self(similarities: Floats, ids: Ints, own: Ints, k: int) -> Floats:
    """The first ``k`` similarities of each row of (Q, n), after that of the query itself is taken out."""
    others = np.where(ids == own[:, None], -np.inf, similarities)
    return -np.sort(-others, axis=1)[:, :k]


def _sample(ids: Ints, number: int) -> Ints:
    """Some of the ids, sorted; the same in every call."""
    if number >= len(ids):
        return ids
    return np.sort(np.random.default_rng(0).choice(ids, number, replace=False, shuffle=False))


def in_turn(*sources: Source) -> Source:
    """The rows of several sources."""
    return lambda: chain.from_iterable(source() for source in sources)
