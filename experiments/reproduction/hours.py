"""How long the runs will take: images a second, times the images that the nets of each run learn from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from runner.folders import device_name
from runner.tasks import Task

from ray_dmml.checkpoint.store import CheckpointStore, read_checkpoint
from ray_dmml.cohort.local import LocalCohort
from ray_dmml.data.dataset import Splits
from ray_dmml.data.datasets import load_splits

from .arms import DM2, SINGLE
from .plan import Plan, placed

MAX_STEPS, MAX_SECONDS = 12, 20.0
FORWARD = 1 / 3
"""Part of the time of a training step that embedding the same images takes: the backward pass takes twice as long as
the forward pass."""


@dataclass(frozen=True)
class Speed:
    images_per_s: float
    """Images a second that one net learns from: reading, views, both passes, losses and the update."""

    source: str
    """Where the figure is from."""


def time_steps(plan: Plan, cores: int) -> Speed:
    """The speed of DM2 on the device of this process, from a few steps. Initial weights are random, which takes the
    same time."""
    config = placed(plan.config(DM2, 0), cores, on_gpu=torch.cuda.is_available())
    peers = tuple(peer.model_copy(update={"weights": "none"}) for peer in config.cohort.peers)
    config = config.model_copy(update={"cohort": config.cohort.model_copy(update={"peers": peers})})
    seconds: list[float] = []
    with closing(LocalCohort(config, load_splits(config.data, check=False))) as cohort:
        # The first step is slower and does not count. On a CPU, a step may take a minute.
        while len(seconds) < MAX_STEPS and (len(seconds) < 2 or sum(seconds) < MAX_SECONDS):
            began = time.perf_counter()
            cohort.run(len(seconds), len(seconds) + 1, lambda finished: None)
            seconds.append(time.perf_counter() - began)
    batch = config.data.classes_per_batch * config.data.images_per_class
    measured = f"measured now, {len(seconds) - 1} steps of {DM2} on {device_name()}"
    return Speed(batch * len(peers) / median(seconds[1:]), measured)


def num_images(plan: Plan, name: str, splits: Splits) -> float:
    """How many images the nets of a run learn from. Those that are only embedded count as FORWARD."""
    data, learners, teachers = plan.base.data, plan.num_peers(name), plan.num_teachers(name)
    learned = plan.base.train.steps * data.classes_per_batch * data.images_per_class * learners
    # Teachers embed each training image once. The untrained net is evaluated before and after its head.
    evaluations = 3 if name == SINGLE else 1
    num_test = len(splits.test) if splits.test is not None else 0
    return learned + FORWARD * (teachers * len(splits.train) + evaluations * (learners + teachers) * num_test)


def part_left(folder: Path, steps: int) -> float:
    """The part of the steps of a run that comes after its last checkpoint; 1 if it has not begun."""
    store = CheckpointStore(folder / "checkpoints")
    return 1 - read_checkpoint(store.path("last"), verify=False).step / steps if store.index() else 1.0


def estimate(plan: Plan, tasks: Sequence[Task], splits: Splits, speed: Speed) -> dict[str, float]:
    """The seconds that the runs of each arm will take, one after the other."""
    seconds: dict[str, float] = {}
    for task in tasks:
        name, seed = task.row["arm"], task.row["seed"]
        left = part_left(plan.folder(name, seed), plan.base.train.steps)
        seconds[name] = seconds.get(name, 0.0) + left * num_images(plan, name, splits) / speed.images_per_s
    return seconds


def as_time(seconds: float) -> str:
    """In seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
