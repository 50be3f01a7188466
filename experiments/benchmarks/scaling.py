"""Table `scaling`: time of a step and the exchange's share of it, by peers M and batch size N."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch

from benchmarks.exchange import private_ray
from benchmarks.jpegs import write_classes
from benchmarks.row import Settings
from ray_dmml.config.schema import Config
from ray_dmml.losses.relational import relational_losses
from ray_dmml.ray_backend.coordinator import Coordinator
from ray_dmml.ray_backend.peer_actor import PeerActor

PEERS, BATCHES = (1, 2, 4, 8), (32, 128, 512)
IMAGES_PER_CLASS, EMBEDDING_SIZE = 4, 128
WARM_UP, STEPS, EXCHANGES = 1, 2, 20
CELL_S = 12.0
"""After so many seconds a line begins no further round: the largest cohort takes half a minute a step."""


class TimedPeer(PeerActor):
    """A peer's actor that times its steps, its exchange and its mutual term."""

    def timed_run(self, start: int, stop: int) -> float:
        """Seconds a step."""
        began = time.perf_counter()
        self.run(start, stop)
        return (time.perf_counter() - began) / (stop - start)

    def timed_exchange(self, start: int, count: int, rows: int) -> float:
        """Seconds an exchange while nothing else happens."""
        sent = torch.randn(rows, EMBEDDING_SIZE)
        began = time.perf_counter()
        for step in range(start, start + count):
            self.exchange.start(step, sent)
            self.exchange.finish()
        return (time.perf_counter() - began) / count

    def timed_relational(self, rows: int, num_teachers: int) -> float:
        """Seconds of the mutual term of one peer, forward and backward."""
        if num_teachers == 0:
            return 0.0
        points = torch.nn.functional.normalize(torch.randn(1 + num_teachers, rows, EMBEDDING_SIZE), dim=2)
        student = points[0].requires_grad_()
        began = time.perf_counter()
        terms = relational_losses(student, list(points[1:]))
        (terms.distance + 2 * terms.angle).backward()
        return time.perf_counter() - began


def config(folder: Path, num_peers: int, batch_size: int) -> Config:
    return Config.parse(
        {
            "data": {
                "name": "imagefolder",
                "root": str(folder),
                "decode_size": 36,
                "classes_per_batch": batch_size // IMAGES_PER_CLASS,
                "images_per_class": IMAGES_PER_CLASS,
                "validation_fraction": 0,
            },
            "cohort": {
                "base": {
                    "backbone": "test_resnet",
                    "batch_norm": "train",
                    "embedding_size": EMBEDDING_SIZE,
                    "input_size": 32,
                },
                "peers": [{} for _ in range(num_peers)],
            },
        }
    )


@contextmanager
def timed_peers(config: Config) -> Iterator[list[Any]]:
    """The actors of a cohort, joined by a coordinator."""
    names = [str(peer.name) for peer in config.cohort.peers]
    coordinator = ray.remote(Coordinator).options(num_cpus=0).remote(names)
    actors = [ray.remote(TimedPeer).options(num_cpus=0.2).remote() for _ in names]
    ray.get([a.build.remote(config, i, (), {}, 1, True, {}) for i, a in enumerate(actors)])
    ray.get([a.join.remote(coordinator, names) for a in actors])
    yield actors
    for actor in [*actors, coordinator]:
        ray.kill(actor)


def measure(num_peers: int, folder: Path, batch_size: int, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    steps: list[float] = []
    exchanges: list[float] = []
    relational: list[float] = []
    with timed_peers(config(folder, num_peers, batch_size)) as actors:
        ray.get([a.timed_run.remote(0, WARM_UP) for a in actors])
        began = time.perf_counter()
        for number in range(rounds):
            if steps and time.perf_counter() - began > CELL_S:
                break
            start = WARM_UP + number * STEPS
            steps.append(max(ray.get([a.timed_run.remote(start, start + STEPS) for a in actors])))
            exchanges.append(max(ray.get([a.timed_exchange.remote(0, EXCHANGES, batch_size) for a in actors])))
            relational.append(ray.get(actors[0].timed_relational.remote(batch_size, num_peers - 1)))
    step, exchange = median(steps), median(exchanges)
    return {
        "peers": num_peers,
        "batch": batch_size,
        "rounds": len(steps),
        "step_ms": 1e3 * step,
        "step_ms_per_peer_and_core": 1e3 * step / max(1.0, num_peers / 2),
        "exchange_ms": 1e3 * exchange,
        "exchange_share": exchange / step,
        "relational_ms": 1e3 * median(relational),
        "relational_share": median(relational) / step,
    }


def scaling(settings: Settings) -> list[dict[str, Any]]:
    """Small peers (test_resnet, 32 px, D = 128), direct transport, loading included, 2 cores."""
    with TemporaryDirectory(prefix="benchmark-") as name, private_ray():
        folder = Path(name)
        write_classes(folder, 2 * max(BATCHES) // IMAGES_PER_CLASS, IMAGES_PER_CLASS, 40, 40)
        return [
            measure(num_peers, folder, batch_size, settings.rounds) for num_peers in PEERS for batch_size in BATCHES
        ]
