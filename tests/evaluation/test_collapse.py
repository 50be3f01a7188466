"""Warnings of embeddings that have collapsed."""

from __future__ import annotations

import numpy as np
import pytest
from retrieval_samples import unit

from ray_dmml.evaluation.collapse import effective_rank, mean_cosine, warn_of_collapse


def test_effective_rank() -> None:
    """Of points on a line, of a plane of two equally used directions, of all directions, and of one point."""
    rng = np.random.default_rng(0)
    line = rng.standard_normal((500, 1)) * unit(1, 32) + 3
    plane = rng.standard_normal((5000, 2)) @ np.eye(2, 32)
    assert effective_rank(line) == pytest.approx(1, abs=0.01)
    assert effective_rank(plane) == pytest.approx(2, abs=0.01)
    assert effective_rank(unit(5000, 32)) == pytest.approx(32, rel=0.01)
    assert effective_rank(np.ones((5, 32), np.float32)) == 1
    slopes = unit(5000, 8) * np.arange(1, 9)  # more than the rows that are read together
    singular = np.linalg.svd(slopes - slopes.mean(axis=0), compute_uv=False)
    shares = singular / singular.sum()
    assert effective_rank(slopes) == pytest.approx(np.prod(shares**-shares))


def test_mean_cosine_is_that_of_all_pairs() -> None:
    x = unit(30, 5) + 0.4
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [float(x[i] @ x[j]) for i in range(30) for j in range(30) if i != j]
    assert mean_cosine(x) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_a_collapse_is_named_and_nothing_else() -> None:
    """One direction of many, nearly equal vectors; not random ones, nor the perfect embedding of a few classes."""
    line = (-1.0) ** np.arange(200)[:, None] * unit(1, 64) + 0.01 * unit(200, 64)
    line /= np.linalg.norm(line, axis=1, keepdims=True)
    assert ["collapsed: they use" in text for text in warn_of_collapse("peer0", line, 100)] == [True]
    equal = np.eye(1, 64) + 0.1 * unit(200, 64)
    equal /= np.linalg.norm(equal, axis=1, keepdims=True)
    (text,) = warn_of_collapse("peer0", equal, 100)
    assert text.startswith("the embeddings of peer0 seem to have collapsed: the mean cosine of two images is 0.99")
    perfect = np.eye(5, 512)[np.arange(200) % 5] + 1e-3 * unit(200, 512)
    assert not [*warn_of_collapse("a", unit(200, 64), 100), *warn_of_collapse("b", perfect.astype(np.float32), 5)]
