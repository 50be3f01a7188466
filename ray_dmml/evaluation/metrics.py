"""Recall@K, MAP@R and R-precision of a set of embeddings, from one search for neighbours.

MAP@R and R-precision: Musgrave, Belongie, Lim, *A Metric Learning Reality Check*, ECCV 2020,
https://arxiv.org/abs/2003.08505
"""

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
    """How well the nearest images (by inner product) are of a query's own class.

    A query never retrieves itself. With R the gallery's other images of the query's class:

    - ``recall@K``: share of queries with at least one of them among the K nearest;
    - ``r_precision``: share of them among the R nearest;
    - ``map@r``: 1/R times the sum, over the ranks i <= R that hold one of them, of the share of
      them among the i nearest.

    Each is the mean over the queries with R > 0: a query without another image of its class could
    only fail and is left out. Where K exceeds the gallery, the whole gallery counts.

    Args:
        embeddings: (N, D) float, L2-normalised.
        labels: (N,) int64 classes.
        recall_at: the K.
        query: (Q,) int64 indices of the images that search; None: all.
        gallery: (G,) int64 indices, each once, of the images that are searched; None: all.
        chunk: queries at a time, see :func:`~ray_dmml.evaluation.neighbors.nearest`.

    Returns:
        Fractions in [0, 1], keys as above, such as ``recall@1``.

    Raises:
        UserError: NaN or infinite embeddings, sizes that do not fit, a K below 1, an image twice in
            the gallery, or no query with another image of its class.
    """
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    if labels.shape != embeddings.shape[:1]:
        raise UserError(f"{len(embeddings)} embeddings have labels of shape {labels.shape}")
    if not recall_at or min(recall_at) < 1:
        raise UserError(f"recall_at must hold one or more K of at least 1, not {list(recall_at)}")
    searching = _indices(query, len(labels), "query")
    searched = _indices(gallery, len(labels), "gallery")
    place = np.full(len(labels), -1)
    place[searched] = np.arange(len(searched))
    if (place >= 0).sum() != len(searched):
        raise UserError("the gallery holds an image more than once")

    num_of_class = _class_sizes(labels, searched)
    relevant = num_of_class[searching] - (place[searching] >= 0)
    searching, relevant = searching[relevant > 0], relevant[relevant > 0]
    if len(searching) == 0:
        raise UserError("no query has another image of its class in the gallery")
    # The largest R of all queries: one search serves every metric.
    k = max(*recall_at, int(relevant.max()))
    everything = len(searched) == len(searching) == len(labels)
    search = nearest(
        embeddings if everything else embeddings[searching],
        embeddings if everything else embeddings[searched],
        k,
        exclude_self=place[searching],
        chunk=chunk,
    )
    first = np.empty(len(searching), np.int64)
    precision, average = np.empty(len(searching)), np.empty(len(searching))
    for rows, found in search:
        hits = (labels[searched[found]] == labels[searching[rows], None]) & (found >= 0)
        first[rows] = np.where(hits.any(axis=1), hits.argmax(axis=1), np.iinfo(np.int64).max)
        at_r = hits[:, : int(relevant[rows].max())]
        ranks = np.arange(1, at_r.shape[1] + 1)
        at_r &= ranks <= relevant[rows, None]
        precision[rows] = at_r.sum(axis=1) / relevant[rows]
        shares = np.cumsum(at_r, axis=1, dtype=np.int32) / ranks
        average[rows] = np.where(at_r, shares, 0).sum(axis=1) / relevant[rows]
    metrics = {f"recall@{k}": float((first < k).mean()) for k in recall_at}
    return {**metrics, "map@r": float(average.mean()), "r_precision": float(precision.mean())}


def _class_sizes(labels: NDArray[Any], searched: Ints) -> Ints:
    """(N,) how many images of each image's class the gallery holds."""
    _, of_image = np.unique(labels, return_inverse=True)
    return np.bincount(of_image[searched], minlength=int(of_image.max()) + 1)[of_image]


def _indices(given: NDArray[Any] | None, num_images: int, name: str) -> Ints:
    if given is None:
        return np.arange(num_images)
    indices = np.asarray(given, dtype=np.int64)
    if indices.ndim != 1 or (indices.size and not 0 <= indices.min() <= indices.max() < num_images):
        raise UserError(f"{name} must hold indices from 0 to {num_images - 1}, in one dimension")
    return indices
