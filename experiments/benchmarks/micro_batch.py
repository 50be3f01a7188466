"""Row `micro-batch`: memory of a peer that trains on large batches in micro batches, against small batches.

python -m benchmarks.micro_batch BATCH MICRO_BATCH    # the program whose memory is measured
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.memory import peak_beyond
from benchmarks.row import Goal, Row, Settings, in_turn
from benchmarks.worker import Worker, serve
from ray_dmml.config.schema import LossConfig, PeerConfig
from ray_dmml.data.loader import Batch
from ray_dmml.peer.peer import Peer

LARGE, SMALL, IMAGES_PER_CLASS = 512, 64, 4
INPUT_SIZE, EMBEDDING_SIZE, STEPS = 96, 128, 2
MIB = 2**20


def micro_batch(settings: Settings) -> list[Row]:
    """Every figure is that of a fresh process."""

    def peak(*sizes: int) -> float:
        with Worker("micro_batch", *map(str, sizes)) as worker:
            worker.ask(STEPS)
            return float(worker.answer()["peak_mib"])

    a, b = in_turn(settings.rounds, lambda: peak(LARGE, SMALL), lambda: peak(SMALL, SMALL))
    what = f"peak memory of a peer in training, batch {LARGE} in micro batches of {SMALL} / batch {SMALL}"
    return [Row("micro-batch", what, "MiB", a, b, Goal("A/B", "<=", 1.5))]


def train(size: int, micro_batch: int, steps: int) -> dict[str, Any]:
    """What a peer's first steps need beyond the process with the peer: activations, gradients, optimiser, images."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = PeerConfig.model_validate({"name": "peer", "input_size": INPUT_SIZE, "embedding_size": EMBEDDING_SIZE})
    peer = Peer(
        config,
        LossConfig(),
        run_seed=0,
        num_classes=size // IMAGES_PER_CLASS,
        device=device,
        micro_batch=micro_batch,
    )
    labels = torch.arange(size // IMAGES_PER_CLASS).repeat_interleave(IMAGES_PER_CLASS)
    teacher = F.normalize(torch.randn(size, EMBEDDING_SIZE), dim=1)

    def work() -> None:
        for step in range(steps):
            images: Tensor = torch.randint(0, 256, (size, 3, INPUT_SIZE, INPUT_SIZE), dtype=torch.uint8)
            out = peer.forward(Batch(step, images, labels))
            peer.step(out, peer.metric_loss(out), [teacher])

    if device.type == "cpu":
        return {"peak_mib": peak_beyond(work)}
    before = torch.cuda.memory_allocated()
    work()
    return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / MIB}


if __name__ == "__main__":
    size, part = map(int, sys.argv[1:])
    serve(lambda steps: train(size, part, steps))
