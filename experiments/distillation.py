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

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from provenance import commit
from runner import tasks
from runner.digests import NO_EFFECT, digest, read_images
from runner.figures import rounded
from runner.folders import device_name, run_folder
from runner.rows import Row, open_rows, require_images, require_settings

from ray_dmml import Config, UserError
from ray_dmml.cli.output import user_errors
from ray_dmml.training.distill import distillation_config

HERE = Path(__file__).parent / "distillation"


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
        return digest(content)

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


def run_one(plan: Plan, task: Task) -> Row:
    """The rest of the row of a task."""
    results, seconds = run_folder(plan.config(task), plan.folder(task))
    return {"device": device_name(), **figures_of(results, task.arm), "seconds": round(seconds, 1)}


def figures_of(results: Mapping[str, Any], arm: str) -> Row:
    """What a row keeps of results.json."""
    peers = [rounded(figures) for figures in results["peers"].values()]
    if arm == COHORT:
        return {"peers": peers, "ensemble": rounded(results["ensemble"])}
    return {"student": peers[0], "ensemble": rounded(results["ensemble"])}


def run_missing(plan: Plan, arms: list[str], split: str, num_seeds: int, file: Path, workers: int) -> int:
    """Runs what has no row yet; returns how many runs failed.

    Raises:
        UserError: the file has rows of other settings or images.
    """
    with open_rows(file) as (rows, add):
        known = {arm: plan.digest(arm) for arm in (COHORT, *STUDENTS)}
        require_settings(rows, known.values(), file)
        done = {Task(row["arm"], row["split"], row["seed"]) for row in rows}
        missing = [task for seed in range(num_seeds) for arm in arms if (task := Task(arm, split, seed)) not in done]
        if not missing:
            return 0
        _, images = read_images(plan.base.data)
        require_images(rows, images, file)
        made = {"images": images, "commit": commit()}

        def to_run(task: Task) -> tasks.Task:
            row = {**task._asdict(), "settings": known[task.arm], **made}
            needs = None if task.arm == COHORT else name_of(task._replace(arm=COHORT))
            return tasks.Task(name_of(task), row, (plan, task), needs, has_row=task in done)

        cohorts = [Task(COHORT, split, seed) for seed in sorted({task.seed for task in missing})]
        students = [task for task in missing if task.arm != COHORT]
        return tasks.run_tasks(run_one, [to_run(task) for task in (*cohorts, *students)], add, shown, workers=workers)


def name_of(task: Task) -> str:
    return f"{task.arm}, seed {task.seed}, {task.split} classes"


def shown(row: Row) -> str:
    return f"{100 * row['ensemble' if row['arm'] == COHORT else 'student']['recall@1']:.1f}"


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
    file, failed = folder / "rows.jsonl", 0
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
            failed = run_missing(plan, arms, "test" if test else "validation", seeds, file, workers)
        with open_rows(file) as (rows, _):
            for split in ("validation", "test"):
                if any(row["split"] == split for row in rows):
                    typer.echo("\n".join(["", *table(rows, split)]))
    if failed:
        sys.exit(f"{failed} runs failed; run the same command again to retry them")


if __name__ == "__main__":
    typer.run(main)
