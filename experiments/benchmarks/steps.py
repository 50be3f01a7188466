"""Rows `step-*` and `memory`: a cohort of two on Ray against trainers in plain PyTorch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import ray

from benchmarks import plain
from benchmarks.jpegs import training_folder
from benchmarks.memory import resident
from benchmarks.row import Goal, Row, Settings, in_turn
from benchmarks.worker import Worker, ask_all, distributed
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.ray_backend.ray_cohort import RayCohort

WARM_UP, COUNT, MEMORY_COUNT = 2, 8, 2
LOADERS = "1"
"""Loading processes of a plain trainer."""


def config(folder: Path) -> Config:
    """Two peers that do the same as the plain trainers."""
    return Config.parse(
        {
            "data": {
                "name": "imagefolder",
                "root": str(folder),
                "decode_size": plain.DECODE_SIZE,
                "classes_per_batch": plain.CLASSES_PER_BATCH,
                "images_per_class": plain.IMAGES_PER_CLASS,
                "validation_fraction": 0,
                "check_images": False,
            },
            "cohort": {
                "base": {
                    "backbone": plain.BACKBONE,
                    "batch_norm": plain.BATCH_NORM,
                    "embedding_size": plain.EMBEDDING_SIZE,
                    "input_size": plain.INPUT_SIZE,
                    "optimizer": {"lr": plain.LEARNING_RATE, "weight_decay": plain.WEIGHT_DECAY},
                }
            },
        }
    )


class TimedCohort:
    """A cohort on Ray that continues its training from round to round."""

    def __init__(self, cohort: RayCohort) -> None:
        self.cohort, self._step = cohort, 0

    def steps_per_s(self) -> float:
        self.run(WARM_UP)
        began = time.perf_counter()
        self.run(COUNT)
        return COUNT / (time.perf_counter() - began)

    def run(self, count: int) -> None:
        self.cohort.run(self._step, self._step + count, lambda finished: None)
        self._step += count


@contextmanager
def timed_cohort(folder: Path) -> Iterator[TimedCohort]:
    settings = config(folder)
    with closing(RayCohort(settings, load_splits(settings.data))) as cohort:
        yield TimedCohort(cohort)


def steps_per_s(workers: list[Worker]) -> float:
    """Rate of plain trainers that work at the same time, until the last one is done."""
    ask_all(workers, WARM_UP)
    began = time.perf_counter()
    ask_all(workers, COUNT)
    return COUNT / (time.perf_counter() - began)


def _row(name: str, what: str, bound: float, settings: Settings) -> list[Row]:
    with ExitStack() as stack:
        folder = stack.enter_context(training_folder(settings.data_root))
        workers = [stack.enter_context(worker) for worker in _competitor(name, str(folder))]
        cohort = stack.enter_context(timed_cohort(folder))
        a, b = in_turn(settings.rounds, cohort.steps_per_s, lambda: steps_per_s(workers))
    return [Row(name, what, "steps/s", a, b, Goal("A/B", ">=", bound))]


def _competitor(name: str, folder: str) -> list[Worker]:
    if name == "step-ideal":
        return [Worker("plain", "independent", folder, str(seed), LOADERS) for seed in range(2)]
    if name == "step-plain":
        return distributed("plain", "mutual", folder, LOADERS)
    return [Worker("plain", "sequential", folder, LOADERS, threads=2)]


def step_ideal(settings: Settings) -> list[Row]:
    what = "cohort of 2 on Ray / two trainers at the same time that never talk"
    return _row("step-ideal", what, 0.97, settings)


def step_plain(settings: Settings) -> list[Row]:
    what = "cohort of 2 on Ray / plain torch.distributed DM2"
    return _row("step-plain", what, 1.0, settings)


def step_sequential(settings: Settings) -> list[Row]:
    what = "cohort of 2 on Ray / one process, both nets in turn, 2 threads"
    return _row("step-sequential", what, 1.1, settings)


def memory(settings: Settings) -> list[Row]:
    """Resident memory between steps. Shared libraries count in full on both sides."""
    with ExitStack() as stack:
        folder = stack.enter_context(training_folder(settings.data_root))
        trainer = stack.enter_context(Worker("plain", "independent", str(folder), "0", LOADERS))
        timed = stack.enter_context(timed_cohort(folder))
        actors = [timed.cohort.actors[timed.cohort.names[0]], timed.cohort.coordinator]
        # A lambda travels by value, so that the coordinator's process imports nothing for it.
        pids = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors])
        samples: dict[str, list[dict[str, float]]] = {"peer": [], "coordinator": [], "plain": []}
        for _ in range(settings.rounds):
            timed.run(MEMORY_COUNT)
            ask_all([trainer], MEMORY_COUNT)
            for name, pid in zip(samples, [*pids, trainer.pid], strict=True):
                samples[name].append(resident(pid))
    rss = {name: [sample["rss"] for sample in each] for name, each in samples.items()}
    peer = "resident memory of a peer's actor in training / plain PyTorch trainer"
    coordinator = "resident memory of the coordinator"
    goals = Goal("A/B", "<=", 1.15), Goal("A", "<=", 180)
    return [
        Row("memory", peer, "MiB", rss["peer"], rss["plain"], goals[0], details=samples),
        Row("memory", coordinator, "MiB", rss["coordinator"], [], goals[1]),
    ]
