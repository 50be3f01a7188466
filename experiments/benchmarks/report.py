"""Row `report`: the report of a run, after its test images are embedded."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.jpegs import write_classes
from benchmarks.memory import peak_beyond
from benchmarks.row import Goal, Row, Settings, require
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.evaluation.evaluation import Evaluation
from ray_dmml.report.build import RunRecord, build_report
from ray_dmml.report.curves import read_metrics
from ray_dmml.report.page import render
from ray_dmml.training.run_dir import RunDir

NUM_CLASSES, IMAGES_PER_CLASS, SIDE = 300, 20, 400
EMBEDDING_SIZE, NUM_STEPS = 512, 4000
MAX_MIB, MAX_PICTURE_MIB, MAX_SECONDS = 20, 12, 20


def report(settings: Settings) -> list[Row]:
    """Seconds and size of the page for 6,000 test images that were embedded already."""
    seconds: list[float] = []
    sizes: list[float] = []
    peaks: list[float] = []
    with TemporaryDirectory(prefix="benchmark-report-") as name:
        folder = Path(name)
        write_classes(folder / "images", 2 * NUM_CLASSES, IMAGES_PER_CLASS, SIDE, SIDE * 3 // 4)
        raw = {"data": {"name": "imagefolder", "root": str(folder / "images"), "decode_size": 256}}
        config = Config.parse(raw)
        images = load_splits(config.data).test  # they are decoded once, as before training
        assert images is not None
        run = RunDir(folder)
        run.write_environment()
        write_metrics(run.metrics_file)
        evaluation = Evaluation.of(embeddings(images.labels), images, recall_at=(1, 2, 4, 8))
        figures = evaluation.summary()
        results = {
            **{"untrained": {}, "untrained_ensemble": {}, "frozen_backbones": {}, **figures, "weights": "last"},
            **{"step": NUM_STEPS, "split": "test", "split_by": "class", "num_classes": images.num_classes},
            **{"num_images": len(images), "num_queries": None, "num_gallery": None, "init_from": None},
        }

        def write() -> None:
            metrics = read_metrics(run.metrics_file)
            record = RunRecord(run.path, config, run.environment(), metrics, results, evaluation)
            page = build_report([record], made=datetime.now())
            pictures = sum(len(uri) for uri in (page.map.sheets if page.map else ()))
            run.report_file.write_text(render(page))
            uses = run.report_file.read_text().count("data:image/jpeg")
            require(uses > 300, f"the page has pictures: {uses}")
            require(pictures < MAX_PICTURE_MIB * 2**20, f"the map's pictures have {pictures} bytes")

        for _ in range(settings.rounds):
            began = time.perf_counter()
            peaks.append(peak_beyond(write))
            seconds.append(time.perf_counter() - began)
            sizes.append(run.report_file.stat().st_size / 2**20)
    what = f"report of {NUM_CLASSES * IMAGES_PER_CLASS:,} embedded images"
    return [
        Row("report", what, "s", seconds, [], Goal("A", "<=", MAX_SECONDS), details={"peak_mib": peaks}),
        Row("report", "its size", "MiB", sizes, [], Goal("A", "<=", MAX_MIB)),
    ]


def embeddings(labels: np.ndarray) -> dict[str, np.ndarray]:
    """(N, D) float32 of two peers that often find the right class."""
    rng = np.random.default_rng(0)
    found = {}
    for name in ("peer0", "peer1"):
        centers = rng.standard_normal((labels.max() + 1, 24), dtype=np.float32)
        latent = centers[labels] + 1.2 * rng.standard_normal((len(labels), 24), dtype=np.float32)
        points = latent @ rng.standard_normal((24, EMBEDDING_SIZE), dtype=np.float32)
        found[name] = points / np.linalg.norm(points, axis=1, keepdims=True)
    return found


def write_metrics(path: Path) -> None:
    """metrics.jsonl of NUM_STEPS steps."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for step in range(1, NUM_STEPS + 1):
            terms = {name: float(rng.random()) for name in ("loss", "metric", "distance", "angle")}
            file.write(json.dumps({"step": step, "peers": {"peer0": terms, "peer1": terms}}) + "\n")
            if step % 100 == 0:
                row = {"recall@1": step / (step + 500), "map@r": step / (step + 900)}
                figures = {"peers": {"peer0": row, "peer1": row}, "ensemble": row}
                file.write(json.dumps({"step": step, "validation": figures}) + "\n")
