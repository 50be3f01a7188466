"""What are diversities and mutual learning worth, and with which settings?

    python experiments/ablation.py DATA --choose rate      # then weights, then teachers
    python experiments/ablation.py DATA                    # the arms, once, on test classes

DATA is characters, grocery, objects, or a folder with a config.yaml and an arms.yaml. Candidates for the settings
are trained with three seeds and evaluated on held-out training classes, arms with five seeds on test classes. Each
finished run becomes a line of DATA/candidates.jsonl or DATA/rows.jsonl and is never run again, so the command can be
stopped and started again at any time. Runs are Ray tasks, one a core, on this machine or on the cluster that
RAY_ADDRESS names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from ablations.arms import Arm
from ablations.candidates import STAGES
from ablations.measure import Split, measure
from ablations.plan import Plan
from ablations.report import Results, both, write_report
from ablations.rows import Row, open_rows, read_rows
from provenance import commit
from rich.console import Console

from ray_dmml.cli.output import user_errors
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.process import tune_malloc
from ray_dmml.ray_backend.session import ray_session

EXPERIMENTS = Path(__file__).parent
DATA = ("characters", "grocery", "objects")

console = Console(soft_wrap=True, highlight=False)


def run_missing(plan: Plan, stage: str | None, names: list[str], num_seeds: int, file: Path, workers: int) -> int:
    """Runs what has no row yet; returns how many runs failed. ``workers`` is the most side by side, 0 no limit.

    Raises:
        UserError: the file has rows of other settings or images.
    """
    arms = plan.stages[stage] if stage else plan.arms
    others = "undo the change, remove those rows, or use a copy of the folder without them"
    with open_rows(file) as (rows, add):
        known = {plan.digest(arm) for table in (plan.stages.values() if stage else [arms]) for arm in table.values()}
        if changed := sorted({row["arm"] for row in rows if row["settings"] not in known}):
            raise UserError(
                f"{file} has rows of other settings than config.yaml, arms.yaml and --set give now "
                f"({'; '.join(changed)}): {others}"
            )
        done = {(row["settings"], row["seed"]) for row in rows}
        wanted = [(name, plan.digest(arms[name]), seed) for seed in range(num_seeds) for name in names]
        missing = [(name, digest, seed) for name, digest, seed in wanted if (digest, seed) not in done]
        if not missing:
            return 0
        # All images, before a fold is held out. They are decoded and checked here, once.
        splits = load_splits(plan.config(Arm(), 0).data.model_copy(update={"validation_fraction": 0.0}))
        images = hashlib.sha256(json.dumps(splits.digests()).encode()).hexdigest()[:12]
        if any(row["images"] != images for row in rows):
            raise UserError(f"{file} has rows of other images, classes or splits than data.* gives now: {others}")
        made = {"images": images, "commit": commit()}
        tasks = [
            ({"arm": name, "settings": digest, **made}, plan.config(arms[name], seed)) for name, digest, seed in missing
        ]
        return run(tasks, splits.skipped, "validation" if stage else "test", add, workers)


@ray.remote(max_retries=0)
def run_arm(config: Config, skipped: tuple[str, ...], split: Split) -> Row:
    """Runs in a Ray worker process, which Ray uses again for the next arm."""
    tune_malloc()
    return measure(config, load_splits(config.data, skip=frozenset(skipped), check=False), split)


def run(
    tasks: list[tuple[Row, Config]], skipped: tuple[str, ...], split: Split, add: Callable[[Row], None], workers: int
) -> int:
    """Runs the tasks, each the start of a row and a config, side by side; adds a row for each; counts failures."""
    waiting, running, failed, began = list(tasks), dict[Any, tuple[Row, Config]](), 0, time.monotonic()
    with ray_session():
        while waiting or running:
            while waiting and (not workers or len(running) < workers):
                task = waiting.pop(0)
                running[run_arm.remote(task[1], skipped, split)] = task
            (finished, *_), _ = ray.wait(list(running))
            known, config = running.pop(finished)
            name, left = f"{known['arm']}, seed {config.seed}", len(waiting) + len(running)
            try:
                row = {**known, **ray.get(finished)}
            except ray.exceptions.RayError as error:
                failed += 1
                console.print(f"[red]{name}: {str(error).strip().splitlines()[-1]}[/red]")
                continue
            add(row)
            minutes = (time.monotonic() - began) / 60 / (len(tasks) - left) * left
            console.print(f"{name}: {both(row):.1f}, {row['seconds']:.0f} s; {left} left, about {minutes:.0f} min")
    return failed


def main(
    data: Annotated[str, typer.Argument(help=f"{', '.join(DATA)}, or a folder of your own.")],
    choose: Annotated[
        str | None, typer.Option(metavar="STAGE", help=f"Run candidates, not arms: {', '.join(STAGES)}.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For all arms, such as data.root=FOLDER.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(metavar="NAME", help="An arm to run. Repeatable.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds 0, 1, ... of each arm. Default: 5, of candidates 3.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Most runs side by side; 0: one a core.")] = 0,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; only write tables and the plot.")] = False,
) -> None:
    """Measure what diversities and mutual learning are worth, and choose their settings."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ray_dmml").setLevel(logging.INFO)
    folder, failed = EXPERIMENTS / "ablations" / data if data in DATA else Path(data), 0
    files = tested, candidates = folder / "rows.jsonl", folder / "candidates.jsonl"
    with user_errors():
        if not (folder / "arms.yaml").is_file():
            raise UserError(f"{data}: expected a folder with config.yaml and arms.yaml, or {' or '.join(DATA)}")
        if choose not in (None, *STAGES):
            raise UserError(f"no stage {choose}; the stages are: {', '.join(STAGES)}")
        # A report reads no images, so it needs no folder of them.
        plan = Plan(folder, [*(["data.root=."] if report else []), *(settings or [])])
        arms = plan.stages[choose] if choose else plan.arms
        if unknown := [name for name in arm or () if name not in arms]:
            raise UserError(f"no arm {', '.join(unknown)}; the arms are: {'; '.join(arms)}")
        if not report:
            names, num_seeds = list(dict.fromkeys(arm or arms)), seeds or (3 if choose else 5)
            failed = run_missing(plan, choose, names, num_seeds, candidates if choose else tested, workers)
        rows, chosen = (read_rows(file) for file in files)
        if not rows and not chosen:
            raise UserError(f"{folder} has no rows: no arm has been run")
        results = Results(plan, chosen if choose else rows)
        for name in results.ranked(arms):
            console.print(results.describe(name, arms[name]))
        console.print(f"wrote {write_report(plan, rows, chosen, folder)} and its plot")
    if failed:
        sys.exit(f"{failed} runs failed; run the same command again to retry them")


if __name__ == "__main__":
    typer.run(main)
