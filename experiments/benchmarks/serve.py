"""Row `serve`: requests a second of a search service with one replica, against its net alone on batches of 32."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.jpegs import write_classes
from benchmarks.row import Goal, Row, Settings, in_turn, require
from ray_dmml import Config, build_index, list_images, load_cohort, train
from ray_dmml.inference import TrainedCohort

NUM_CLIENTS, BATCH_SIZE, WARM_UP, COUNT = 32, 32, 64, 320
CLASSES, IMAGES_PER_CLASS, WIDTH, HEIGHT = 8, 8, 320, 240


def trained_index(folder: Path) -> Path:
    """A run with one small ResNet, and an index of its images."""
    images = folder / "images"
    write_classes(images, CLASSES, IMAGES_PER_CLASS, WIDTH, HEIGHT)
    peer = {"backbone": "resnet18", "weights": "none", "input_size": 224, "embedding_size": 128}
    settings = {
        "data": {"name": "imagefolder", "root": str(images), "classes_per_batch": 2, "images_per_class": 2},
        "cohort": {"base": peer, "peers": [{}, {}]},
        "train": {"steps": 1, "report": False},
        "evaluation": {"untrained": False},
    }
    train(Config.parse(settings), folder / "run", local=True, progress=False)
    net, files = load_cohort(folder / "run").peers["peer0"], list_images(images)
    vectors = net.embed_files(files)
    info = {"model": net.fingerprint, "peer": "peer0", "size": vectors.shape[1], "run": str(folder / "run")}
    index = folder / "index"
    index.mkdir()
    (index / "embed.json").write_text(json.dumps(info | {"root": str(images)}))
    nothing = [None] * len(files)
    columns = {
        "path": pa.array([str(file.relative_to(images)) for file in files]),
        "embedding": pa.array(list(vectors), pa.list_(pa.float32(), vectors.shape[1])),
        "width": pa.array(nothing, pa.int32()),
        "height": pa.array(nothing, pa.int32()),
        "error": pa.array(nothing, pa.string()),
    }
    pq.write_table(pa.table(columns), index / "part-00000.parquet")
    build_index(index)
    return index


@contextmanager
def service(index: Path) -> Iterator[int]:
    """The port of a service of the index."""
    command = [sys.executable, "-m", "ray_dmml.cli", "serve", str(index), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"answered at http://127\.0\.0\.1:(\d+)/", line):
                yield int(found[1])
                return
        raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def load(port: int, images: list[bytes], count: int) -> tuple[float, list[float]]:
    """Requests a second, and the seconds of each, of clients that send one request after another."""
    numbers, seconds, errors = iter(range(count)), [], []
    lock = threading.Lock()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            began = time.perf_counter()
            connection.request("POST", "/search", images[number % len(images)], {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            body = answer.read()
            seconds.append(time.perf_counter() - began)
            if answer.status != 200 or not json.loads(body)["results"][0]["matches"]:
                errors.append(body)

    clients = [threading.Thread(target=client) for _ in range(NUM_CLIENTS)]
    began = time.perf_counter()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    taken = time.perf_counter() - began
    require(not errors, f"all requests were answered: {errors[:1]}")
    return count / taken, seconds


def images_per_s(cohort: TrainedCohort, count: int) -> float:
    """Of the net alone, on batches of decoded images."""
    net, batch = cohort.peers["peer0"], torch.zeros(BATCH_SIZE, 3, cohort.decode_size, cohort.decode_size).byte()
    began = time.perf_counter()
    for _ in range(count // BATCH_SIZE):
        net.embed(batch)
    return count / (time.perf_counter() - began)


def serve(settings: Settings) -> list[Row]:
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="benchmark-") as name:
        index = trained_index(Path(name))
        cohort = load_cohort(Path(name) / "run")
        images = [file.read_bytes() for file in list_images(Path(name) / "images")]
        tails: list[float] = []
        with service(index) as port:
            load(port, images, WARM_UP)
            images_per_s(cohort, BATCH_SIZE)

            def requests_per_s() -> float:
                rate, seconds = load(port, images, COUNT)
                tails.append(float(np.percentile(seconds, 99)) / median(seconds))
                return rate

            a, b = in_turn(settings.rounds, requests_per_s, lambda: images_per_s(cohort, COUNT))
    what = f"search service, {NUM_CLIENTS} clients, JPEG in, one replica / its net alone on batches of {BATCH_SIZE}"
    tail = "its slowest 1% of requests / the median"
    return [
        Row("serve", what, "1/s", a, b, Goal("A/B", ">=", 0.8)),
        Row("serve", tail, "", tails, [], Goal("A", "<=", 3)),
    ]
