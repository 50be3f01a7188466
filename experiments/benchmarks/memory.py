"""Row `memory`: what a peer's actor and the coordinator hold, against a plain trainer."""

from __future__ import annotations

from contextlib import ExitStack

import ray

from benchmarks.jpegs import training_folder
from benchmarks.resident import process_id, resident
from benchmarks.row import Goal, Row, Settings
from benchmarks.steps import LOADERS, timed_cohort
from benchmarks.worker import Worker

STEPS = 2


def memory(settings: Settings) -> list[Row]:
    """Resident memory between steps; shared libraries count in full on both sides."""
    with ExitStack() as stack:
        folder = stack.enter_context(training_folder(settings.data_root))
        plain = stack.enter_context(Worker("independent", str(folder), "0", LOADERS))
        timed = stack.enter_context(timed_cohort(folder))
        actors = [timed.cohort._actors[timed.cohort.names[0]], timed.cohort._coordinator]
        pids = ray.get([actor.__ray_call__.remote(process_id) for actor in actors])
        found: dict[str, list[dict[str, float]]] = {"peer": [], "coordinator": [], "plain": []}
        for _ in range(settings.rounds):
            timed.run(STEPS)
            plain.ask(STEPS)
            plain.answer()
            for name, pid in zip(found, [*pids, plain.pid], strict=True):
                found[name].append(resident(pid))
    rss = {name: [sample["rss"] for sample in samples] for name, samples in found.items()}
    what = "resident memory of a peer's actor in training / plain PyTorch trainer"
    return [
        Row(
            "memory", what, "MiB", rss["peer"], rss["plain"], Goal("A/B", "<=", 1.15), details=found
        ),
        Row(
            "memory",
            "resident memory of the coordinator",
            "MiB",
            rss["coordinator"],
            [],
            Goal("A", "<=", 180),
        ),
    ]
