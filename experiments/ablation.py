"""What are diversities and mutual learning worth, and with which settings?

    python experiments/ablation.py DATA --choose rate      # then weights, then teachers
    python experiments/ablation.py DATA                    # the arms, once, on test classes

DATA is characters, grocery, objects, or a folder with a config.yaml and an arms.yaml. Candidates for the settings
are trained with three seeds and evaluated on held-out training classes. The arms are trained with five seeds and
evaluated on test classes. Each finished (arm, seed) becomes a line of DATA/candidates.jsonl or DATA/rows.jsonl and is
never run again, so the command can be stopped and started again at any time. Runs are Ray tasks, one a core, on this
machine or on the cluster that RAY_ADDRESS names. `--report` only writes tables and the plot of the rows that exist.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from ablations.arms import Arm, Plan
from ablations.candidates import STAGES
from ablations.measure import Split, measure
from ablations.report import Results, best, both, summary, write_report
from ablations.rows import Row, open_rows, read_rows
from provenance import commit
from rich.console import Console

from ray_dmml.cli.output import user_errors
from ray_dmml.config.schema import Config
from ray_dmml.data.dataset import Splits
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.process import tune_malloc
from ray_dmml.ray_backend.session import ray_session

EXPERIMENTS = Path(__file__).parent
DATA = ("characters", "grocery", "objects")

Task = tuple[Mapping[str, Any], Config]
"""The entries of a row that are known before the run, and the run's config."""


def all_images(plan: Plan) -> Splits:
    """The images before any class is held out. They are decoded once, if `data.check_images` is set."""
    return load_splits(plan.config(Arm(), 0).data.model_copy(update={"validation_fraction": 0.0}))


def images_digest(splits: Splits) -> str:
    """Digest of the images' names, classes and splits, and of queries and gallery."""
    return hashlib.sha256(json.dumps(splits.digests()).encode()).hexdigest()[:12]


def require_same(rows: list[Row], key: str, known: set[str], what: str, file: Path) -> None:
    """Raises UserError where ``key`` of a row is none of the known ones."""
    if others := sorted({row["arm"] for row in rows if row[key] not in known}):
        raise UserError(
            f"{file} has rows of other {what} give now ({'; '.join(others)}): undo the change, remove those rows, or "
            "use a copy of the folder without them"
        )


@ray.remote(max_retries=0)
def run_arm(config: Config, skipped: tuple[str, ...], split: Split) -> Row:
    """Runs in a Ray worker process, which Ray uses again for the next arm."""
    tune_malloc()
    return measure(config, load_splits(config.data, skip=frozenset(skipped), check=False), split)


def run(
    tasks: list[Task],
    skipped: tuple[str, ...],
    split: Split,
    add: Any,
    workers: int | None,
    gpus_per_arm: float,
    console: Console,
) -> int:
    """Runs the tasks side by side and adds a row for each; returns how many failed."""
    left, running, failed, began = list(tasks), dict[Any, Task](), 0, time.monotonic()
    with ray_session():
        num_gpus = gpus_per_arm if ray.cluster_resources().get("GPU") else 0
        remote = run_arm.options(num_cpus=1, num_gpus=num_gpus)
        while left or running:
            while left and len(running) < (workers or len(tasks)):
                known, config = left.pop(0)
                running[remote.remote(config, skipped, split)] = (known, config)
            (done, *_), _ = ray.wait(list(running))
            known, config = running.pop(done)
            name = f"{known['arm']}, seed {config.seed}"
            try:
                row = {**known, **ray.get(done)}
            except ray.exceptions.RayError as error:
                failed += 1
                reason = str(error).strip().splitlines()[-1]
                console.print(f"[red]{name}: {reason}[/red]", highlight=False)
                continue
            add(row)
            num_left = len(left) + len(running)
            minutes = (time.monotonic() - began) / 60 / (len(tasks) - num_left) * num_left
            console.print(
                f"{name}: mean of mean peer and ensemble {both(row):.1f}, {row['seconds']:.0f} s; {num_left} left, "
                f"about {minutes:.0f} min",
                highlight=False,
            )
    return failed


def main(
    data: Annotated[str, typer.Argument(help=f"{', '.join(DATA)}, or a folder of your own.")] = "characters",
    choose: Annotated[
        str | None, typer.Option(metavar="STAGE", help=f"Run candidates instead of arms: {', '.join(STAGES)}.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For all arms, such as data.root=FOLDER.")
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="An arm or candidate to run. Repeatable.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds 0, 1, ... of each. Default: 5 for arms, 3 for candidates.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Most runs side by side. Default: all cores.")] = None,
    gpus_per_arm: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of a GPU for each run, where there are any.")
    ] = 1,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; only write tables and the plot.")] = False,
) -> None:
    """Measure what diversities and mutual learning are worth, and choose their settings."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ray_dmml").setLevel(logging.INFO)
    folder = EXPERIMENTS / "ablations" / data if data in DATA else Path(data)
    console, failed = Console(soft_wrap=True), 0
    tested, candidates = folder / "rows.jsonl", folder / "candidates.jsonl"
    with user_errors():
        if not (folder / "arms.yaml").is_file():
            raise UserError(f"{data}: expected a folder with config.yaml and arms.yaml, or {' or '.join(DATA)}")
        if choose is not None and choose not in STAGES:
            raise UserError(f"no stage {choose}; the stages are: {', '.join(STAGES)}")
        # A report needs no images, and a config that lists files no root.
        plan = Plan(folder, [*(["data.root=."] if report else []), *(settings or [])])
        file, arms = (candidates, plan.stages[choose]) if choose else (tested, plan.arms)
        split: Split = "validation" if choose else "test"
        if unknown := [name for name in arm or () if name not in arms]:
            raise UserError(f"no arm {', '.join(unknown)}; the arms are: {'; '.join(arms)}")
        if not report:
            every = plan.stages.values() if choose else [plan.arms]
            known = {plan.digest(each) for table in every for each in table.values()}
            digests = {name: plan.digest(arms[name]) for name in arm or arms}
            wanted = [(name, seed) for seed in range(seeds or (3 if choose else 5)) for name in digests]
            with open_rows(file) as (rows, add):
                require_same(rows, "settings", known, "settings than config.yaml, arms.yaml and --set", file)
                done = {(row["settings"], row["seed"]) for row in rows}
                if missing := [(name, seed) for name, seed in wanted if (digests[name], seed) not in done]:
                    splits = all_images(plan)
                    images, made_by = images_digest(splits), commit()
                    require_same(rows, "images", {images}, "images, classes or splits than data.*", file)
                    tasks = [
                        (
                            {"arm": name, "settings": digests[name], "images": images, "commit": made_by},
                            plan.config(arms[name], seed),
                        )
                        for name, seed in missing
                    ]
                    failed = run(tasks, splits.skipped, split, add, workers, gpus_per_arm, console)
        tested_rows, chosen_rows = read_rows(tested), read_rows(candidates)
        if not tested_rows and not chosen_rows:
            raise UserError(f"{folder} has no rows: no arm has been run")
        results = Results(plan, chosen_rows if choose else tested_rows)
        for line in summary(arms, results):
            console.print(line, highlight=False)
        if choose and results.finished(arms):
            console.print(best(choose, arms, results), highlight=False)
        page = write_report(plan, tested_rows, chosen_rows, folder)
        console.print(f"wrote {page} and its plot", highlight=False)
    if failed:
        sys.exit(f"{failed} runs failed; run the same command again to retry them")


if __name__ == "__main__":
    typer.run(main)
