"""Embeddings that have collapsed: they use few dimensions, or all images are alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ray_dmml.evaluation.neighbors import Floats

MIN_RANK, MAX_COSINE = 0.05, 0.95
"""An embedding has collapsed if its effective rank is below this share of the dimensions that it could use, or if its
mean cosine is above this."""

_ROWS_AT_A_TIME = 4096


def effective_rank(vectors: Floats) -> float:
    """The number of dimensions that (N, D) embeddings use: the exponential of the entropy of their singular values,
    without their mean. It is 1 for points on a line, and D where all directions are alike.

    References:
        Roy, Vetterli, *The Effective Rank: a Measure of Effective Dimensionality*, EUSIPCO 2007
    """
    mean = vectors.mean(axis=0, dtype=np.float64)
    products = np.zeros((vectors.shape[1], vectors.shape[1]))
    for start in range(0, len(vectors), _ROWS_AT_A_TIME):
        centered = vectors[start : start + _ROWS_AT_A_TIME] - mean
        products += centered.T @ centered
    values = np.sqrt(np.linalg.eigvalsh(products).clip(min=0))
    if values.sum() == 0:
        return 1.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def mean_cosine(vectors: Floats) -> float:
    """The mean cosine of two different images' embeddings, (N, D) of unit length, N >= 2."""
    num = len(vectors)
    total = np.sum(vectors.sum(axis=0, dtype=np.float64) ** 2)
    return float((total - num) / (num * (num - 1)))


def warn_of_collapse(name: str, vectors: Floats, num_classes: int) -> Iterator[str]:
    """A sentence if the embeddings of a system have collapsed.

    A perfect embedding of C classes needs C - 1 dimensions and no more, so few classes are no sign of a collapse.
    """
    dimensions = vectors.shape[1]
    rank, cosine = effective_rank(vectors), mean_cosine(vectors)
    if rank < MIN_RANK * min(dimensions, num_classes - 1):
        yield (
            f"the embeddings of {name} seem to have collapsed: they use {rank:.1f} of their {dimensions} dimensions "
            "(effective rank); try a lower optimizer.lr or another metric loss"
        )
    elif cosine > MAX_COSINE:
        yield (
            f"the embeddings of {name} seem to have collapsed: the mean cosine of two images is {cosine:.3f}; try a "
            "lower optimizer.lr or another metric loss"
        )
