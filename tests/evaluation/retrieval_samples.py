"""Embeddings and a naive search that the tests of retrieval share."""

from __future__ import annotations

import numpy as np


def unit(num: int, size: int, seed: int = 0) -> np.ndarray:
    """Random float32 rows of length 1."""
    x = np.random.default_rng(seed).standard_normal((num, size)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def grid(num: int, size: int, seed: int = 0, values: int = 2) -> np.ndarray:
    """Small integers as float32: every inner product is exact, and most of them are tied."""
    rng = np.random.default_rng(seed)
    return rng.integers(-values, values + 1, (num, size)).astype(np.float32)


def naive_nearest(queries: np.ndarray, gallery: np.ndarray, own: np.ndarray) -> list[list[int]]:
    """All gallery rows of each query, by descending inner product, then ascending index."""
    ranked = []
    for query, self_index in zip(queries.astype(np.float64), own, strict=True):
        similarity = [float(query @ row) for row in gallery.astype(np.float64)]
        order = sorted(range(len(gallery)), key=lambda j: (-similarity[j], j))
        ranked.append([j for j in order if j != self_index])
    return ranked
