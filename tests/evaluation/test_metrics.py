"""Retrieval metrics against loops and against pytorch-metric-learning."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from retrieval_samples import grid, naive_nearest, unit

from ray_dmml.errors import UserError
from ray_dmml.evaluation.metrics import retrieval_metrics


def naive_metrics(
    ranked: list[list[int]],
    labels: np.ndarray,
    query: np.ndarray,
    gallery: np.ndarray,
    recall_at: tuple[int, ...],
) -> dict[str, float]:
    """The metrics of queries with relevant images, one query at a time."""
    results: dict[str, list[float]] = {}
    for image, order in zip(query, ranked, strict=True):
        hits = [bool(labels[gallery[j]] == labels[image]) for j in order]
        r = sum(hits)
        if r == 0:
            continue
        for k in recall_at:
            results.setdefault(f"recall@{k}", []).append(float(any(hits[:k])))
        results.setdefault("r_precision", []).append(sum(hits[:r]) / r)
        shares = [sum(hits[: i + 1]) / (i + 1) for i in range(r) if hits[i]]
        results.setdefault("map@r", []).append(sum(shares) / r)
    return {key: sum(values) / len(values) for key, values in results.items()}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num=st.integers(4, 70),
    num_classes=st.integers(1, 30),
    chunk=st.sampled_from([None, 1, 5]),
    subset=st.booleans(),
)
def test_metrics_equal_the_loops(seed: int, num: int, num_classes: int, chunk: int | None, subset: bool) -> None:
    """Ties, classes of one image, K beyond the gallery, overlapping query and gallery, chunks."""
    rng = np.random.default_rng(seed)
    x, labels = grid(num, 3, seed), rng.integers(0, num_classes, num)
    all_images = np.arange(num)
    query = rng.permutation(num)[: rng.integers(1, num + 1)] if subset else all_images
    gallery = np.sort(rng.permutation(num)[: rng.integers(1, num + 1)]) if subset else all_images  # ties go by image
    place = {image: index for index, image in enumerate(gallery.tolist())}
    own = np.array([place.get(image, -1) for image in query.tolist()])
    ranked = naive_nearest(x[query], x[gallery], own)
    wanted = naive_metrics(ranked, labels, query, gallery, (1, 2, 100))
    arguments = {"query": query, "gallery": gallery} if subset else {}
    if not wanted:
        with pytest.raises(UserError, match="no query has another image of its class"):
            retrieval_metrics(x, labels, recall_at=(1, 2, 100), chunk=chunk, **arguments)
        return
    got = retrieval_metrics(x, labels, recall_at=(1, 2, 100), chunk=chunk, **arguments)
    assert set(got) == set(wanted)
    assert got == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("split", [False, True])
def test_metrics_equal_pytorch_metric_learnings(split: bool) -> None:
    """For random floats: its precision_at_1, r_precision and mean_average_precision_at_r."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 300)
    x = unit(300, 16) + 0.5 * unit(12, 16, seed=1)[labels]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=names, k="max_bin_count")
    query, gallery = (np.arange(100), np.arange(100, 300)) if split else (None, None)
    if split:
        theirs = calculator.get_accuracy(x[query], labels[query], x[gallery], labels[gallery])
    else:
        theirs = calculator.get_accuracy(x, labels)
    ours = retrieval_metrics(x, labels, recall_at=[1], query=query, gallery=gallery)
    assert [ours["recall@1"], ours["r_precision"], ours["map@r"]] == pytest.approx(
        [theirs[name] for name in names], abs=1e-6
    )
    assert 0.2 < ours["recall@1"] < 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), num=st.integers(4, 40), whole=st.booleans())
def test_the_order_of_queries_and_gallery_changes_nothing(seed: int, num: int, whole: bool) -> None:
    """To the bit, also with ties, and where queries and gallery are as many as the images."""
    rng = np.random.default_rng(seed)
    x, labels = grid(num, 3, seed), np.arange(num) // 2
    query, gallery = (np.arange(num) if whole else np.sort(rng.permutation(num)[: num // 2 + 2]) for _ in range(2))
    results = [
        retrieval_metrics(x, labels, recall_at=(1, 2), query=q, gallery=g)
        for q in (query, query[::-1], rng.permutation(query))
        for g in (gallery, gallery[::-1], rng.permutation(gallery))
        if _has_pair(q, g)
    ]
    assert all(result == results[0] for result in results)
    if whole and results:
        assert results[0] == retrieval_metrics(x, labels, recall_at=(1, 2))


def _has_pair(query: np.ndarray, gallery: np.ndarray) -> bool:
    return any(other in gallery for other in (query ^ 1).tolist())


def test_chunks_change_nothing() -> None:
    """The metrics are equal to the last bit."""
    labels = np.random.default_rng(0).integers(0, 20, 500)
    x = unit(500, 32)
    results = [retrieval_metrics(x, labels, recall_at=[1, 4], chunk=c) for c in (None, 500, 33, 7)]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recall_at": []}, "at least 1"),
        ({"recall_at": [0, 1]}, "at least 1"),
        ({"recall_at": [1], "gallery": [1, 1, 2]}, "more than once"),
        ({"recall_at": [1], "query": [12]}, "query must hold indices from 0 to 9"),
        ({"recall_at": [1], "query": [[1]]}, "query must hold indices .*, in one dimension"),
        ({"recall_at": [1], "labels": np.arange(9)}, r"10 embeddings have labels of shape \(9,\)"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, object], message: str) -> None:
    """Impossible values of K and indices."""
    with pytest.raises(UserError, match=message):
        retrieval_metrics(unit(10, 4), **{"labels": np.arange(10) // 2, **arguments})
