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

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from ablations.arms import Arm
from ablations.candidates import STAGES
from ablations.measure import Split, measure
from ablations.plan import Plan
from ablations.report import Results, both, write_report
from provenance import commit
from runner.digests import read_images
from runner.rows import Row, open_rows, read_rows, require_images, require_settings
from runner.tasks import Task, console, run_tasks

from ray_dmml.cli.output import user_errors
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError

EXPERIMENTS = Path(__file__).parent
DATA = ("characters", "grocery", "objects")


def run_missing(plan: Plan, stage: str | None, names: list[str], num_seeds: int, file: Path, workers: int) -> int:
    """Runs what has no row yet; returns how many runs failed. ``workers`` is the most side by side, 0 no limit.

    Raises:
        UserError: the file has rows of other settings or images.
    """
    arms = plan.stages[stage] if stage else plan.arms
    with open_rows(file) as (rows, add):
        tables = plan.stages.values() if stage else [arms]
        require_settings(rows, {plan.digest(arm) for table in tables for arm in table.values()}, file)
        done = {(row["settings"], row["seed"]) for row in rows}
        wanted = [(name, plan.digest(arms[name]), seed) for seed in range(num_seeds) for name in names]
        missing = [(name, digest, seed) for name, digest, seed in wanted if (digest, seed) not in done]
        if not missing:
            return 0
        splits, images = read_images(plan.config(Arm(), 0).data)
        require_images(rows, images, file)
        split, made = "validation" if stage else "test", {"images": images, "commit": commit()}
        tasks = [
            Task(
                f"{name}, seed {seed}",
                {"arm": name, "settings": digest, **made},
                (plan.config(arms[name], seed), splits.skipped, split),
            )
            for name, digest, seed in missing
        ]
        return run_tasks(run_arm, tasks, add, lambda row: f"{both(row):.1f}", workers=workers)


def run_arm(config: Config, skipped: tuple[str, ...], split: Split) -> Row:
    return measure(config, load_splits(config.data, skip=frozenset(skipped), check=False), split)


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
