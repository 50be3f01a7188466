"""Which settings should an ablation's arms have? Candidates, with several seeds, on held-out training classes.

    python experiments/choose.py [grocery|FOLDER] [OPTIONS]

A search (tune_diversity.py) tries many settings once; this tries a few again, with other seeds and
other held-out classes, since the best of many single tries is mostly the luckiest. FOLDER holds a
config.yaml and an arms.yaml as for ablation.py, and a candidates.yaml::

    held_out:                          # of the training classes; nothing is judged on the test classes
      mixed: {fraction: 0.4, fold: 0}
      packages: {prefix: Packages}     # those whose names begin so
    candidates:
      independent:                     # an arm, and what each candidate changes in arms.yaml
        lr 1e-4: {cohort.base.optimizer.lr: 1.0e-4}

With `--keep N` only the N best candidates of each arm with seed 0 get further seeds; `--candidate NAME` runs,
ranks and prints some of them.
A finished (arm, candidate, held-out classes, seed) is a line of candidates.jsonl and is never run
again: stop this at any time, and start it again. `--report` runs nothing, and prints the table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import ray
import typer
from ablation import DATA, EXPERIMENTS
from ablations.arms import ARMS
from ablations.candidates import Candidates, Task
from ablations.measure import measure
from ablations.running import (
    Row,
    images_of,
    made_of,
    require_same_images,
    resources,
    rows_of,
    side_by_side,
)
from provenance import commit
from rich.console import Console

from ray_dmml.cli.errors import user_errors
from ray_dmml.data.dataset import Splits
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.peer_actor import tune_malloc
from ray_dmml.ray_backend.session import ray_session

METRICS = (("peer", "recall@1"), ("ensemble", "recall@1"), ("peer", "map@r"), ("ensemble", "map@r"))
SHORT = {"recall@1": "R@1", "map@r": "MAP@R"}


@ray.remote(max_retries=0)
def run_task(candidates: Candidates, task: Task, skipped: tuple[str, ...]) -> Row:
    """In a process of Ray's, which is used again for the next."""
    tune_malloc()
    splits = candidates.splits(candidates.data(skipped).train, task.held_out)
    row = measure(candidates.plans[task.arm, task.candidate], ARMS[task.arm], task.seed, splits)
    for at in ("last", "best"):  # which may be one
        row[at].pop("test", None)  # the held-out classes once more
    return row


def run(
    candidates: Candidates,
    data: Splits,
    todo: list[Task],
    add: Callable[[Row], None],
    gpus_per_arm: float,
    console: Console,
) -> int:
    """Runs candidates, a row each; how many failed."""
    made_by, images = commit(), images_of(data)

    def finished(task: Task, found: Row) -> str:
        of = {"arm": task.arm, "candidate": task.candidate, "held_out": task.held_out}
        known_by = {"settings": candidates.settings(task), "images": images}
        add({**of, **known_by, "commit": made_by, **found})
        figures = (f"{who} {figure(found, who, of):.1f} {SHORT[of]}" for who, of in METRICS)
        return ", ".join(figures)

    with ray_session():
        run_one, shared = run_task.options(**resources(gpus_per_arm)), ray.put(candidates)
        running = {run_one.remote(shared, task, data.skipped): task for task in todo}
        return side_by_side(running, str, finished, console)


def figure(row: Row, who: str, metric: str) -> float:
    """Percent at the last step, of the mean peer or of the ensemble."""
    judged = row["last"]["validation"]
    members = judged["peers"] if who == "peer" else [judged["ensemble"]]
    return 100 * float(np.mean([member[metric] for member in members]))


def means(rows: Sequence[Row], held_out: Sequence[str]) -> np.ndarray:
    """Over seeds: (held-out sets, METRICS) of one candidate; NaN where there is no row."""
    found = np.full((len(held_out), len(METRICS)), np.nan)
    for position, held in enumerate(held_out):
        if judged := [row for row in rows if row["held_out"] == held]:
            found[position] = [np.mean([figure(row, *of) for row in judged]) for of in METRICS]
    return found


