"""How good is one student that learns from a finished cohort?

    python experiments/distillation.py --set data.root=FOLDER          # candidates, on held-out training classes
    python experiments/distillation.py --test --set data.root=FOLDER   # the best of them, once, on test classes
    python experiments/distillation.py --report                        # only prints the tables

For each seed a cohort is trained, then students that learn from it, and their twin alone. Candidates differ in the
weights of the relations and in what the teachers see. Seed s holds out fold s of the training classes; for the test
classes the cohort and the student are trained again on all training classes. Each finished run becomes a line of
rows.jsonl beside config.yaml and is never run again, so the command can be stopped and started again at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from ablations.rows import Row, open_rows
from provenance import commit

from ray_dmml import Config, UserError, train
from ray_dmml.cli.output import user_errors
from ray_dmml.cores import num_cores
from ray_dmml.data.datasets import load_splits
from ray_dmml.training.distill import distillation_config
from ray_dmml.training.provenance import cpu
from ray_dmml.training.run_dir import RunDir

HERE = Path(__file__).parent / "distillation"

NO_EFFECT: Any = {
    "checkpoint": True,
    "data": {"root", "source", "manifest", "cache_dir", "cache_gib", "check_images"},
}
"""Settings that no figure depends on. The images have a digest of their own."""


@dataclass(frozen=True)
class Student:
    """One way to train the student. Without a ``view`` it learns alone."""

    weights: tuple[float, float] = (0, 0)
    """Of distances and angles."""

    view: str = ""
    """What the teachers see: `own`, `evaluation`, or the `student`'s augmentation of each batch."""

    def config(self, cohort: Path, backbone: str) -> Config:
        distance, angle = self.weights
        config = distillation_config(
            cohort,
            backbone,
            teacher_view="evaluation" if self.view == "evaluation" else "own",
            alone=not self.view,
            overrides={
                "loss.relational.distance_weight": distance,
                "loss.relational.angle_weight": angle,
                "loss.relational.normalize": False,
                "loss.relational.teacher": "others",
            },
        )
        if self.view != "student":
            return config
        student, *teachers = config.cohort.peers
        same = {"view": student.view, "seed": student.seed}
        teachers = [teacher.model_copy(update=same) for teacher in teachers]
        return config.model_copy(update={"cohort": config.cohort.model_copy(update={"peers": (student, *teachers)})})


ALONE, COHORT = "alone", "cohort"
STUDENTS = {ALONE: Student()} | {
    f"({distance}, {angle}), {view}": Student((distance, angle), view)
    for distance, angle in ((1, 2), (4, 8), (8, 16))
    for view in ("own", "evaluation", *(["student"] if distance == 4 else []))
}
CANDIDATES = [name for name in STUDENTS if name != ALONE]


class Task(NamedTuple):
    """A run: the name of a student, or `cohort`, on `validation` or `test` classes."""

    arm: str
    split: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """Configs, digests and folders of all tasks."""

    base: Config
    student: str
    work: Path

    def digest(self, arm: str) -> str:
        """Of everything that the figures of an arm depend on, except seed, split, images and code."""
        cohort = self.base.model_dump(mode="json", exclude_defaults=True, exclude=NO_EFFECT)
        content = [cohort] if arm == COHORT else [cohort, self.student, *vars(STUDENTS[arm]).values()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def folder(self, task: Task) -> Path:
        return self.work / f"{task.split}-{self.digest(task.arm)}-seed{task.seed}"

    def config(self, task: Task) -> Config:
        """The cohort of a student must have been trained."""
        if task.arm != COHORT:
            return STUDENTS[task.arm].config(self.folder(task._replace(arm=COHORT)), self.student)
        held_out = (
            {"data.validation_fold": task.seed} if task.split == "validation" else {"data.validation_fraction": 0}
        )
        return self.base.with_overrides({"seed": task.seed, "evaluation.split": task.split, **held_out})


def run_one(config: Config, folder: Path) -> tuple[dict[str, Any], float]:
    """The results of a run, which is read if it has finished and resumed if it was stopped; and its seconds."""
    logging.getLogger("ray_dmml").setLevel(logging.ERROR)
    run, began = RunDir(folder), time.perf_counter()
    if run.results_file.exists():
        return json.loads(run.results_file.read_text()), 0.0
    if run.exists():
        return train(resume=folder, local=True, progress=False), time.perf_counter() - began
    shutil.rmtree(folder, ignore_errors=True)
    return train(config, folder, local=True, progress=False), time.perf_counter() - began


def run_all(plan: Plan, tasks: list[Task], workers: int) -> Iterator[tuple[Task, dict[str, Any], float]]:
    """Runs the tasks, side by side if there are several workers."""
    if workers == 1:
        for task in tasks:
            yield task, *run_one(plan.config(task), plan.folder(task))
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_one, plan.config(task), plan.folder(task)): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], *future.result()


def figures_of(results: Mapping[str, Any], arm: str) -> Row:
    """What a row keeps of results.json."""

    def rounded(figures: Mapping[str, float]) -> dict[str, float]:
        return {metric: round(figures[metric], 5) for metric in ("recall@1", "map@r")}

    peers = [rounded(figures) for figures in results["peers"].values()]
    if arm == COHORT:
        return {"peers": peers, "ensemble": rounded(results["ensemble"])}
    return {"student": peers[0], "ensemble": rounded(results["ensemble"])}


