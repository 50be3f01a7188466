"""`published`: a peer's step in the published setting, on a GPU: ResNet-50, 125 images of 224 px. A table."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.row import Settings
from ray_dmml.config import Config, read_settings
from ray_dmml.data.loading import Batch
from ray_dmml.peer import Peer

CONFIG = Path(__file__).parent.parent / "configs" / "cub200.yaml"
OPTIONS: dict[str, dict[str, Any]] = {
    "as in cub200.yaml": {},
    "amp: off": {"amp": "off"},
    "channels_last: false": {"channels_last": False},
    "view: weak": {"view": "weak"},
    "view: strong": {"view": "strong"},
}
NUM_CLASSES = 100


def published(settings: Settings) -> list[dict[str, Any]]:
    """One peer with one teacher and random pixels, the options in turn; without a GPU no lines. Reading
    files is not in it: the next batch is decoded while this one is learned from."""
    if not torch.cuda.is_available():
        return []
    device, found = torch.device("cuda", 0), []
    raw = read_settings(CONFIG, ["data.root=."])
    raw["cohort"]["base"]["weights"] = "none"  # the time is the same
    size, decode = raw["data"]["classes_per_batch"], raw["data"]["decode_size"]
    labels = torch.arange(size).repeat_interleave(raw["data"]["images_per_class"])
    images = torch.randint(0, 256, (len(labels), 3, decode, decode), dtype=torch.uint8)
    teacher = torch.nn.functional.normalize(torch.randn(len(labels), 512, device=device), dim=1)
    for option, own in OPTIONS.items():
        changed = copy.deepcopy(raw)
        changed["cohort"]["peers"][0] |= own
        config = Config.parse(changed)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        peer = Peer(
            config.cohort.peers[0],
            config.loss,
            run_seed=0,
            num_classes=NUM_CLASSES,
            decode_size=decode,
            device=device,
        )
        whole, seen = [], []
        for step in range(5 * settings.rounds):
            batch = Batch(step, images, labels)
            torch.cuda.synchronize()
            began = time.perf_counter()
            peer.embed(batch)
            peer.measure()
            peer.update([teacher])
            torch.cuda.synchronize()
            whole.append(time.perf_counter() - began)
            began = time.perf_counter()
            peer._see(peer.view, images)
            torch.cuda.synchronize()
            seen.append(time.perf_counter() - began)
        taken = median(whole[len(whole) // 2 :])  # the first ones choose kernels
        found.append(
            {
                "option": option,
                "step_ms": 1e3 * taken,
                "of which view": 1e3 * median(seen[len(seen) // 2 :]),
                "images_a_s": len(labels) / taken,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                "first_step_s": whole[0],
                "minutes of 4,000 steps": 4000 * taken / 60,
                "device": torch.cuda.get_device_name(device),
            }
        )
        del peer
    return found
