"""Table `published`: a peer's step in the published setting on a GPU: ResNet-50, 125 images of 224 px."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.row import Settings
from ray_dmml.config.loading import read_settings
from ray_dmml.config.schema import Config
from ray_dmml.data.loader import Batch
from ray_dmml.peer.peer import Peer

CONFIG = Path(__file__).parent.parent / "configs" / "cub200.yaml"
OPTIONS: dict[str, dict[str, Any]] = {
    "as in cub200.yaml": {},
    "amp: off": {"amp": "off"},
    "channels_last: false": {"channels_last": False},
    "compile: true": {"compile": True},
    "compile: true, channels_last: false": {"compile": True, "channels_last": False},
}
STEPS = 4
"""Steps of each option in a round."""


def published(settings: Settings) -> list[dict[str, Any]]:
    """One peer with one teacher and random pixels; the options take turns, round by round.

    Views, the exchange, reading images, evaluations and checkpoints are left out. The table has no lines without a GPU.
    """
    if not torch.cuda.is_available():
        print("published: skipped, because there is no GPU", file=sys.stderr)
        return []
    device = torch.device("cuda", 0)
    raw = read_settings(CONFIG, ["data.root=."])
    raw["cohort"]["base"]["weights"] = "none"  # takes the same time
    size = raw["data"]["classes_per_batch"]
    labels = torch.arange(size).repeat_interleave(raw["data"]["images_per_class"])
    size_px = raw["cohort"]["base"]["input_size"]
    images = torch.randint(0, 256, (len(labels), 3, size_px, size_px), dtype=torch.uint8).pin_memory()
    teacher = torch.nn.functional.normalize(torch.randn(len(labels), 512, device=device), dim=1)

    def seconds(peer: Peer, number: int) -> float:
        """Time of one step."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        out = peer.forward(Batch(number, images, labels))
        peer.step(out, peer.metric_loss(out), [teacher])
        torch.cuda.synchronize()
        return time.perf_counter() - began

    peers: dict[str, Peer] = {}
    peak: dict[str, int] = {}
    step: dict[str, list[float]] = {}
    for option, own in OPTIONS.items():
        changed = copy.deepcopy(raw)
        changed["cohort"]["peers"][0] |= own
        config = Config.parse(changed)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        peers[option] = Peer(
            config.cohort.peers[0],
            config.loss,
            run_seed=0,
            num_classes=size,
            device=device,
        )
        for number in range(STEPS):  # warm-up: cuDNN chooses kernels, the optimiser makes its state
            seconds(peers[option], number)
        peak[option] = torch.cuda.max_memory_allocated() - before
        step[option] = []
    for turn in range(settings.rounds):
        for option, peer in peers.items():
            for number in range(STEPS):
                step[option].append(seconds(peer, STEPS * (1 + turn) + number))
    return [
        {
            "option": option,
            "step_ms": 1e3 * float(np.median(step[option])),
            "quartiles": " - ".join(f"{1e3 * q:.0f}" for q in np.quantile(step[option], [0.25, 0.75])),
            "images_a_s": len(labels) / float(np.median(step[option])),
            "peak_gib": peak[option] / 2**30,
            "device": torch.cuda.get_device_name(device),
        }
        for option in OPTIONS
    ]
