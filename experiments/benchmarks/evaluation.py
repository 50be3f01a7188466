"""Row `evaluate`: the whole evaluation of a run against a bare faiss search, and its bootstrap."""

from __future__ import annotations

import time
from pathlib import Path

import faiss

from benchmarks.memory import peak_beyond
from benchmarks.recall import RECALL_AT, SOP_TEST_IMAGES, bare_search, embeddings
from benchmarks.row import Goal, Row, Settings, in_turn
from ray_dmml.cores import num_cores
from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.evaluation.bootstrap import class_bootstrap
from ray_dmml.evaluation.evaluation import Evaluation

NUM_SYSTEMS = 3
"""Two peers and their ensemble."""


def evaluate(settings: Settings) -> list[Row]:
    """One system with every metric, its intervals, verification and warnings; the bootstrap alone, of three systems."""
    faiss.omp_set_num_threads(num_cores())
    points, labels = embeddings(SOP_TEST_IMAGES)
    names = tuple(map(str, range(labels[-1] + 1)))
    images = ImageSet(FileImages(Path(), map(str, range(len(labels))), 8), labels, names)
    bootstraps, summaries = [], []

    def work() -> Evaluation:
        evaluation = Evaluation.of({"peer": points}, images, recall_at=RECALL_AT)
        summaries.append(evaluation.summary())
        return evaluation

    peak = peak_beyond(work) / 1024

    def ours() -> float:
        began = time.perf_counter()
        evaluation = work()
        seconds = time.perf_counter() - began
        bootstraps.append(bootstrap(evaluation))
        return seconds

    def bootstrap(evaluation: Evaluation) -> float:
        values = evaluation.systems["peer"].values
        of_all = {(system, metric): each for system in range(NUM_SYSTEMS) for metric, each in values.items()}
        began = time.perf_counter()
        for macro in (False, True):
            class_bootstrap(of_all, evaluation.query_classes, macro=macro)
        return time.perf_counter() - began

    a, b = in_turn(settings.rounds, ours, lambda: bare_search(points))
    size = f"{SOP_TEST_IMAGES:,} x {points.shape[1]}"
    what = f"all metrics, intervals and verification of {size} / bare faiss flat search"
    resampled = f"1,000 resamples of {NUM_SYSTEMS} systems, means over queries and over classes"
    details = {key: summaries[-1][key] for key in ("ensemble", "intervals", "verification")}
    return [
        Row("evaluate", what, "s", a, b, Goal("A/B", "<=", 1.3), details=details),
        Row("evaluate", "its peak memory beyond the embeddings", "GiB", [peak], [], Goal("A", "<=", 2)),
        Row("evaluate", resampled, "s", bootstraps, [], Goal("A", "<=", 5)),
    ]
