"""Nearest neighbours and the metrics made of them, against loops that say what they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from ray_dmml.errors import UserError
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.evaluation.metrics import retrieval_metrics
from ray_dmml.evaluation.neighbors import nearest


def unit(num: int, size: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((num, size)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def grid(num: int, size: int, seed: int = 0, values: int = 2) -> np.ndarray:
    """Small whole numbers: every inner product is exact, and most of them are tied."""
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


def collect(*args: object, **kwargs: object) -> np.ndarray:
    pieces = list(nearest(*args, **kwargs))
    starts = [rows.start for rows, _ in pieces]
    assert starts == sorted(starts)
    return np.concatenate([found for _, found in pieces])


def naive_metrics(
    ranked: list[list[int]],
    labels: np.ndarray,
    query: np.ndarray,
    gallery: np.ndarray,
    recall_at: tuple[int, ...],
) -> dict[str, float]:
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
    num=st.integers(2, 120),
    size=st.integers(1, 5),
    k=st.integers(1, 130),
    chunk=st.sampled_from([None, 1, 7, 1000]),
    exclude=st.booleans(),
)
def test_ties_go_to_the_lower_index(
    seed: int, num: int, size: int, k: int, chunk: int | None, exclude: bool
) -> None:
    """On whole-numbered embeddings, full of ties and equal rows, the order is the stable sort's."""
    x = grid(num, size, seed)
    own = np.arange(num) if exclude else np.full(num, -1)
    wanted = [row[:k] for row in naive_nearest(x, x, own)]
    got = collect(x, x, k, exclude_self=exclude, chunk=chunk)
    assert got.dtype == np.int64
    assert got.tolist() == wanted


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("k", [1, 40, 150, 500])
def test_ties_between_different_rows_reach_beyond_the_list(k: int, pairs: bool) -> None:
    """Hundreds of different rows equally near, equal rows among them: still the lowest indices."""
    level = np.arange(1200) // 200  # the best come last: those are what faiss mixes up
    own_number = np.random.default_rng(0).permutation(1200) // (2 if pairs else 1)
    x = np.stack([level, own_number], axis=1).astype(np.float32)
    queries = np.array([[1, 0], [-1, 0], [0, 1], [0, 0]], np.float32)
    wanted = [row[:k] for row in naive_nearest(queries, x, np.full(4, -1))]
    assert collect(queries, x, k, exclude_self=False).tolist() == wanted


def test_real_valued_neighbours_equal_those_of_float64() -> None:
    """Random unit vectors, some of them twice: the ranking of an exact computation."""
    gallery = unit(600, 48)
    gallery[300:320] = gallery[100:120]
    queries = unit(70, 48, seed=1)
    wanted = [row[:50] for row in naive_nearest(queries, gallery, np.full(70, -1))]
    assert collect(queries, gallery, 50, exclude_self=False, chunk=32).tolist() == wanted


@pytest.mark.parametrize("value", [0.0, 0.0441942])
def test_collapsed_embeddings_are_ranked_by_index(value: float) -> None:
    """All zero or all equal, at a size where blocks of a matrix product differ in the last bit."""
    x = np.full((3001, 512), value, np.float32)
    got = collect(x, x, 5, exclude_self=True)
    assert got[0].tolist() == [1, 2, 3, 4, 5]
    assert got[3].tolist() == [0, 1, 2, 4, 5]
    assert (got[5:] == np.arange(5)).all()


def test_self_is_left_out_by_index_not_by_distance() -> None:
    """A duplicate of the query is its first neighbour; a query may stand anywhere in the gallery."""
    x = unit(10, 8)
    x[7] = x[2]
    assert collect(x, x, 9, exclude_self=True)[[2, 7], 0].tolist() == [7, 2]
    own = np.array([7, -1, 0])
    got = collect(x[[2, 2, 5]], x, 10, exclude_self=own)
    wanted = naive_nearest(x[[2, 2, 5]], x, own)
    assert got[1].tolist() == wanted[1]
    assert got[0].tolist() == [*wanted[0], -1]
    assert got[2].tolist() == [*wanted[2], -1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_embeddings_are_named(bad: float) -> None:
    """NaN and infinity are the caller's mistake, and are located."""
    x = unit(10, 8)
    x[3, 2] = bad
    with pytest.raises(UserError, match=r"1 of 10 embeddings .* the first is number 3"):
        collect(x, x, 2, exclude_self=True)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num=st.integers(4, 70),
    num_classes=st.integers(1, 30),
    chunk=st.sampled_from([None, 1, 5]),
    subset=st.booleans(),
)
def test_metrics_equal_the_loops(
    seed: int, num: int, num_classes: int, chunk: int | None, subset: bool
) -> None:
    """Ties, single-image classes, K beyond the gallery, overlapping query and gallery, chunks."""
    rng = np.random.default_rng(seed)
    x, labels = grid(num, 3, seed), rng.integers(0, num_classes, num)
    everything = np.arange(num)
    query = rng.permutation(num)[: rng.integers(1, num + 1)] if subset else everything
    gallery = rng.permutation(num)[: rng.integers(1, num + 1)] if subset else everything
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
    """On random floats: its precision_at_1, r_precision and mean_average_precision_at_r."""
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


def test_chunks_change_nothing() -> None:
    """Not even the last bit of a mean."""
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
    ],
)
def test_mistakes_are_named(arguments: dict[str, object], message: str) -> None:
    """Impossible K and indices."""
    with pytest.raises(UserError, match=message):
        retrieval_metrics(unit(10, 4), np.arange(10) // 2, **arguments)


def test_ensemble_similarity_is_the_mean_of_the_peers() -> None:
    """Unit length, peers of unlike sizes and scales in order, float32."""
    peers = [unit(20, 8), 3 * unit(20, 5, seed=1), unit(20, 12, seed=2)]
    joint = ensemble_embedding(peers)
    assert joint.shape == (20, 25) and joint.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(joint, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(joint[:, :8] * np.sqrt(3), peers[0], atol=1e-6)
    mean = (peers[0] @ peers[0].T + peers[1] @ peers[1].T / 9 + peers[2] @ peers[2].T) / 3
    np.testing.assert_allclose(joint @ joint.T, mean, atol=1e-6)


def test_ensemble_keeps_a_zero_row_finite() -> None:
    """A dead peer's zero embedding adds nothing, and no NaN."""
    dead = unit(4, 8)
    dead[2] = 0
    joint = ensemble_embedding([dead, unit(4, 8, seed=1)])
    assert np.isfinite(joint).all()
    assert (joint[2, :8] == 0).all()
    with pytest.raises(UserError, match="all of one N"):
        ensemble_embedding([dead, dead[:2]])
