"""Rows `input` and `input-cached`: JPEG files to the normalised views of four peers, on one core.

    echo 4 | PYTHONPATH=experiments python -m benchmarks.images FOLDER CACHE fresh

makes the views of four peers as their actors do, one peer after the other. `fresh` empties the cache
before, `kept` reads images that were decoded before.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from benchmarks.jpegs import write_classes
from benchmarks.plain import MEAN, STD
from benchmarks.plain import PHOTO_DECODE_SIZE as DECODE_SIZE
from benchmarks.plain import PHOTO_INPUT_SIZE as INPUT_SIZE
from benchmarks.row import Goal, Row, Settings, in_turn
from benchmarks.worker import Worker, serve
from ray_dmml.data.augmentations import training_view
from ray_dmml.data.cache import through_cache
from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.models.embedding_net import standardize
from ray_dmml.ray_backend.process import tune_malloc

NUM_PEERS, NUM_IMAGES, SIDE = 4, 64, 500
LIMIT_BYTES = 2**30


def input_row(settings: Settings) -> list[Row]:
    """Images that nobody has read before: the first peer decodes them and fills the cache."""
    a, b = _rates(settings, "fresh")
    what = "500 px JPEGs to 4 peers' views of 224 px / each with PIL and torchvision"
    return [Row("input", what, "images/s/core", a, b, Goal("A/B", ">=", 3))]


def input_cached(settings: Settings) -> list[Row]:
    """Images from the cache, as in all epochs but the first."""
    a, b = _rates(settings, "kept")
    what = "the same from the cache"
    return [Row("input-cached", what, "images/s/core", a, b, Goal("A/B", ">=", 5))]


def _rates(settings: Settings, which: str) -> tuple[list[float], list[float]]:
    """Images a second, ours and the plain pipeline's. An image is one file and four views."""
    with TemporaryDirectory(prefix="benchmark-") as name:
        photographs, cache = Path(name) / "photographs", Path(name) / "cache"
        write_classes(photographs, 1, NUM_IMAGES, SIDE, SIDE)
        with (
            Worker("images", str(photographs), str(cache), which) as ours,
            Worker("plain", "input", str(photographs)) as plain,
        ):

            def rate(worker: Worker) -> float:
                worker.ask(NUM_PEERS)
                return float(worker.answer()["images_per_s"])

            for worker in (ours, plain):  # the first batch of a process is slower
                rate(worker)
            return in_turn(settings.rounds, lambda: rate(ours), lambda: rate(plain))


class Input:
    """The input side of one peer. Each peer opens the cache file for itself."""

    def __init__(self, paths: list[Path], cache: Path) -> None:
        files = FileImages(paths[0].parent, [path.name for path in paths], DECODE_SIZE)
        images = ImageSet(files, np.zeros(len(paths), np.int64), ("all",))
        (images,) = through_cache([images], cache, LIMIT_BYTES, print)
        self._source = images.source
        self._view = training_view("standard", INPUT_SIZE, DECODE_SIZE, "the peer")
        self._mean, self._std = (255 * torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))

    def batch(self) -> Tensor:
        """(B, 3, 224, 224) float32, normalised as the net does it."""
        decoded = torch.stack([self._source.read(i) for i in range(len(self._source))])
        return standardize(self._view(decoded), self._mean, self._std)


def main(folder: str, cache: str, which: str) -> None:
    torch.set_num_threads(1)
    tune_malloc()
    paths = sorted(Path(folder).rglob("*.jpg"))
    peers: list[Input] = []

    def work(num_peers: int) -> dict[str, float]:
        if which == "fresh":
            for old in Path(cache).glob("*.images"):
                old.unlink()
            peers.clear()
        began = time.perf_counter()
        peers.extend(Input(paths, Path(cache)) for _ in range(num_peers - len(peers)))
        for peer in peers:
            peer.batch()
        return {"images_per_s": len(paths) / (time.perf_counter() - began)}

    serve(work)


if __name__ == "__main__":
    main(*sys.argv[1:])
