"""Which settings should the arms of an ablation have? Candidates, several seeds each, on held-out training classes.

    python experiments/choose.py [grocery|FOLDER] [OPTIONS]

A search (tune_diversity.py) tries many settings once; this tries a few again, with other seeds and
other held-out classes, since the best of many single tries is mostly the luckiest. FOLDER holds a
config.yaml and an arms.yaml as for ablation.py, and a candidates.yaml::

    held_out:                          # of the training classes; the test classes are never read
      mixed: {fraction: 0.4, fold: 0}
      packages: {prefix: Packages}     # those whose names begin so
    candidates:
      independent:                     # an arm, and what each candidate changes in it
        lr 1e-4: {cohort.base.optimizer.lr: 1.0e-4}

A finished (arm, candidate, held-out classes, seed) is a line of candidates.jsonl and is never run
again: stop this at any time, and start it again. `--report` prints the table of what is there.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
import typer
from ablation import DATA, EXPERIMENTS, resources, rows_of
from ablations.arms import ARMS, Plan
from ablations.measure import measure
from provenance import commit
from rich.console import Console

from ray_dmml.cohort.member import keep_freed_memory
from ray_dmml.cohort.session import ray_session
from ray_dmml.config import read_yaml
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.images import ImageSet, Splits, hold_out_classes
from ray_dmml.errors import UserError


@dataclass(frozen=True)
class Task:
    """One line of candidates.jsonl."""

    arm: str
    candidate: str
    held_out: str
    seed: int


class Candidates:
    """What candidates.yaml says.

    Raises:
        UserError: it is not as it must be, or a candidate is no setting of its arm.
    """

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self._file = folder / "candidates.yaml"
        found = read_yaml(self._file, "candidates file")
        if set(found) != {"held_out", "candidates"}:
            raise UserError(f"{self._file} must say candidates and held_out, and nothing else")
        for part, said in found.items():
            if not isinstance(said, dict) or not said:
                raise UserError(f"{self._file} has no {part}")
        self.held_out: dict[str, dict[str, Any]] = found["held_out"]
        self.plans: dict[tuple[str, str], Plan] = {}
        for arm, candidates in found["candidates"].items():
            if arm not in ARMS:
                raise UserError(f"{self._file}: no arm {arm!r}; there are: {'; '.join(ARMS)}")
            for name, settings in candidates.items():
                self.plans[arm, name] = Plan(folder, overrides, settings or {})

    def images(self, arm: str, candidate: str, skipped: tuple[str, ...] | None = None) -> Splits:
        """All training classes; with ``skipped`` as of another process, unchecked."""
        config = self.plans[arm, candidate].config(ARMS[arm], 0)
        data = config.data.model_copy(update={"validation_fraction": 0})
        return load_splits(data, skip=frozenset(skipped or ()), check=skipped is None)

    def splits(self, images: ImageSet, held_out: str) -> Splits:
        """Some training classes held out, which are all that is judged on."""
        how = self.held_out[held_out]
        if set(how) == {"prefix"}:
            classes = [
                i for i, name in enumerate(images.class_names) if name.startswith(how["prefix"])
            ]
            if not 2 <= len(classes) <= images.num_classes - 2:
                raise UserError(
                    f"{self._file}: {held_out}: {len(classes)} of {images.num_classes} classes begin with "
                    f"{how['prefix']!r}; 2 at least must, and 2 must not"
                )
            is_held = np.isin(images.labels, classes)
            train = images.subset(np.flatnonzero(~is_held))
            held = images.subset(np.flatnonzero(is_held))
        elif set(how) == {"fraction", "fold"}:
            train, validation = hold_out_classes(images, how["fraction"], 0, how["fold"])
            assert validation is not None
            held = validation
        else:
            raise UserError(f"{self._file}: {held_out} must say prefix, or fraction and fold")
        return Splits(train, held, held)

    def key(self, task: Task) -> dict[str, Any]:
        """By which a finished row is known."""
        told = [
            self.plans[task.arm, task.candidate].digest(ARMS[task.arm]),
            self.held_out[task.held_out],
        ]
        settings = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        return {
            "arm": task.arm,
            "candidate": task.candidate,
            "held_out": task.held_out,
            "settings": settings,
        }


@ray.remote(max_retries=0)
def run_task(candidates: Candidates, task: Task, skipped: tuple[str, ...]) -> dict[str, Any]:
    keep_freed_memory()
    images = candidates.images(task.arm, task.candidate, skipped).train
    plan, splits = (
        candidates.plans[task.arm, task.candidate],
        candidates.splits(images, task.held_out),
    )
    row = measure(plan, ARMS[task.arm], task.seed, splits)
    for at in ("last", "best"):  # which may be one
        row[at].pop("test", None)  # the held-out classes once more
    return row


def run(
    candidates: Candidates, tasks: list[Task], add: Any, num_gpus: float, console: Console
) -> int:
    """Runs tasks, a row each; how many failed."""
    checked = candidates.images(tasks[0].arm, tasks[0].candidate)
    for held_out in candidates.held_out:
        candidates.splits(checked.train, held_out)
    made_by, failed = commit(), 0
    with ray_session():
        shared, needs = ray.put(candidates), resources(num_gpus)
        running = {
            run_task.options(**needs).remote(shared, task, checked.skipped): task for task in tasks
        }
        while running:
            done, _ = ray.wait(list(running))
            task = running.pop(done[0])
            name = f"{task.arm}, {task.candidate}, {task.held_out} held out, seed {task.seed}"
            try:
                found = ray.get(done[0])
            except ray.exceptions.RayError as error:
                failed += 1
                reason = str(error).strip().splitlines()[-1]
                console.print(f"[red]{name}: {reason}[/red]", highlight=False)
                continue
            add({**candidates.key(task), "commit": made_by, **found})
            judged = found["last"]["validation"]["ensemble"]
            console.print(
                f"{name}: ensemble {100 * judged['recall@1']:.1f} R@1, {100 * judged['map@r']:.1f} "
                f"MAP@R; {found['seconds']:.0f} s, {len(running)} left",
                highlight=False,
            )
    return failed


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: percent at the last step, the mean over seeds for each held-out set and over all."""
    held_out = list(dict.fromkeys(row["held_out"] for row in rows))
    seeds = {
        name: sorted({row["seed"] for row in rows if row["held_out"] == name}) for name in held_out
    }
    columns = [
        f"{name}: {who} {metric}"
        for name in held_out
        for who, metric in (("peer", "R@1"), ("ens.", "R@1"), ("ens.", "MAP@R"))
    ]
    head = [
        "arm",
        "candidate",
        "rows",
        *columns,
        "peer R@1",
        "ens. R@1",
        "peer MAP@R",
        "ens. MAP@R",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        of.setdefault((row["arm"], row["candidate"]), []).append(row)
    wanted = sum(len(each) for each in seeds.values())
    scored = []
    for (arm, name), mine in of.items():
        mean = {
            (held, who, metric): float(
                np.mean(
                    [_figure(row, who, metric) for row in mine if row["held_out"] == held]
                    or [np.nan]
                )
            )
            for held in held_out
            for who in ("peer", "ens.")
            for metric in ("recall@1", "map@r")
        }
        cells = []
        for held in held_out:
            cells += [
                mean[held, "peer", "recall@1"],
                mean[held, "ens.", "recall@1"],
                mean[held, "ens.", "map@r"],
            ]
        for metric in ("recall@1", "map@r"):
            for who in ("peer", "ens."):
                cells.append(float(np.mean([mean[held, who, metric] for held in held_out])))
        count = f"{len(mine)}" if len(mine) == wanted else f"{len(mine)} of {wanted}"
        line = " | ".join([arm, name, count, *(f"{cell:.1f}" for cell in cells)])
        scored.append((arm, -cells[-1], f"| {line} |"))
    order = {arm: position for position, (arm, _) in enumerate(of)}
    return "\n".join(
        lines + [line for *_, line in sorted(scored, key=lambda each: (order[each[0]], each[1]))]
    )


def _figure(row: dict[str, Any], who: str, metric: str) -> float:
    judged = row["last"]["validation"]
    members = judged["peers"] if who == "peer" else [judged["ensemble"]]
    return 100 * float(np.mean([member[metric] for member in members]))


def main(
    data: Annotated[str, typer.Argument(help="grocery, or a folder of your own.")] = "grocery",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Of all candidates, such as data.root=FOLDER."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each candidate.")] = 2,
    gpus_per_arm: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="Below 1: so many tasks share a GPU, where there is one."
        ),
    ] = 1,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; print the table.")] = False,
) -> None:
    """Try candidates for an ablation's settings on held-out training classes."""
    folder = EXPERIMENTS / "ablations" / data if data in DATA else Path(data)
    console, failed = Console(soft_wrap=True), 0
    try:
        candidates = Candidates(folder, settings or [])
        with rows_of(folder / "candidates.jsonl") as (rows, add):
            known = [json.dumps(_key_of(row)) for row in rows]
            tasks = [
                Task(arm, name, held_out, seed)
                for seed in range(seeds)
                for arm, name in candidates.plans
                for held_out in candidates.held_out
            ]
            todo = [
                t for t in tasks if json.dumps({**candidates.key(t), "seed": t.seed}) not in known
            ]
            if todo and not report:
                failed = run(candidates, todo, add, gpus_per_arm, console)
        with rows_of(folder / "candidates.jsonl") as (rows, _):
            now = {json.dumps({**candidates.key(t), "seed": t.seed}) for t in tasks}
            rows = [row for row in rows if json.dumps(_key_of(row)) in now]
            print(
                table(rows)
                if rows
                else f"{folder / 'candidates.jsonl'} has no rows of these candidates yet"
            )
    except UserError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f"{failed} failed; run the same command again to retry them")


def _key_of(row: dict[str, Any]) -> dict[str, Any]:
    return {part: row[part] for part in ("arm", "candidate", "held_out", "settings", "seed")}


if __name__ == "__main__":
    typer.run(main)
