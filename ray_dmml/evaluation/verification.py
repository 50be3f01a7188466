"""Verification: are two images of the same class? ROC, errors at a false match rate, and the threshold for it.

A *match* is a pair of a query and a gallery image whose similarity is above a threshold. The false match rate (FMR) is
the share of matches among the pairs of two classes, and the false non-match rate (FNMR) is the share of pairs of one
class that are no match.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dmml.data.dataset import ImageSet
from ray_dmml.evaluation.bootstrap import NUM_RESAMPLES, resamples
from ray_dmml.evaluation.neighbors import Floats, Ints

FMRS = (0.01, 0.001)
"""The false match rates that FNMR and threshold are given for."""

MAX_POSITIVES, MAX_NEGATIVES = 2**20, 2**22
"""Pairs of one class, and of two classes. Where there are more, these many are drawn."""

_QUERIES_TOGETHER = 64  # share the gallery images that are drawn for them
_MIN_TAIL = 50_000  # the most similar pairs of two classes, among which a resample nearly always has its thresholds
_CHUNK_ENTRIES = 2**22


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs that systems are verified with: each query with each gallery image, or those that are drawn of them.

    Attributes:
        classes: (N,) int64, the class of each image, 0 to C-1.
        exclude: (N,) int64; images of the same number form no pair.
        positives: (P,) and (P,) int64, images of one class.
        blocks: queries and gallery images whose pairs of two classes are used.
        sizes: (C,) and (C,), the queries and the gallery images of each class.
        is_complete: whether these are all pairs.
    """

    classes: Ints
    exclude: Ints
    positives: tuple[Ints, Ints]
    blocks: list[tuple[Ints, Ints]]
    sizes: tuple[Ints, Ints]
    is_complete: bool

    @classmethod
    def of(
        cls, images: ImageSet, *, max_positives: int = MAX_POSITIVES, max_negatives: int = MAX_NEGATIVES, seed: int = 0
    ) -> Pairs:
        """All pairs of a set of images, or at random about as many as the maxima say.

        Of pairs of two classes, every query has the same number. Of pairs of one class, each pair has the same chance.
        """
        rng = np.random.default_rng(seed)
        labels, everything = images.labels, np.arange(len(images))
        queries = everything if images.query is None else np.sort(images.query)
        gallery = everything if images.gallery is None else np.unique(images.gallery)
        exclude = everything if images.exclude is None else images.exclude
        num_each = -(-max_negatives // len(queries))
        is_complete = num_each >= len(gallery)
        if is_complete:
            blocks = [(queries, gallery)]
        else:
            parts = np.array_split(rng.permutation(queries), -(-len(queries) // _QUERIES_TOGETHER))
            blocks = [(part, rng.choice(gallery, num_each, replace=False)) for part in parts]
        positives, has_all = _pairs_of_one_class(labels, queries, gallery, max_positives, rng)
        is_pair = exclude[positives[0]] != exclude[positives[1]]
        return cls(
            labels,
            exclude,
            (positives[0][is_pair], positives[1][is_pair]),
            blocks,
            (_sizes(labels[queries], images.num_classes), _sizes(labels[gallery], images.num_classes)),
            is_complete and has_all,
        )

    def of_one_class(self, vectors: Floats) -> tuple[Floats, Ints]:
        """The similarities of the pairs of one class by (N, D) embeddings, (P,) float32, and their classes, (P,)."""
        ones, others = self.positives
        similarities = np.empty(len(ones), np.float32)
        chunk = max(1, _CHUNK_ENTRIES // vectors.shape[1])
        for start in range(0, len(ones), chunk):
            rows = slice(start, start + chunk)
            similarities[rows] = np.einsum("nd,nd->n", vectors[ones[rows]], vectors[others[rows]])
        return similarities, self.classes[ones]

    def of_two_classes(self, vectors: Floats) -> tuple[Floats, Ints, Ints]:
        """The similarities of the pairs of two classes, (M,) float32 in ascending order, and the classes of the query
        and of the gallery image, (M,) each."""
        found = []
        for queries, gallery in self.blocks:
            ones, others = self.classes[queries], self.classes[gallery]
            is_pair = (ones[:, None] != others) & (self.exclude[queries][:, None] != self.exclude[gallery])
            row, column = np.nonzero(is_pair)
            found.append(((vectors[queries] @ vectors[gallery].T)[is_pair], ones[row], others[column]))
        similarities, ones, others = (np.concatenate([each[part] for each in found]) for part in range(3))
        order = np.argsort(similarities, kind="stable")
        return similarities[order], ones[order], others[order]

    def weights(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) the sum over all pairs of two classes of the product of how often the classes are drawn, by (n, C)
        ``times``, as a share of the number of these pairs."""
        queries, gallery = self.sizes

        def total(times: NDArray[np.float64]) -> NDArray[np.float64]:
            return (times @ queries) * (times @ gallery) - times**2 @ (queries * gallery)

        return total(times) / total(np.ones((1, times.shape[1])))


def verification(vectors: Floats, pairs: Pairs, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """How well a threshold on the similarity separates pairs of one class from pairs of two classes.

    - ``roc_auc``: the chance that a pair of one class is more similar than a pair of two classes; ties count half.
    - ``threshold@F``: the lowest threshold with an FMR of at most F. A match is *above* it.
    - ``fnmr@F``: the FNMR at this threshold.

    Args:
        vectors: (N, D) float32, rows of length 1.
        pairs: of the N images.
        num_resamples: resamples of the classes. In a resample, a pair of one class counts as often as the class, and a
            pair of two classes as often as the product of both says.
        seed: of the resamples.

    Returns:
        These figures; ``intervals``, the ends of their 95 % intervals by bootstrap over classes (that of ``roc_auc`` to
        first order), empty if there are only two classes; ``num_positive_pairs`` and ``num_negative_pairs``, of one and
        of two classes; and ``all_pairs``, False if they were drawn. Empty if there are no pairs of both kinds.
    """
    positives, of_positive = pairs.of_one_class(vectors)
    negatives, ones, others = pairs.of_two_classes(vectors)
    if not len(positives) or not len(negatives):
        return {}
    above = _share_below(positives, negatives)  # of each pair of one class: the pairs of two classes that it is above
    below = 1 - _share_below(negatives, np.sort(positives))
    figures = {"roc_auc": float(above.mean())}
    ranked = _Ranked(negatives[::-1], ones[::-1], others[::-1])
    for fmr in FMRS:
        threshold = ranked.similarities[int(fmr * len(negatives))]
        figures |= {f"fnmr@{fmr:g}": float(np.mean(positives <= threshold)), f"threshold@{fmr:g}": float(threshold)}

    num_classes = len(pairs.sizes[0])
    num_of_class = np.bincount(of_positive, minlength=num_classes)
    auc_of_class = np.bincount(of_positive, above, num_classes)
    num_with_class, auc_with_class = (
        sum(np.bincount(part, weights, num_classes) for part in (ones, others)) for weights in (None, below)
    )
    samples: dict[str, list[NDArray[np.float64]]] = {key: [] for key in figures}
    with np.errstate(invalid="ignore"):  # a resample may have no pairs
        for times in resamples(num_classes, num_resamples, seed):
            num_positive = times @ num_of_class
            by_negatives = times @ auc_with_class / (times @ num_with_class)
            auc = times @ auc_of_class / num_positive + 2 * (by_negatives - figures["roc_auc"])
            samples["roc_auc"].append(np.clip(auc, 0, 1))
            allowed = len(negatives) * pairs.weights(times)
            of_resamples = [
                ranked.thresholds(drawn, np.array(FMRS) * num) for drawn, num in zip(times, allowed, strict=True)
            ]
            for fmr, thresholds in zip(FMRS, np.stack(of_resamples, axis=1), strict=True):
                num_missed = _weighted_below(positives, of_positive, thresholds, times)
                samples[f"threshold@{fmr:g}"].append(np.where(allowed > 0, thresholds, np.nan))
                samples[f"fnmr@{fmr:g}"].append(np.where(allowed > 0, num_missed / num_positive, np.nan))
    intervals = {}
    if num_classes > 2:  # resamples of two classes all have the same pairs of two classes, or none
        intervals = {key: np.nanpercentile(np.concatenate(each), [2.5, 97.5]).tolist() for key, each in samples.items()}
    return {
        **figures,
        "intervals": intervals,
        "num_positive_pairs": len(positives),
        "num_negative_pairs": len(negatives),
        "all_pairs": pairs.is_complete,
    }


class _Ranked:
    """Pairs of two classes, the most similar first.

    Args:
        similarities: (M,) float32 in descending order.
        ones, others: (M,) int64, the classes of both images.
    """

    def __init__(self, similarities: Floats, ones: Ints, others: Ints) -> None:
        self.similarities = similarities
        num = len(similarities)
        most = min(num, max(_MIN_TAIL, int(5 * max(FMRS) * num)))
        # The most similar pairs suffice, unless nearly all of them are of classes that a resample lacks, as it happens
        # with few classes. Then every n-th of all pairs stands for n.
        step = -(-num // most)
        self.parts = [
            (count, similarities[part].copy(), ones[part].copy(), others[part].copy())
            for count, part in ((1, slice(most)), (step, slice(None, None, step)))
        ]

    def thresholds(self, times: NDArray[np.float64], allowed: NDArray[np.float64]) -> Floats:
        """(F,) the lowest thresholds with at most (F,) ``allowed`` pairs above them, where a pair counts as often as
        (C,) ``times`` says of both classes."""
        for count, similarities, ones, others in self.parts:
            num_matches = np.cumsum(times[ones] * times[others])
            places = np.searchsorted(num_matches, allowed / count, side="right")
            if places.max() < len(similarities):
                break
        return similarities[np.minimum(places, len(similarities) - 1)]


def _pairs_of_one_class(
    labels: Ints, queries: Ints, gallery: Ints, most: int, rng: np.random.Generator
) -> tuple[tuple[Ints, Ints], bool]:
    """Each query with each gallery image of its class, or ``most`` of these pairs at random; and whether it is all."""
    by_class = gallery[np.argsort(labels[gallery], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[queries], side="left")
    numbers_of = np.searchsorted(labels[by_class], labels[queries], side="right") - starts
    ends = numbers_of.cumsum()
    is_all = bool(ends[-1] <= most)
    drawn = np.arange(ends[-1]) if is_all else np.sort(rng.integers(ends[-1], size=most))
    query = np.searchsorted(ends, drawn, side="right")
    return (queries[query], by_class[starts[query] + drawn - (ends - numbers_of)[query]]), is_all


def _sizes(labels: Ints, num_classes: int) -> Ints:
    return np.bincount(labels, minlength=num_classes).astype(np.int64)


def _share_below(values: Floats, reference: Floats) -> NDArray[np.float64]:
    """(n,) the share of the sorted ``reference`` that is below each value; equal ones count half."""
    left, right = (np.searchsorted(reference, values, side=side) for side in ("left", "right"))
    return (left + right) / (2 * len(reference))


def _weighted_below(
    values: Floats, classes: Ints, thresholds: Floats, times: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n,) how many values are not above each threshold, where those of a class count as often as (n, C) ``times``
    says for this threshold."""
    num, num_classes = times.shape
    order = np.argsort(thresholds, kind="stable")
    first = np.searchsorted(thresholds[order], values, side="left")  # the lowest threshold that a value is not above
    counts = np.bincount(classes * (num + 1) + first, minlength=num_classes * (num + 1)).reshape(num_classes, num + 1)
    counts = np.cumsum(counts[:, :num], axis=1)
    result = np.empty(num)
    result[order] = np.einsum("nc,cn->n", times[order], counts)
    return result
