"""What is each diversity worth? Trains every arm with the same budget and several seeds, then writes tables and plots.

    python experiments/ablation.py [characters|grocery|FOLDER] [OPTIONS]

FOLDER holds a config.yaml and an arms.yaml, as experiments/ablations/characters does. Each finished
(arm, seed) becomes a line of FOLDER/rows.jsonl and is never run again, so the command can be stopped
and started again at any time. Where arms have the same settings, one of them is run and the rows of
the others are marked copies. Arms run side by side as Ray tasks, one a core (or `--gpus-per-arm`), on
this machine or on the cluster that RAY_ADDRESS names. `--report` only writes tables and plots of the
rows that exist.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import ray
import typer
from ablations.arms import ARMS, Arm, Plan
from ablations.measure import measure
from ablations.report import write_report
from ablations.rows import Row, images_digest, open_rows, require_same_images
from provenance import commit
from rich.console import Console

from ray_dmml.cli.errors import user_errors
from ray_dmml.data.dataset import Splits
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.process import tune_malloc
from ray_dmml.ray_backend.session import ray_session

EXPERIMENTS = Path(__file__).parent
DATA = ("characters", "grocery")

Task = tuple[str, int]
"""The name of an arm, and a seed."""

Digests = Mapping[str, str]
"""The digest of each arm's settings. Arms with the same digest have the same rows."""


def require_same_settings(rows: list[Row], digests: Digests, file: Path) -> None:
    """Raises UserError where a row has other settings than its arm, or is a copy of a missing row."""
    if changed := {row["arm"] for row in rows if digests.get(row["arm"]) != row["settings"]}:
        raise UserError(
            f"{file} has rows of other settings than config.yaml, arms.yaml and --set give now "
            f"({'; '.join(sorted(changed))}): undo the change, remove those rows to run them again, or use a "
            "copy of the folder without them"
        )
    originals = {(row["arm"], row["seed"]) for row in rows if "same_as" not in row}
    copied = [row for row in rows if "same_as" in row]
    if orphans := {row["arm"] for row in copied if (row["same_as"], row["seed"]) not in originals}:
        raise UserError(
            f"{file} has copies (same_as) of rows that no longer exist: remove them, too ({'; '.join(sorted(orphans))})"
        )


def left_to_run(rows: list[Row], wanted: list[Task], digests: Digests) -> list[Task]:
    """The tasks whose settings and seed have no row yet; the first of those with the same settings."""
    done = {(digests[row["arm"]], row["seed"]) for row in rows}
    left: dict[tuple[str, int], Task] = {}
    for name, seed in wanted:
        if (digests[name], seed) not in done:
            left.setdefault((digests[name], seed), (name, seed))
    return list(left.values())


def copies(rows: list[Row], wanted: list[Task], digests: Digests) -> list[Row]:
    """Rows for tasks that have none, copied from an arm with the same settings."""
    done = {(row["arm"], row["seed"]) for row in rows}
    originals = {(digests[row["arm"]], row["seed"]): row for row in rows if "same_as" not in row}
    return [
        {**row, "arm": name, "same_as": row["arm"], "seconds": 0.0}
        for name, seed in wanted
        if (name, seed) not in done and (row := originals.get((digests[name], seed)))
    ]


def resources(gpus_per_arm: float, cluster: Mapping[str, float]) -> dict[str, float]:
    """Ray's options for an arm: a core, and a share of a GPU where the cluster has any."""
    return {"num_cpus": 1, **({"num_gpus": gpus_per_arm} if cluster.get("GPU") else {})}


@ray.remote(max_retries=0)
def run_arm(plan: Plan, arm: Arm, seed: int, skipped: tuple[str, ...]) -> Row:
    """Runs in a Ray worker process, which Ray uses again for the next arm."""
    tune_malloc()
    splits = load_splits(plan.config(arm, seed).data, skip=frozenset(skipped), check=False)
    return measure(plan, arm, seed, splits)


def run(
    plan: Plan,
    splits: Splits,
    tasks: list[Task],
    digests: Digests,
    add: Callable[[Row], None],
    gpus_per_arm: float,
    console: Console,
) -> int:
    """Runs the tasks side by side and adds a row for each; returns how many failed."""
    made_by, images, failed, began = commit(), images_digest(splits), 0, time.monotonic()
    with ray_session():
        remote = run_arm.options(**resources(gpus_per_arm, ray.cluster_resources()))
        shared = ray.put(plan)
        running = {remote.remote(shared, ARMS[name], seed, splits.skipped): (name, seed) for name, seed in tasks}
        while running:
            (done, *_), _ = ray.wait(list(running))
            name, seed = running.pop(done)
            try:
                row = ray.get(done)
            except ray.exceptions.RayError as error:
                failed += 1
                reason = str(error).strip().splitlines()[-1]
                console.print(f"[red]{name}, seed {seed}: {reason}[/red]", highlight=False)
                continue
            known = {"arm": name, "settings": digests[name], "images": images, "commit": made_by}
            add({**known, **row})
            test = row["last"]["test"]
            peers = [peer["recall@1"] for peer in test["peers"]]
            minutes = (time.monotonic() - began) / 60 / (len(tasks) - len(running)) * len(running)
            console.print(
                f"{name}, seed {seed}: mean peer {100 * sum(peers) / len(peers):.1f}, ensemble "
                f"{100 * test['ensemble']['recall@1']:.1f}; {len(running)} left, about {minutes:.0f} min",
                highlight=False,
            )
    return failed


def main(
    data: Annotated[
        str, typer.Argument(help="characters (built in), grocery, or a folder of your own.")
    ] = "characters",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="For all arms, such as data.root=FOLDER."),
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(metavar="NAME", help="An arm to run. Repeatable.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each arm.")] = 5,
    gpus_per_arm: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            help="Share of a GPU for each arm, beside a core; 0.25: four share one.",
        ),
    ] = 1,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; only write tables and plots.")] = False,
) -> None:
    """Measure what each diversity is worth."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ray_dmml").setLevel(logging.INFO)
    folder = EXPERIMENTS / "ablations" / data if data in DATA else Path(data)
    console, failed = Console(soft_wrap=True), 0
    file = folder / "rows.jsonl"
    with user_errors():
        if not (folder / "arms.yaml").is_file():
            raise UserError(f"{data}: expected a folder with config.yaml and arms.yaml, or {' or '.join(DATA)}")
        if unknown := [name for name in arm or () if name not in ARMS]:
            raise UserError(f"no arm {', '.join(unknown)}; the arms are: {'; '.join(ARMS)}")
        if report and not file.exists():
            raise UserError(f"{file} does not exist: no arm has been run")
        with open_rows(file) as (rows, add):
            if not report:
                plan = Plan(folder, settings or [])
                digests = {name: plan.digest(each) for name, each in ARMS.items()}
                require_same_settings(rows, digests, file)
                wanted = [(name, seed) for seed in range(seeds) for name in dict.fromkeys(arm or ARMS)]
                if tasks := left_to_run(rows, wanted, digests):
                    splits = load_splits(plan.config(Arm(), 0).data)
                    require_same_images(rows, splits, file)
                    failed = run(plan, splits, tasks, digests, add, gpus_per_arm, console)
                for row in copies(rows, wanted, digests):
                    add(row)
            if rows:
                page = write_report(rows, folder)
                console.print(f"wrote {page} and its plots", highlight=False)
            else:
                console.print(f"{file} has no rows yet", highlight=False)
    if failed:
        sys.exit(f"{failed} arms failed; run the same command again to retry them")


if __name__ == "__main__":
    typer.run(main)
