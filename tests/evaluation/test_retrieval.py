"""Retrieval metrics against loops and against pytorch-metric-learning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from retrieval_samples import grid, naive_nearest, unit

from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.errors import UserError
from ray_dmml.evaluation.retrieval import retrieval_metrics, retrieve


def naive_metrics(
    ranked: list[list[int]],
    labels: np.ndarray,
    query: np.ndarray,
    gallery: np.ndarray,
    recall_at: tuple[int, ...],
) -> dict[str, float]:
    """The metrics of queries with relevant images, one query at a time; ``ranked`` are places in the gallery."""
    results: dict[str, list[float]] = {}
    for image, order in zip(query, ranked, strict=True):
        hits = [bool(labels[gallery[j]] == labels[image]) for j in order]
        r = sum(hits)
        if r == 0:
            continue
        shares = [hit * sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits)]
        found = {f"recall@{k}": float(any(hits[:k])) for k in recall_at}
        found |= {f"precision@{k}": sum(hits[:k]) / min(k, r) for k in recall_at}
        found |= {f"map@{k}": sum(shares[:k]) / min(k, r) for k in recall_at}
        found |= {"r_precision": sum(hits[:r]) / r, "map@r": sum(shares[:r]) / r, "mrr": 1 / (hits.index(True) + 1)}
        for key, value in found.items():
            results.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in results.items()}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num=st.integers(4, 70),
    num_classes=st.integers(1, 30),
    chunk=st.sampled_from([None, 1, 5]),
    subset=st.booleans(),
    bursts=st.booleans(),
    ks=st.sampled_from([(1, 2, 100), (1,), (1, 3)]),
)
def test_metrics_equal_the_loops(
    seed: int, num: int, num_classes: int, chunk: int | None, subset: bool, bursts: bool, ks: tuple[int, ...]
) -> None:
    """Ties, classes of one image, K beyond the gallery, first matches beyond K, overlapping query and gallery, chunks,
    and images that exclude each other."""
    rng = np.random.default_rng(seed)
    x, labels = grid(num, 3, seed), rng.integers(0, num_classes, num)
    all_images = np.arange(num)
    query = rng.permutation(num)[: rng.integers(1, num + 1)] if subset else all_images
    gallery = np.sort(rng.permutation(num)[: rng.integers(1, num + 1)]) if subset else all_images  # ties go by image
    exclude = rng.integers(0, num, num) if bursts else all_images
    ranked = [
        [j for j in order if exclude[gallery[j]] != exclude[image]]
        for image, order in zip(query, naive_nearest(x[query], x[gallery], np.full(len(query), -1)), strict=True)
    ]
    wanted = naive_metrics(ranked, labels, query, gallery, ks)
    arguments = {"query": query, "gallery": gallery} if subset else {}
    arguments |= {"exclude": exclude} if bursts else {}
    if not wanted:
        with pytest.raises(UserError, match="no query has another image of its class"):
            retrieval_metrics(x, labels, recall_at=ks, chunk=chunk, **arguments)
        return
    got = retrieval_metrics(x, labels, recall_at=ks, chunk=chunk, **arguments)
    assert set(got) == set(wanted)
    assert got == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("chunk", [None, 50])
def test_first_matches_beyond_the_search_have_their_rank(chunk: int | None) -> None:
    """Pairs in embeddings that say nothing of them, full of ties; images that exclude each other do not count."""
    rng = np.random.default_rng(0)
    x, labels, exclude = grid(240, 3), rng.permutation(240) // 2, rng.permutation(240) // 20
    query, gallery = np.arange(0, 240, 7), np.arange(240)
    ranked = [
        [j for j in order if exclude[j] != exclude[image]]
        for image, order in zip(query, naive_nearest(x[query], x, np.full(len(query), -1)), strict=True)
    ]
    wanted = naive_metrics(ranked, labels, query, gallery, (1, 5))
    got = retrieval_metrics(x, labels, recall_at=(1, 5), query=query, gallery=gallery, exclude=exclude, chunk=chunk)
    assert got == pytest.approx(wanted, abs=1e-12)
    assert 1 / got["mrr"] > 20  # most of the first matches are far


@pytest.mark.parametrize("split", [False, True])
def test_metrics_equal_pytorch_metric_learnings(split: bool) -> None:
    """For random floats, to 1e-6, as means over queries and over classes; MRR also where the first match is far."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(300) // 3
    x = unit(300, 16) + 0.7 * unit(100, 16, seed=1)[labels]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r", "mean_reciprocal_rank")
    query, gallery = (np.arange(100), np.arange(100, 300)) if split else (None, None)
    images = ImageSet(FileImages(Path(), map(str, range(300)), 8), labels, tuple(map(str, range(100))), query, gallery)
    ours = retrieve(x, images, recall_at=[1])
    assert ours.first_match.max() > 100
    for is_macro, means in ((False, ours.means()), (True, ours.macro_means(labels))):
        calculator = AccuracyCalculator(include=names, k=None, avg_of_avgs=is_macro)
        if split:
            theirs = calculator.get_accuracy(x[query], labels[query], x[gallery], labels[gallery])
        else:
            theirs = calculator.get_accuracy(x, labels)
        found = [means[name] for name in ("recall@1", "r_precision", "map@r", "mrr")]
        assert found == pytest.approx([theirs[name] for name in names], abs=1e-6)
        assert 0.05 < means["recall@1"] < 0.9


def test_what_is_kept_of_a_search() -> None:
    """The nearest images of each query with their similarities, -1 where the gallery is smaller; only queries that have
    something to find; the same recall without the other metrics."""
    labels, gallery = np.array([0, 0, 1, 1, 2, 0]), np.array([0, 2, 3, 5])
    x = unit(6, 4)
    images = ImageSet(FileImages(Path(), "abcdef", 8), labels, ("x", "y", "z"), np.arange(6), gallery)
    found = retrieve(x, images, recall_at=[2], keep=5)
    assert found.queries.tolist() == [0, 1, 2, 3, 5] and found.num_relevant.tolist() == [1, 2, 1, 1, 1]
    for row, query in enumerate(found.queries):
        order = sorted((i for i in gallery.tolist() if i != query), key=lambda i: -float(x[i] @ x[query]))
        padding = 5 - len(order)
        assert found.neighbors[row].tolist() == order + [-1] * padding
        wanted = [float(x[i] @ x[query]) for i in order] + [np.nan] * padding
        np.testing.assert_allclose(found.similarities[row], wanted, atol=1e-6)
        assert labels[order[found.first_match[row] - 1]] == labels[query]
        assert not (labels[order[: found.first_match[row] - 1]] == labels[query]).any()
    few = retrieve(x, images, recall_at=[2], keep=0, all_metrics=False)
    assert list(few.values) == ["recall@1", "recall@2", "map@r", "r_precision"]
    for metric, values in few.values.items():
        assert values.tolist() == found.values[metric].tolist()


@settings(max_examples=10, deadline=None)
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
        ({"recall_at": [1], "exclude": np.arange(9)}, r"10 images have numbers of shape \(9,\)"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, object], message: str) -> None:
    """Impossible values of K and indices."""
    with pytest.raises(UserError, match=message):
        retrieval_metrics(unit(10, 4), **{"labels": np.arange(10) // 2, **arguments})
