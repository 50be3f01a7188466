"""What queries retrieve: rank-based metrics of a set of embeddings, from one nearest-neighbour search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ray_dmml.data.dataset import ImageSet, count_relevant
from ray_dmml.errors import UserError
from ray_dmml.evaluation.neighbors import Floats, Ints, nearest

Key = TypeVar("Key")
Values = dict[str, NDArray[np.float64]]
"""(Q,) the figures of the queries, by the name of the metric."""

_MIN_DEPTH = 100  # of a search, so that the first relevant image is seldom beyond it
_BLOCK_ENTRIES = 2**22  # similarities at a time, where it is
_MIN_BLOCK = 64  # queries; with fewer, reading the gallery takes longer than computing with it


@dataclass(frozen=True, eq=False)
class Retrieval:
    """What the queries retrieve with one embedding (a peer's, the ensemble's, a frozen backbone's).

    Only the Q queries with a relevant image in the gallery are in it, in the order of their indices.

    Attributes:
        queries: (Q,) int64, indices of the images.
        num_relevant: (Q,) int64, R: the number of images that each query should find.
        neighbors: (Q, keep) int64, indices of the nearest images, the most similar first; -1 where there are fewer.
        similarities: (Q, keep) float32; NaN where there is no neighbour.
        first_match: (Q,) int64, rank (from 1) of the first relevant image. 0: it is beyond the search, which happens
            only without ``all_metrics``.
        values: (Q,) float64 of each metric, see :func:`retrieval_metrics`.
    """

    queries: Ints
    num_relevant: Ints
    neighbors: Ints
    similarities: Floats
    first_match: Ints
    values: Values

    def means(self) -> dict[str, float]:
        """Each metric as the mean over the queries."""
        return {metric: float(values.mean()) for metric, values in self.values.items()}

    def macro_means(self, labels: Ints) -> dict[str, float]:
        """Each metric as the mean over the classes of the means of their queries: every class counts alike.

        Args:
            labels: (N,) int64, the class of each image.
        """
        _, _, means = means_by(labels[self.queries], self.values)
        return {metric: float(values.mean()) for metric, values in means.items()}


def retrieve(
    embeddings: NDArray[Any],
    images: ImageSet,
    *,
    recall_at: Sequence[int],
    keep: int = 10,
    all_metrics: bool = True,
    chunk: int | None = None,
) -> Retrieval:
    """Searches with every query of a set of images: its queries against its gallery, or all against all.

    A query never retrieves itself, nor an image that shares its number in ``images.exclude``. Recall@1 is always among
    the metrics.

    Args:
        embeddings: (N, D) float, L2-normalised.
        images: the N images.
        recall_at: the values of K. A K above the size of the gallery means the whole gallery.
        keep: how many neighbours of each query are kept.
        all_metrics: False: only Recall@K, MAP@R and R-precision, which need no more than one search. It is for
            validation during training.
        chunk: queries per search, see :func:`~ray_dmml.evaluation.neighbors.nearest`.

    Raises:
        UserError: see :func:`retrieval_metrics`.
    """
    return _retrieve(
        embeddings, images.labels, images.query, images.gallery, images.exclude, recall_at, keep, all_metrics, chunk
    )


def retrieval_metrics(
    embeddings: NDArray[Any],
    labels: NDArray[Any],
    *,
    recall_at: Sequence[int],
    query: NDArray[Any] | None = None,
    gallery: NDArray[Any] | None = None,
    exclude: NDArray[Any] | None = None,
    chunk: int | None = None,
) -> dict[str, float]:
    """Computes retrieval metrics: do the nearest images of a query belong to its class?

    Neighbours are ranked by inner product, ties by the order of the images, and a query never retrieves itself. Its R
    relevant images are the other images of its class in the gallery. Each metric is a mean over the queries with R > 0.
    The order of ``query`` and ``gallery`` changes nothing.

    - ``recall@K``: share of queries with at least one relevant image among the K nearest. The cumulative matching
      characteristic (CMC) at rank K is the same.
    - ``precision@K``: relevant images among the K nearest, divided by min(K, R).
    - ``map@K``: the precisions among the i nearest (divided by i), summed over the ranks i <= K with a relevant image
      and divided by min(K, R).
    - ``map@r``: the same for K = R.
    - ``r_precision``: share of relevant images among the R nearest.
    - ``mrr``: 1 / rank of the first relevant image.

    Args:
        embeddings: (N, D) float, L2-normalised.
        labels: (N,) int64 classes.
        recall_at: the values of K; 1 is always one of them. A K above the size of the gallery means the whole gallery.
        query: (Q,) int64 indices of the query images; None means all images.
        gallery: (G,) int64 indices of the gallery images, without duplicates; None means all images.
        exclude: (N,) int64. Images of the same number are not matched with each other. None: all numbers differ.
        chunk: queries per search, see :func:`~ray_dmml.evaluation.neighbors.nearest`.

    Returns:
        Fractions in [0, 1] by the names above, such as ``recall@1``.

    Raises:
        UserError: embeddings are NaN or infinite, sizes do not fit, a K is below 1, the gallery holds an
            image twice, or no query has another image of its class.

    References:
        Musgrave, Belongie, Lim, *A Metric Learning Reality Check*, ECCV 2020, https://arxiv.org/abs/2003.08505:
        MAP@R and R-precision, as in pytorch-metric-learning. precision@K and map@K are those of open-metric-learning:
        an ideal embedding has 1 even where R < K.
    """
    return _retrieve(embeddings, labels, query, gallery, exclude, recall_at, 0, True, chunk).means()


def means_by(groups: Ints, values: Mapping[Key, NDArray[Any]]) -> tuple[Ints, Ints, dict[Key, NDArray[np.float64]]]:
    """Means of per-query values over the queries of each group, such as a class.

    Args:
        groups: (Q,) int64, the group of each query.
        values: (Q,) float of each metric, by any key.

    Returns:
        (C,) the groups in order, (C,) the number of queries of each, and (C,) float64 of each metric.
    """
    names, numbers, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return names, counts, {key: np.bincount(numbers, weights=each) / counts for key, each in values.items()}


def _retrieve(
    embeddings: NDArray[Any],
    labels: NDArray[Any],
    query: NDArray[Any] | None,
    gallery: NDArray[Any] | None,
    exclude: NDArray[Any] | None,
    recall_at: Sequence[int],
    keep: int,
    all_metrics: bool,
    chunk: int | None,
) -> Retrieval:
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    if labels.shape != embeddings.shape[:1]:
        raise UserError(f"{len(embeddings)} embeddings have labels of shape {labels.shape}")
    if not recall_at or min(recall_at) < 1:
        raise UserError(f"recall_at must hold one or more K of at least 1, not {list(recall_at)}")
    ks = sorted({1, *recall_at})
    everything = np.arange(len(labels))
    # In the order of the images, so that ties and sums do not depend on the order in which they are listed.
    queries = np.sort(_indices(query, everything, "query"))
    searched = np.sort(_indices(gallery, everything, "gallery"))
    if len(np.unique(searched)) < len(searched):
        raise UserError("the gallery holds an image more than once")
    ids = everything if exclude is None else np.asarray(exclude, dtype=np.int64)
    if ids.shape != labels.shape:
        raise UserError(f"{len(labels)} images have numbers of shape {ids.shape} that exclude each other")
    num_relevant = count_relevant(labels, ids, queries, searched)
    queries, num_relevant = queries[num_relevant > 0], num_relevant[num_relevant > 0]
    if len(queries) == 0:
        raise UserError("no query has another image of its class in the gallery")

    all_against_all = np.array_equal(queries, everything) and np.array_equal(searched, everything)
    points = embeddings if all_against_all else embeddings[queries]
    others = embeddings if all_against_all else embeddings[searched]
    depth = max(*ks, keep, int(num_relevant.max()), _MIN_DEPTH if all_metrics else 1)  # one search for all metrics
    names = ["map@r", "r_precision", *(f"{name}@{k}" for name in ("precision", "map") for k in ks if all_metrics)]
    precisions = {name: np.empty(len(queries)) for name in names}
    first_match = np.empty(len(queries), np.int64)
    neighbors = np.full((len(queries), keep), -1)
    their_similarities = np.full((len(queries), keep), np.nan, np.float32)
    reach = 0
    for rows, places, similarities in nearest(
        points, others, depth, exclude=(ids[queries], ids[searched]), chunk=chunk
    ):
        reach, kept = places.shape[1], min(keep, places.shape[1])
        matches = (labels[searched[places]] == labels[queries[rows], None]) & (places >= 0)
        first_match[rows] = np.where(matches.any(axis=1), matches.argmax(axis=1) + 1, 0)
        for name, each in _precisions(matches, num_relevant[rows], ks if all_metrics else ()).items():
            precisions[name][rows] = each
        neighbors[rows, :kept] = np.where(places >= 0, searched[places], -1)[:, :kept]
        their_similarities[rows, :kept] = similarities[:, :kept]
    values: Values = {f"recall@{k}": ((first_match > 0) & (first_match <= k)).astype(float) for k in ks}
    values |= {name: precisions[name] for name in names[:2]}
    if all_metrics:
        beyond = np.flatnonzero(first_match == 0)
        if len(beyond):
            its = queries[beyond]
            ranks = _first_ranks(points[beyond], others, (labels[its], labels[searched]), (ids[its], ids[searched]))
            first_match[beyond] = np.maximum(ranks, reach + 1)  # the last bits may differ from the search's
        values["mrr"] = 1 / first_match
        values |= {name: precisions[name] for name in names[2:]}
    return Retrieval(queries, num_relevant, neighbors, their_similarities, first_match, values)


def _precisions(matches: NDArray[np.bool_], num_relevant: Ints, ks: Sequence[int]) -> Values:
    """Precision and average precision of each query at R and at each K.

    Args:
        matches: (q, n) whether each neighbour is relevant, the most similar first; n >= R.
        num_relevant: (q,) R.
    """
    matches = matches[:, : max([*ks, int(num_relevant.max())])]
    num_found = np.cumsum(matches, axis=1, dtype=np.int32)
    at_matches = np.where(matches, num_found / np.arange(1, matches.shape[1] + 1), 0)
    sums = np.cumsum(at_matches, axis=1, out=at_matches)
    row = np.arange(len(matches))
    values: Values = {
        "map@r": sums[row, num_relevant - 1] / num_relevant,
        "r_precision": num_found[row, num_relevant - 1] / num_relevant,
    }
    for k in ks:
        last, of = min(k, matches.shape[1]) - 1, np.minimum(k, num_relevant)
        values |= {f"precision@{k}": num_found[:, last] / of, f"map@{k}": sums[:, last] / of}
    return values


def _first_ranks(points: Floats, others: Floats, labels: tuple[Ints, Ints], ids: tuple[Ints, Ints]) -> Ints:
    """The rank of each query's first relevant image, from its similarities to the whole gallery.

    Args:
        points: (q, D) queries, each with a relevant image.
        others: (G, D) gallery.
        labels: (q,) and (G,) classes.
        ids: (q,) and (G,); equal ones are not matched.
    """
    ranks = np.empty(len(points), np.int64)
    of_label, of_id = _members(labels[1]), _members(ids[1])
    block = max(_MIN_BLOCK, _BLOCK_ENTRIES // len(others))
    for start in range(0, len(points), block):
        for row, similarities in enumerate(points[start : start + block] @ others.T, start):
            itself = of_id(ids[0][row])
            similarities[itself] = -np.inf
            relevant = of_label(labels[0][row])
            first = relevant[similarities[relevant].argmax()]
            best = similarities[first]
            num_ties_before = np.count_nonzero(similarities[:first] == best)
            ranks[row] = np.count_nonzero(similarities > best) + num_ties_before + 1
    return ranks


def _members(numbers: Ints) -> Callable[[int], Ints]:
    """The places of a number, in order."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    return lambda number: order[np.searchsorted(ordered, number) : np.searchsorted(ordered, number, side="right")]


def _indices(given: NDArray[Any] | None, everything: Ints, name: str) -> Ints:
    if given is None:
        return everything
    indices = np.asarray(given, dtype=np.int64)
    if indices.ndim != 1 or not np.isin(indices, everything).all():
        raise UserError(f"{name} must hold indices from 0 to {len(everything) - 1}, in one dimension")
    return indices
