"""`options`: what memory layout, bfloat16 and torch.compile do to a peer's step on this device. A table."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import steps
from benchmarks.jpegs import write_classes
from benchmarks.plain import DEVICE, EMBEDDING_SIZE
from benchmarks.row import Settings
from ray_dmml.cohort.local import build_peer
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.loader import BatchLoader, build_sampler
from ray_dmml.ray_backend.peer_actor import tune_malloc

BACKBONES = ("tf_efficientnet_lite0", "resnet18")
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "channels_last: false": {"channels_last": False},
    "amp: bfloat16": {"amp": "bfloat16"},
    "compile: true": {"compile": True},
}


def config(folder: Path, **peer: Any) -> Config:
    raw = steps.config(folder).model_dump(mode="json")
    raw["cohort"]["peers"] = [{**raw["cohort"]["peers"][0], **peer}]
    return Config.parse(raw)


def options(settings: Settings) -> list[dict[str, Any]]:
    """One peer with one teacher, 64 images of 96 px, on one thread; the options in turn."""
    torch.set_num_threads(1)
    tune_malloc()
    found = []
    with TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        write_classes(folder, 40, 16, 128, 128)
        for backbone in BACKBONES:
            configs = {
                option: config(folder, backbone=backbone, **peer)
                for option, peer in OPTIONS.items()
            }
            splits = load_splits(configs["as it is"].data)
            peers = {o: build_peer(c, 0, splits, DEVICE, True) for o, c in configs.items()}
            loader = BatchLoader(splits.train, build_sampler(configs["as it is"], splits))
            teacher = torch.nn.functional.normalize(torch.randn(64, EMBEDDING_SIZE), dim=1)
            seconds: dict[str, list[float]] = {option: [] for option in OPTIONS}
            for step in range(1 + settings.rounds):
                batch = loader.batch(step)
                for option, peer in peers.items():
                    began = time.perf_counter()
                    peer.embed(batch)
                    peer.update([teacher])
                    seconds[option].append(time.perf_counter() - began)
            loader.close()
            base = median(seconds["as it is"][1:])
            found += [
                {
                    "backbone": backbone,
                    "option": option,
                    "step_ms": 1e3 * median(taken[1:]),
                    "speed": base / median(taken[1:]),
                    "first_step_s": taken[0],
                }
                for option, taken in seconds.items()
            ]
    return found
