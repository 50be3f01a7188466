"""The input side of the peers of one machine, as their actors do it, one after the other on one core.

    echo 4 | PYTHONPATH=experiments python -m benchmarks.our_input FOLDER CACHE fresh

makes the views of four peers, each with the cache file open for itself. `fresh` forgets the cache
before, `kept` reads what was decoded before.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.plain_input import DECODE_SIZE, INPUT_SIZE, MEAN, STD
from benchmarks.worker import serve
from ray_dmml.data.augmentations import training_view
from ray_dmml.data.cache import through_cache
from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.models.embedding_net import standardize
from ray_dmml.ray_backend.peer_actor import tune_malloc

LIMIT_BYTES = 2**30


class Input:
    """Of one peer."""

    def __init__(self, paths: list[Path], cache: Path) -> None:
        files = FileImages(paths[0].parent, [path.name for path in paths], DECODE_SIZE)
        images = ImageSet(files, np.zeros(len(paths), np.int64), ("all",))
        (images,) = through_cache([images], cache, LIMIT_BYTES)
        self._source = images.source
        self._view = training_view("standard", INPUT_SIZE, DECODE_SIZE, "the peer")
        self._mean, self._std = (
            255 * torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD)
        )

    def batch(self) -> Tensor:
        """(B, 3, 224, 224) float32, normalised as the net does it."""
        decoded = torch.stack([self._source.read(i) for i in range(len(self._source))])
        return standardize(self._view(decoded), self._mean, self._std)


def main(folder: str, cache: str, which: str) -> None:
    torch.set_num_threads(1)
    tune_malloc()
    paths = sorted(Path(folder).rglob("*.jpg"))
    kept: list[Input] = []

    def work(num_peers: int) -> dict[str, float]:
        if which == "fresh":
            for old in Path(cache).glob("*.images"):
                old.unlink()
            kept.clear()
        began = time.perf_counter()
        kept.extend(Input(paths, Path(cache)) for _ in range(num_peers - len(kept)))
        for each in kept:
            each.batch()
        return {"images_per_s": len(paths) / (time.perf_counter() - began)}

    serve(work)


if __name__ == "__main__":
    main(*sys.argv[1:])
