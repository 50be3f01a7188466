"""Nearest neighbours against a naive search, and the order of ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_samples import grid, naive_nearest, unit

from ray_dmml.errors import UserError
from ray_dmml.evaluation import gpu_search, neighbors
from ray_dmml.evaluation.gpu_search import GpuGallery
from ray_dmml.evaluation.neighbors import nearest


def collect(*args: object, **kwargs: object) -> np.ndarray:
    """The neighbours of all chunks of queries, which come in order, each with its similarity."""
    chunks = list(nearest(*args, **kwargs))
    starts = [rows.start for rows, _, _ in chunks]
    assert starts == sorted(starts)
    neighbors, similarities = (np.concatenate([chunk[part] for chunk in chunks]) for part in (1, 2))
    queries, gallery = args[:2]
    wanted = np.take_along_axis(queries.astype(float) @ gallery.astype(float).T, neighbors, axis=1)
    assert similarities.dtype == np.float32
    np.testing.assert_allclose(similarities, np.where(neighbors < 0, np.nan, wanted), atol=1e-5)
    return neighbors


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num=st.integers(2, 120),
    size=st.integers(1, 5),
    k=st.integers(1, 130),
    chunk=st.sampled_from([None, 1, 7, 1000]),
    exclude=st.booleans(),
)
def test_ties_go_to_the_lower_index(seed: int, num: int, size: int, k: int, chunk: int | None, exclude: bool) -> None:
    """For embeddings of integers, full of ties and equal rows, the order is that of a stable sort."""
    x = grid(num, size, seed)
    own = np.arange(num) if exclude else np.full(num, -1)
    wanted = [row[:k] for row in naive_nearest(x, x, own)]
    got = collect(x, x, k, exclude=(own, own) if exclude else None, chunk=chunk)
    assert got.dtype == np.int64
    assert got.tolist() == wanted


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("k", [1, 40, 150, 500])
def test_ties_between_different_rows_reach_beyond_the_list(k: int, pairs: bool) -> None:
    """Hundreds of different rows are equally near, some of them equal: the lowest indices win."""
    level = np.arange(1200) // 200  # the nearest come last, where faiss mixes ties up
    own_number = np.random.default_rng(0).permutation(1200) // (2 if pairs else 1)
    x = np.stack([level, own_number], axis=1).astype(np.float32)
    queries = np.array([[1, 0], [-1, 0], [0, 1], [0, 0]], np.float32)
    wanted = [row[:k] for row in naive_nearest(queries, x, np.full(4, -1))]
    assert collect(queries, x, k).tolist() == wanted


def test_real_valued_neighbours_equal_those_of_float64() -> None:
    """Random unit vectors, some of them twice: the ranking is that of an exact computation."""
    gallery = unit(600, 48)
    gallery[300:320] = gallery[100:120]
    queries = unit(70, 48, seed=1)
    wanted = [row[:50] for row in naive_nearest(queries, gallery, np.full(70, -1))]
    assert collect(queries, gallery, 50, chunk=32).tolist() == wanted


@pytest.mark.parametrize("value", [0.0, 0.0441942])
def test_collapsed_embeddings_are_ranked_by_index(value: float) -> None:
    """All rows are zero or equal, at a size where blocks of a matrix product differ in the last bit."""
    x = np.full((3001, 512), value, np.float32)
    got = collect(x, x, 5, exclude=(np.arange(3001), np.arange(3001)))
    assert got[0].tolist() == [1, 2, 3, 4, 5]
    assert got[3].tolist() == [0, 1, 2, 4, 5]
    assert (got[5:] == np.arange(5)).all()


def test_self_is_excluded_by_index_not_by_distance() -> None:
    """A duplicate of the query is its first neighbour. A query may be anywhere in the gallery."""
    x = unit(10, 8)
    x[7] = x[2]
    everything = np.arange(10)
    assert collect(x, x, 9, exclude=(everything, everything))[[2, 7], 0].tolist() == [7, 2]
    own = np.array([7, -1, 0])
    got = collect(x[[2, 2, 5]], x, 10, exclude=(own, everything))
    wanted = naive_nearest(x[[2, 2, 5]], x, own)
    assert got[1].tolist() == wanted[1]
    assert got[0].tolist() == [*wanted[0], -1]
    assert got[2].tolist() == [*wanted[2], -1]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), num=st.integers(2, 60), k=st.integers(1, 70), num_ids=st.integers(1, 12))
def test_rows_with_the_id_of_a_query_are_left_out(seed: int, num: int, k: int, num_ids: int) -> None:
    """Ids of many rows and of none, also where fewer than k rows are left."""
    rng = np.random.default_rng(seed)
    x, gallery = grid(num, 2, seed), rng.integers(0, num_ids, num)
    few = x[:8]
    queries = rng.integers(-1, num_ids, len(few))
    got = collect(few, x, k, exclude=(queries, gallery))
    for row, ranked, own in zip(got.tolist(), naive_nearest(few, x, np.full(len(few), -1)), queries, strict=True):
        wanted = [j for j in ranked if gallery[j] != own][:k]
        assert row == wanted + [-1] * (len(row) - len(wanted))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_embeddings_are_named(bad: float) -> None:
    """The error locates NaN and infinity."""
    x = unit(10, 8)
    x[3, 2] = bad
    with pytest.raises(UserError, match=r"1 of 10 embeddings .* the first is number 3"):
        collect(x, x, 2)


@pytest.mark.parametrize(
    ("queries", "gallery", "message"),
    [
        ((3, 4), (5, 6), "queries have 4 dimensions, those of the gallery 6"),
        ((3,), (5, 4), r"queries must be embeddings of shape \(N, D\), not \(3,\)"),
        ((3, 4), (5, 0), r"gallery must be embeddings of shape \(N, D\), not \(5, 0\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(queries: tuple[int, ...], gallery: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        collect(np.ones(queries), np.ones(gallery), 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("k", [1, 9, 40])
def test_the_search_of_a_gpu_finds_the_same(monkeypatch: pytest.MonkeyPatch, device: str, k: int) -> None:
    """In several blocks of the gallery, with equal rows and ties between others."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    x = np.concatenate([unit(300, 8), unit(300, 8)[:20], grid(200, 8, 3)])
    wanted = collect(x[::3], x, k)
    monkeypatch.setattr(gpu_search, "BLOCK", 64)
    monkeypatch.setattr(neighbors, "gallery_on_gpu", lambda gallery, num_queries: GpuGallery(gallery, device))
    monkeypatch.setattr(neighbors.faiss, "knn", None)
    assert collect(x[::3], x, k, chunk=50).tolist() == wanted.tolist()