def ranked(rows: Sequence[Row], tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """Arm and candidate, best first in each arm: by the mean of all METRICS over held-out sets, and those with
    fewer rows after those with more."""
    held_out = list(dict.fromkeys(task.held_out for task in tasks))
    arms = list(dict.fromkeys(task.arm for task in tasks))

    def key(candidate: tuple[str, str]) -> tuple[int, int, float]:
        mine = [row for row in rows if (row["arm"], row["candidate"]) == candidate]
        score = float(means(mine, held_out).mean())
        return arms.index(candidate[0]), -len(mine), 0.0 if np.isnan(score) else -score

    return sorted(dict.fromkeys((task.arm, task.candidate) for task in tasks), key=key)


def table(rows: Sequence[Row], tasks: Sequence[Task]) -> str:
    """In Markdown, as `ranked`: the mean over seeds on each of the held-out sets, and over these."""
    held_out = list(dict.fromkeys(task.held_out for task in tasks))
    columns = [f"{who} {SHORT[metric]}" for who, metric in METRICS]
    of_each = [f"{held}: {column}" for held in held_out for column in columns]
    head = ["arm", "candidate", "rows", *of_each, *columns]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, name in ranked(rows, tasks):
        mine = [row for row in rows if (row["arm"], row["candidate"]) == (arm, name)]
        found = means(mine, held_out)
        figures = [*found.ravel(), *found.mean(axis=0)]
        cells = ["" if np.isnan(cell) else f"{cell:.1f}" for cell in figures]
        lines.append(f"| {' | '.join([arm, name, str(len(mine)), *cells])} |")
    return "\n".join(lines)


def kept(rows: Sequence[Row], tasks: Sequence[Task], keep: int | None) -> list[Task]:
    """Those of seed 0, and of the candidates that get further seeds."""
    first = [task for task in tasks if task.seed == 0]
    of_first = [row for row in rows if row["seed"] == 0]
    best: dict[str, list[str]] = {}
    for arm, name in ranked(of_first, first):
        best.setdefault(arm, []).append(name)
    return first + [task for task in tasks if task.seed and task.candidate in best[task.arm][:keep]]


def main(
    data: Annotated[str, typer.Argument(help="grocery, or a folder of your own.")] = "grocery",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of all, such as data.root=FOLDER."),
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Only this candidate, of each arm that has it; repeatable."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each candidate.")] = 2,
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="So many of each arm get further seeds: the best with seed 0."),
    ] = None,
    gpus_per_arm: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            help="Share of a GPU that each takes, beside a core; 0.25: four on each.",
        ),
    ] = 1,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; the table.")] = False,
) -> None:
    """Try candidates for an ablation's settings on held-out training classes."""
    folder = EXPERIMENTS / "ablations" / data if data in DATA else Path(data)
    console, failed, file = Console(soft_wrap=True), 0, folder / "candidates.jsonl"
    with user_errors():
        # A table of rows reads no images, wherever they are.
        anywhere = ["data.root=."] if report else []
        candidates = Candidates(folder, [*anywhere, *(settings or [])])
        names = list(dict.fromkeys(name for _, name in candidates.plans))
        if unknown := [name for name in candidate or () if name not in names]:
            raise UserError(f"no candidate {', '.join(unknown)}; there are: {'; '.join(names)}")
        chosen = candidate or names
        tasks = [task for task in candidates.tasks(seeds) if task.candidate in chosen]
        if report and not file.exists():
            raise UserError(f"{file} is not there: no candidate has been run")
        data_read: Splits | None = None
        stages = [(0,), range(1, seeds)] if keep else [range(seeds)]
        for stage in () if report else stages:
            with rows_of(file) as (rows, add):
                now = [row for row in rows if is_of_now(row, candidates)]
                done = {Task(*(row[part] for part in Task._fields)) for row in now}
                wanted = [task for task in kept(now, tasks, keep) if task.seed in stage]
                todo = [task for task in wanted if task not in done]
                if todo:
                    data_read = data_read or checked(candidates, now, file)
                    failed += run(candidates, data_read, todo, add, gpus_per_arm, console)
        with rows_of(file) as (rows, _):
            now = [row for row in rows if is_of_now(row, candidates)]
            asked = [row for row in now if row["candidate"] in chosen]
            print(table(asked, tasks))
            if asked:
                print(f"\n{made_of(asked)}.")
            if others := len(rows) - len(now):
                print(f"{others} rows of other settings left out.")
    if failed:
        sys.exit(f"{failed} failed; run the same command again to retry them")


def checked(candidates: Candidates, rows: Sequence[Row], file: Path) -> Splits:
    """The images, which must be those of the rows and suffice for all held-out sets."""
    found = candidates.data()
    for held_out in candidates.held_out:
        candidates.splits(found.train, held_out)
    require_same_images(rows, found, file)
    return found


def is_of_now(row: Row, candidates: Candidates) -> bool:
    """Whether the files still say what it was made with."""
    task = Task(*(row[part] for part in Task._fields))
    known = (task.arm, task.candidate) in candidates.plans and task.held_out in candidates.held_out
    return known and row["settings"] == candidates.settings(task)


if __name__ == "__main__":
    typer.run(main)
