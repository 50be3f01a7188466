"""Rows `index` and `index-flat`: an index of many embeddings against faiss alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.memory import peak_beyond
from benchmarks.row import Goal, Row, Settings, in_turn, require
from ray_dmml import build_index, load_index
from ray_dmml.cores import num_cores
from ray_dmml.index import ivf

NUM_IMAGES, SIZE = 1_000_000, 128
IMAGES_PER_CLASS, LATENT_SIZE = 20, 12
SHARD_IMAGES = 50_000
NUM_FLAT, FLAT_SIZE = 60_000, 512
NUM_QUERIES, K, RECALL = 1000, 10, 0.95
GIB = 2**30


def embeddings(num_images: int, size: int) -> np.ndarray:
    """(N, D) float32 of unit length: overlapping classes in 12 dimensions, and a little noise in all, in random order.

    With these, a search has to read several lists. The neighbours of independent points would be in most lists, and
    those of classes that do not overlap in one.
    """
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((-(-num_images // IMAGES_PER_CLASS), LATENT_SIZE), dtype=np.float32)
    to_all = rng.standard_normal((LATENT_SIZE, size), dtype=np.float32) / LATENT_SIZE**0.5
    points = np.empty((num_images, size), np.float32)
    for start in range(0, num_images, SHARD_IMAGES):
        block = points[start : start + SHARD_IMAGES]
        latent = centres[rng.integers(0, len(centres), len(block))]
        latent += 0.3 * rng.standard_normal(latent.shape, dtype=np.float32)
        block[:] = latent @ to_all + 0.1 * rng.standard_normal(block.shape, dtype=np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return points


def write_folder(folder: Path, points: np.ndarray) -> None:
    """The folder that `ray-dmml embed` would have written."""
    info = {"model": "0" * 64, "peer": "ensemble", "size": points.shape[1], "root": "photos", "run": "run"}
    (folder / "embed.json").write_text(json.dumps(info))
    for number, start in enumerate(range(0, len(points), SHARD_IMAGES)):
        block = points[start : start + SHARD_IMAGES]
        sides = pa.array(np.full(len(block), 500, np.int32))
        table = pa.table(
            {
                "path": [f"photos/{row % 1000:03d}/{row:09d}.jpg" for row in range(start, start + len(block))],
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), points.shape[1]),
                "width": sides,
                "height": sides,
                "error": pa.nulls(len(block), pa.string()),
            }
        )
        pq.write_table(table, folder / f"part-{number:05d}.parquet")


def index(settings: Settings) -> list[Row]:
    """Build time, memory, and the time of one query on one core, of an index that reaches its recall."""
    points = embeddings(NUM_IMAGES + NUM_QUERIES, SIZE)
    points, queries = points[:NUM_IMAGES], points[NUM_IMAGES:]
    peaks: list[float] = []
    details: dict[str, Any] = {}
    with TemporaryDirectory(prefix="benchmark-index-") as name:
        folder = Path(name)
        write_folder(folder, points)
        lists = ivf.num_lists(NUM_IMAGES)

        def ours() -> float:
            faiss.omp_set_num_threads(num_cores())
            began = time.perf_counter()
            peaks.append(peak_beyond(lambda: build_index(folder, kind="ivf", recall=RECALL, overwrite=True)) / 1024)
            return time.perf_counter() - began

        def bare() -> float:
            faiss.omp_set_num_threads(num_cores())
            began = time.perf_counter()
            index = faiss.index_factory(SIZE, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
            sample = np.random.default_rng(0).choice(NUM_IMAGES, ivf.TRAINING_ROWS_PER_LIST * lists, replace=False)
            index.train(points[np.sort(sample)])
            index.add(points)
            faiss.write_index(index, str(folder / "bare"))
            return time.perf_counter() - began

        build_a, build_b = in_turn(settings.rounds, ours, bare)
        loaded = load_index(folder)
        flat = faiss.IndexFlatIP(SIZE)
        flat.add(points)
        exact, found = flat.search(queries, K)[0], loaded.search(queries, K)[0]
        details |= loaded.info.model_dump(include={"num_lists", "num_probed", "recall"})
        details["recall_of_new_queries"] = float((found >= exact[:, -1:] - 1e-6).mean())
        require(details["recall_of_new_queries"] >= RECALL - 0.02, f"new queries have the recall: {details}")
        faiss.omp_set_num_threads(1)  # ours has no more threads then

        def milliseconds(index: Any, number: int) -> float:
            times = []
            for query in queries[:number]:
                began = time.perf_counter()
                index.search(query[None], K)
                times.append(1e3 * (time.perf_counter() - began))
            return median(times)

        search_a, search_b = in_turn(
            settings.rounds, lambda: milliseconds(loaded, NUM_QUERIES), lambda: milliseconds(flat, 50)
        )
    vectors = points.nbytes / GIB
    beyond = [peak - vectors for peak in peaks]
    what = f"index of {NUM_IMAGES:,} x {SIZE} at recall@10 {RECALL}"
    return [
        Row("index", f"{what}: build / k-means, add and write by faiss", "s", build_a, build_b, Goal("A/B", "<=", 1.5)),
        Row("index", "its memory beyond the vectors", "GiB", beyond, [], Goal("A", "<=", 1.5)),
        Row("index", "one query on one core", "ms", search_a, [], Goal("A", "<=", 1), details=details),
        Row("index", "the same / exact search by faiss", "ms", search_a, search_b, Goal("A/B", "<=", 0.1)),
    ]


def index_flat(settings: Settings) -> list[Row]:
    """Exact search gives faiss's own results."""
    faiss.omp_set_num_threads(num_cores())
    points = embeddings(NUM_FLAT + NUM_QUERIES, FLAT_SIZE)
    points, queries = points[:NUM_FLAT], points[NUM_FLAT:]
    flat = faiss.IndexFlatIP(FLAT_SIZE)
    flat.add(points)
    with TemporaryDirectory(prefix="benchmark-index-") as name:
        write_folder(Path(name), points)
        loaded = build_index(name)
        require(np.array_equal(loaded.search(queries, K)[1], flat.search(queries, K)[1]), "both find the same")

        def seconds(index: Any) -> float:
            began = time.perf_counter()
            index.search(queries, K)
            return time.perf_counter() - began

        a, b = in_turn(settings.rounds, lambda: seconds(loaded), lambda: seconds(flat))
    what = f"exact search of {NUM_QUERIES:,} queries in {NUM_FLAT:,} x {FLAT_SIZE} / faiss alone"
    return [Row("index-flat", what, "s", a, b, Goal("A/B", "<=", 1.1))]
