"""Rows `recall`, `recall-million` and `recall-pml`: figures against a bare faiss search, and against
pytorch-metric-learning."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from benchmarks.memory import peak_beyond
from benchmarks.row import Goal, Row, Settings, in_turn, require
from ray_dmml.cores import num_cores
from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.evaluation.evaluation import evaluate_vectors
from ray_dmml.evaluation.retrieval import retrieval_metrics

SIZE, IMAGES_PER_CLASS = 512, 5
SOP_TEST_IMAGES, PML_IMAGES = 60_502, 10_000
MILLION, MILLION_SIZE, MILLION_QUERIES = 1_000_000, 128, 10_000
RECALL_AT = (1, 10, 100, 1000)


def embeddings(num_images: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """(N, size) float32 of unit length, around the centres of classes of 5, and (N,) labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(num_images) // IMAGES_PER_CLASS
    points = rng.standard_normal((labels[-1] + 1, size), dtype=np.float32)[labels]
    points += 2 * rng.standard_normal(points.shape, dtype=np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points, labels


def recall(settings: Settings) -> list[Row]:
    """As many embeddings as Stanford Online Products has test images."""
    faiss.omp_set_num_threads(num_cores())
    points, labels = embeddings(SOP_TEST_IMAGES)
    names = tuple(map(str, range(labels[-1] + 1)))
    images = ImageSet(FileImages(Path(), map(str, range(len(labels))), 8), labels, names)
    peak = peak_beyond(lambda: evaluate_vectors(points, images, RECALL_AT)) / 1024

    def ours() -> float:
        began = time.perf_counter()
        evaluate_vectors(points, images, RECALL_AT)
        return time.perf_counter() - began

    a, b = in_turn(settings.rounds, ours, lambda: bare_search(points))
    what = "Recall@1, 10, 100, 1000 of 60,502 x 512 / bare faiss flat search"
    memory = "its peak memory beyond the embeddings"
    return [
        Row("recall", what, "s", a, b, Goal("A/B", "<=", 1.1)),
        Row("recall", memory, "GiB", [peak], [], Goal("A", "<=", 2)),
    ]


def bare_search(points: np.ndarray, queries: np.ndarray | None = None) -> float:
    """The seconds that faiss takes to search for all neighbours that the metrics need; of all points, or of queries."""
    began = time.perf_counter()
    index = faiss.IndexFlatIP(points.shape[1])
    index.add(points)
    index.search(points if queries is None else queries, max(RECALL_AT))
    return time.perf_counter() - began


def recall_million(settings: Settings) -> list[Row]:
    """A gallery of 1,000,000 x 128, of which some images are queries: each chunk of queries takes the same memory."""
    faiss.omp_set_num_threads(num_cores())
    points, labels = embeddings(MILLION, MILLION_SIZE)
    query = np.random.default_rng(0).permutation(MILLION)[:MILLION_QUERIES]
    peak = peak_beyond(lambda: retrieval_metrics(points, labels, query=query, recall_at=RECALL_AT)) / 1024

    def ours() -> float:
        began = time.perf_counter()
        retrieval_metrics(points, labels, query=query, recall_at=RECALL_AT)
        return time.perf_counter() - began

    a, b = in_turn(settings.rounds, ours, lambda: bare_search(points, points[query]))
    what = f"metrics of {MILLION_QUERIES:,} queries in 1,000,000 x 128 / bare faiss flat search"
    return [
        Row("recall-million", what, "s", a, b, Goal("A/B", "<=", 1.3)),
        Row("recall-million", "its peak memory beyond the embeddings", "GiB", [peak], [], Goal("A", "<=", 4)),
    ]


def recall_pml(settings: Settings) -> list[Row]:
    """The same values as the library's, in less time."""
    faiss.omp_set_num_threads(num_cores())
    torch.set_num_threads(num_cores())
    points, labels = embeddings(PML_IMAGES)
    as_tensors = torch.from_numpy(points), torch.from_numpy(labels)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
    )
    metrics: dict[str, dict[str, Any]] = {}

    def ours() -> float:
        began = time.perf_counter()
        metrics["ours"] = retrieval_metrics(points, labels, recall_at=(1,))
        return time.perf_counter() - began

    def library() -> float:
        began = time.perf_counter()
        metrics["library"] = calculator.get_accuracy(*as_tensors)
        return time.perf_counter() - began

    a, b = in_turn(settings.rounds, ours, library)
    pairs = (
        ("recall@1", "precision_at_1"),
        ("r_precision", "r_precision"),
        ("map@r", "mean_average_precision_at_r"),
    )
    for mine, theirs in pairs:
        same = abs(metrics["ours"][mine] - metrics["library"][theirs]) < 1e-6
        require(same, f"{mine} is the library's {theirs}: {metrics}")
    what = "Recall@1, R-precision, MAP@R of 10,000 x 512 / pytorch-metric-learning"
    return [Row("recall-pml", what, "s", a, b, Goal("B/A", ">=", 1.2), details=metrics["ours"])]