def run_missing(plan: Plan, arms: list[str], split: str, num_seeds: int, file: Path, workers: int) -> None:
    """Runs what has no row yet.

    Raises:
        UserError: the file has rows of other settings or images.
    """
    with open_rows(file) as (rows, add):
        others = "undo the change, remove those rows, or use a copy of the folder without them"
        known = {arm: plan.digest(arm) for arm in (COHORT, *STUDENTS)}
        if changed := sorted({row["arm"] for row in rows if known.get(row["arm"]) != row["settings"]}):
            raise UserError(f"{file} has rows of other settings ({'; '.join(changed)}): {others}")
        done = {Task(row["arm"], row["split"], row["seed"]) for row in rows}
        missing = [task for seed in range(num_seeds) for arm in arms if (task := Task(arm, split, seed)) not in done]
        cohorts = [Task(COHORT, split, seed) for seed in sorted({task.seed for task in missing})]
        if not missing:
            return
        # All images, before a fold is held out. They are checked here, once.
        splits = load_splits(plan.base.data.model_copy(update={"validation_fraction": 0.0}))
        images = hashlib.sha256(json.dumps(splits.digests()).encode()).hexdigest()[:12]
        if any(row["images"] != images for row in rows):
            raise UserError(f"{file} has rows of other images, classes or splits: {others}")
        made = {"images": images, "commit": commit(), "device": cpu()}
        for tasks in (cohorts, [task for task in missing if task.arm != COHORT]):
            for task, results, seconds in run_all(plan, tasks, workers):
                if task in done:  # a cohort whose folder was gone, and whose student has no row
                    continue
                figures = figures_of(results, task.arm)
                add({**task._asdict(), "settings": known[task.arm], **made, **figures, "seconds": round(seconds, 1)})
                shown = figures["ensemble" if task.arm == COHORT else "student"]["recall@1"]
                typer.echo(f"{task.arm}, seed {task.seed}, {split} classes: {100 * shown:.1f}, {seconds:.0f} s")


def mean_of(rows: list[Row], arm: str, split: str, who: str, metric: str = "recall@1") -> list[float]:
    """The figures of each seed, in percent. `peers` are their mean."""
    chosen = sorted((row for row in rows if (row["arm"], row["split"]) == (arm, split)), key=lambda row: row["seed"])
    return [
        100 * float(np.mean([each[metric] for each in (row[who] if who == "peers" else [row[who]])])) for row in chosen
    ]


def best_candidate(rows: list[Row], num_seeds: int) -> str:
    """The candidate with the highest mean Recall@1 on validation classes. Raises UserError if one has not finished."""
    values = {arm: mean_of(rows, arm, "validation", "student") for arm in CANDIDATES}
    if left := [arm for arm, seeds in values.items() if len(seeds) < num_seeds]:
        raise UserError(f"the candidates {'; '.join(left)} have not been run with {num_seeds} seeds: leave out --test")
    return max(CANDIDATES, key=lambda arm: np.mean(values[arm]))


def table(rows: list[Row], split: str) -> Iterator[str]:
    """The lines of a Markdown table: means over seeds, and the share of the way from the twin to the ensemble."""
    lines = {"peers, mean": (COHORT, "peers"), "ensemble of the peers": (COHORT, "ensemble")}
    lines |= {f"student {arm}": (arm, "student") for arm in STUDENTS}
    ends = [mean_of(rows, *end) for end in ((ALONE, split, "student"), (COHORT, split, "ensemble"))]
    yield f"| {split} classes | Recall@1 | MAP@R | of the way | Recall@1 of each seed |"
    yield "|---|---|---|---|---|"
    for name, (arm, who) in lines.items():
        if not (values := mean_of(rows, arm, split, who)):
            continue
        low, high = (np.mean(end) if end else np.nan for end in ends)
        share = f"{(np.mean(values) - low) / (high - low):.2f}" if who == "student" and high > low else ""
        precision = np.mean(mean_of(rows, arm, split, who, "map@r"))
        seeds = ", ".join(f"{value:.1f}" for value in values)
        yield f"| {name} | {np.mean(values):.1f} | {precision:.1f} | {share} | {seeds} |"


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with config.yaml and the rows.")] = HERE,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the cohort, such as data.root=FOLDER.")
    ] = None,
    student: Annotated[
        str, typer.Option(metavar="BACKBONE", help="Backbone of the student.")
    ] = "tf_efficientnet_lite0",
    test: Annotated[bool, typer.Option("--test", help="The best candidate and its twin, on test classes.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each run.")] = 3,
    workers: Annotated[int, typer.Option(min=0, help="Runs side by side; 0: one a core.")] = 0,
    work: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the runs.")] = Path("runs/distillation"),
    report: Annotated[bool, typer.Option("--report", help="Run nothing; only print the tables.")] = False,
) -> None:
    """Measure how good one student is that learns from a finished cohort."""
    file = folder / "rows.jsonl"
    with user_errors():
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder} has no config.yaml")
        if not report:
            fixed = {"evaluation.weights": "last", "evaluation.untrained": False, "evaluation.recall_at": [1]}
            fixed |= {
                "train.evaluate_every": 0,
                "train.tensorboard": False,
                "train.report": False,
                "checkpoint.num_to_keep": 1,
            }
            base = Config.load(folder / "config.yaml", settings or ()).with_overrides(fixed)
            if seeds > (most := round(1 / (base.data.validation_fraction or 1))):
                raise UserError(f"{seeds} seeds need so many folds, and data.validation_fraction gives {most}")
            arms = [COHORT, *STUDENTS]
            if test:
                with open_rows(file) as (rows, _):
                    arms = [COHORT, ALONE, best_candidate(rows, seeds)]
            plan = Plan(base, student, work.absolute())
            run_missing(plan, arms, "test" if test else "validation", seeds, file, workers or num_cores())
        with open_rows(file) as (rows, _):
            for split in ("validation", "test"):
                if any(row["split"] == split for row in rows):
                    typer.echo("\n".join(["", *table(rows, split)]))


if __name__ == "__main__":
    typer.run(main)
