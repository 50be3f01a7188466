"""One run, in a process of Ray, and the tasks that have no row yet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from runner.figures import rounded
from runner.folders import device_name, run_folder
from runner.rows import Row
from runner.tasks import Task

from ray_dmml.training.run_dir import RunDir

from .arms import ARMS, SINGLE, STUDENT_OF_FROZEN
from .plan import Plan, placed


def train_arm(plan: Plan, name: str, seed: int, cores: int) -> Row:
    """The figures of an arm, which are the rest of its row."""
    config = placed(plan.config(name, seed), cores, on_gpu=torch.cuda.is_available())
    results, seconds = run_folder(config, plan.folder(name, seed))
    keep = partial(rounded, metrics=plan.metrics)
    learners, teachers = config.cohort.learners, config.cohort.frozen_peers
    row: Row = {"device": device_name(), "peers": [keep(results["peers"][peer]) for peer in learners]}
    if len(learners) > 1:
        row["ensemble"] = keep(results["ensemble"])
    if name == STUDENT_OF_FROZEN:
        row["teacher"] = keep(results["peers"][teachers[0]])
    if name == SINGLE:
        row["untrained"] = keep(results["frozen_backbones"][learners[0]])
    return {**row, "seconds": round(seconds, 1)}


def tasks_of(
    plan: Plan, names: Sequence[str], num_seeds: int, rows: Sequence[Row], made: Row, cores: int
) -> list[Task]:
    """The runs without a row. A teacher that has one is run again if its folder is gone and a student needs it.

    Args:
        plan: the runs.
        names: arms, each after its teacher.
        num_seeds: seeds 0, 1, ... of each arm.
        rows: the finished runs.
        made: what all new rows have.
        cores: of each run.
    """
    done = {(row["arm"], row["seed"]) for row in rows}
    wanted = [(name, seed) for seed in range(num_seeds) for name in names]
    missing = [run for run in wanted if run not in done]
    gone = {
        (teacher, seed)
        for name, seed in missing
        if (teacher := ARMS[name].teacher) in ARMS and not RunDir(plan.folder(teacher, seed)).results_file.exists()
    }
    return [
        Task(
            _name_of(name, seed),
            {"arm": name, "seed": seed, "settings": plan.digest(name), **made},
            (plan, name, seed, cores),
            _name_of(str(ARMS[name].teacher), seed),
            has_row=(name, seed) in done,
        )
        for name, seed in wanted
        if (name, seed) in missing or (name, seed) in gone
    ]


def _name_of(name: str, seed: int) -> str:
    return f"{name}, seed {seed}"
