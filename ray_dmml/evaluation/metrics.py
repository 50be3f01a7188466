"""Recall@K, MAP@R and R-precision of a set of embeddings, from one nearest-neighbour search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dmml.errors import UserError
from ray_dmml.evaluation.neighbors import Ints, nearest


def retrieval_metrics(
    embeddings: NDArray[Any],
    labels: NDArray[Any],
    *,
    recall_at: Sequence[int],
    query: NDArray[Any] | None = None,
    gallery: NDArray[Any] | None = None,
    chunk: int | None = None,
) -> dict[str, float]:
    """Computes retrieval metrics: do the nearest images of a query belong to its class?

    Neighbours are ranked by inner product, ties by the order of the images, and a query never retrieves itself. Its R
    relevant images are the other images of its class in the gallery. Each metric is a mean over the queries with R > 0.
    The order of ``query`` and ``gallery`` changes nothing.

    - ``recall@K``: share of queries with at least one relevant image among the K nearest.
    - ``r_precision``: share of relevant images among the R nearest.
    - ``map@r``: the precisions among the i nearest, summed over the ranks i <= R with a relevant image
      and divided by R.

    Args:
        embeddings: (N, D) float, L2-normalised.
        labels: (N,) int64 classes.
        recall_at: the values of K. A K above the size of the gallery means the whole gallery.
        query: (Q,) int64 indices of the query images; None means all images.
        gallery: (G,) int64 indices of the gallery images, without duplicates; None means all images.
        chunk: queries per search, see :func:`~ray_dmml.evaluation.neighbors.nearest`.

    Returns:
        Fractions in [0, 1] by the names above, such as ``recall@1``.

    Raises:
        UserError: embeddings are NaN or infinite, sizes do not fit, a K is below 1, the gallery holds an
            image twice, or no query has another image of its class.

    References:
        Musgrave, Belongie, Lim, *A Metric Learning Reality Check*, ECCV 2020, https://arxiv.org/abs/2003.08505
    """
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    if labels.shape != embeddings.shape[:1]:
        raise UserError(f"{len(embeddings)} embeddings have labels of shape {labels.shape}")
    if not recall_at or min(recall_at) < 1:
        raise UserError(f"recall_at must hold one or more K of at least 1, not {list(recall_at)}")
    everything = np.arange(len(labels))
    # In the order of the images, so that ties and sums do not depend on the order in which they are listed.
    queries = np.sort(_indices(query, everything, "query"))
    searched = np.sort(_indices(gallery, everything, "gallery"))
    position = np.full(len(labels), -1)  # of each image in the gallery
    position[searched] = np.arange(len(searched))
    if (position >= 0).sum() != len(searched):
        raise UserError("the gallery holds an image more than once")

    _, class_numbers = np.unique(labels, return_inverse=True)
    class_sizes = np.bincount(class_numbers[searched], minlength=len(labels))  # in the gallery
    num_relevant = class_sizes[class_numbers[queries]] - (position[queries] >= 0)
    queries, num_relevant = queries[num_relevant > 0], num_relevant[num_relevant > 0]
    if len(queries) == 0:
        raise UserError("no query has another image of its class in the gallery")
    all_against_all = np.array_equal(queries, everything) and np.array_equal(searched, everything)
    search = nearest(
        embeddings if all_against_all else embeddings[queries],
        embeddings if all_against_all else embeddings[searched],
        max(*recall_at, int(num_relevant.max())),  # one search for all metrics
        own_rows=position[queries],
        chunk=chunk,
    )
    first_hit = np.empty(len(queries), np.int64)
    r_precision, map_at_r = np.empty(len(queries)), np.empty(len(queries))
    for rows, neighbors in search:
        hits = (labels[searched[neighbors]] == labels[queries[rows], None]) & (neighbors >= 0)
        first_hit[rows] = np.where(hits.any(axis=1), hits.argmax(axis=1), np.iinfo(np.int64).max)
        r = num_relevant[rows]
        hits_at_r = hits[:, : int(r.max())]
        ranks = np.arange(1, hits_at_r.shape[1] + 1)
        hits_at_r &= ranks <= r[:, None]
        r_precision[rows] = hits_at_r.sum(axis=1) / r
        precisions = np.cumsum(hits_at_r, axis=1, dtype=np.int32) / ranks
        map_at_r[rows] = np.where(hits_at_r, precisions, 0).sum(axis=1) / r
    metrics = {f"recall@{k}": float((first_hit < k).mean()) for k in recall_at}
    return {**metrics, "map@r": float(map_at_r.mean()), "r_precision": float(r_precision.mean())}


def _indices(given: NDArray[Any] | None, everything: Ints, name: str) -> Ints:
    if given is None:
        return everything
    indices = np.asarray(given, dtype=np.int64)
    if indices.ndim != 1 or not np.isin(indices, everything).all():
        raise UserError(f"{name} must hold indices from 0 to {len(everything) - 1}, in one dimension")
    return indices
