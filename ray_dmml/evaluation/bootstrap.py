"""Intervals of means by bootstrap over classes: which figures would other classes of the same kind give?

Queries of one class are alike, so a bootstrap over queries gives intervals that are too narrow. The classes are drawn
with replacement instead, and each brings all its queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dmml.evaluation.neighbors import Ints
from ray_dmml.evaluation.retrieval import Key, means_by

Interval = tuple[float, float]
"""The ends of a 95 % interval: the 2.5th and the 97.5th percentile of the resamples."""

NUM_RESAMPLES = 1000
_BLOCK_ENTRIES = 2**22  # of the matrices of resamples at a time


def class_bootstrap(
    values: Mapping[Key, NDArray[Any]],
    classes: Ints,
    *,
    macro: bool = False,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[Key, Interval]:
    """95 % intervals of means over queries, by bootstrap over classes.

    All means come from the same resamples. These depend on the number of classes and the seed only, so systems that
    are evaluated one after the other have the same ones, too.

    Args:
        values: (Q,) float of each metric, or of each system and metric.
        classes: (Q,) int64, the class of each query.
        macro: the mean over classes of the means of their queries, instead of the mean over queries.
        num_resamples: resamples of the classes.
        seed: of the resamples.

    Returns:
        The interval of each mean. Empty if the queries are of fewer than 2 classes, which say nothing of others.

    References:
        Field, Welsh, *Bootstrapping Clustered Data*, JRSS B 2007
    """
    _, counts, means = means_by(classes, values)
    if len(counts) < 2 or not means:
        return {}
    by_class = np.stack(list(means.values()), axis=1)  # (C, M)
    weights = np.ones(len(counts)) if macro else counts
    resampled = [
        (times @ (weights[:, None] * by_class)) / (times @ weights)[:, None]
        for times in resamples(len(counts), num_resamples, seed)
    ]
    ends = np.percentile(np.concatenate(resampled), [2.5, 97.5], axis=0)
    return {key: (float(low), float(high)) for key, low, high in zip(values, *ends, strict=True)}


def paired(
    values: Mapping[Key, NDArray[Any]],
    others: Mapping[Key, NDArray[Any]],
    classes: Ints,
    *,
    macro: bool = False,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[Key, Interval]:
    """95 % intervals of the differences of two systems' means: ``values`` minus ``others``.

    Both are of the same queries and the same resamples, so what is hard for both systems cancels out. The arguments are
    those of :func:`class_bootstrap`; a metric that only one of them has is left out.
    """
    differences = {key: values[key] - others[key] for key in values if key in others}
    return class_bootstrap(differences, classes, macro=macro, num_resamples=num_resamples, seed=seed)


def resamples(num_classes: int, num_resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each class is in each resample, in blocks of (n, C) float64 that have ``num_resamples`` rows
    together."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_ENTRIES // num_classes)
    for start in range(0, num_resamples, block):
        num = min(block, num_resamples - start)
        drawn = rng.integers(num_classes, size=(num, num_classes)) + num_classes * np.arange(num)[:, None]
        yield np.bincount(drawn.ravel(), minlength=num * num_classes).reshape(num, num_classes).astype(np.float64)
