"""What is each diversity worth? Every arm at one budget, with several seeds; then tables and plots.

    python experiments/ablation.py [characters|grocery|FOLDER] [OPTIONS]

FOLDER holds a config.yaml and an arms.yaml, as experiments/ablations/characters does. A finished (arm,
seed) is a line of its rows.jsonl and is never run again: stop this at any time, and start it again.
Arms run side by side as tasks of Ray, one a core (or `--gpus-per-arm`), on this machine or on the
cluster that RAY_ADDRESS names. `--report` makes the tables and the plots anew from what is there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from ablations.arms import ARMS, Arm, Plan
from ablations.measure import measure
from ablations.report import write_report
from provenance import commit
from rich.console import Console

from ray_dmml.cohort.member import keep_freed_memory
from ray_dmml.cohort.session import ray_session
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.images import Splits
from ray_dmml.errors import UserError

EXPERIMENTS = Path(__file__).parent
DATA = ("characters", "grocery")


@contextmanager
def rows_of(file: Path) -> Iterator[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """The finished rows, and how one is added; for one process at a time.

    Raises:
        UserError: another process has the file.
    """
    with file.open("a+b") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{file} is being written by another run of this command") from None
        opened.seek(0)
        found = opened.read()
        whole = found.rfind(b"\n") + 1  # of a line that was cut off nothing is left
        opened.truncate(whole)

        def add(row: dict[str, Any]) -> None:
            opened.write(json.dumps(row).encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())

        yield [json.loads(line) for line in found[:whole].splitlines()], add


def require_same_settings(rows: list[dict[str, Any]], plan: Plan, file: Path) -> None:
    """Raises UserError where rows are of other settings than the arms have now."""
    digests = {name: plan.digest(arm) for name, arm in ARMS.items()}
    other = sorted({row["arm"] for row in rows if digests.get(row["arm"]) != row["settings"]})
    if other:
        raise UserError(
            f"{file} has rows of other settings than config.yaml, arms.yaml and --set give now "
            f"({'; '.join(other)}): undo the change, remove those rows to run them anew, or give a copy "
            "of the folder without them"
        )


def require_same_images(rows: list[dict[str, Any]], splits: Splits, file: Path) -> None:
    """Raises UserError where rows are of other images, or another division of them."""
    if any(row["images"] != images_of(splits) for row in rows):
        raise UserError(
            f"{file} has rows of other images, classes or splits than data.* gives now: undo the change, or "
            "remove those rows to run them anew"
        )


def images_of(splits: Splits) -> str:
    """Of names, classes and splits, and who is judged against whom."""
    return hashlib.sha256(json.dumps(splits.digests()).encode()).hexdigest()[:12]


def resources(num_gpus: float) -> dict[str, float]:
    """What a task needs, in Ray's words: a core, and so much of a GPU where there are any."""
    return {"num_cpus": 1} | (
        {"num_gpus": num_gpus} if num_gpus and ray.cluster_resources().get("GPU") else {}
    )


@ray.remote(max_retries=0)
def run_arm(plan: Plan, arm: Arm, seed: int, skipped: tuple[str, ...]) -> dict[str, Any]:
    """In a process of Ray's, which is used again for the next."""
    keep_freed_memory()
    splits = load_splits(plan.config(arm, seed).data, skip=frozenset(skipped), check=False)
    return measure(plan, arm, seed, splits)


def run(
    plan: Plan,
    splits: Splits,
    todo: list[tuple[str, int]],
    add: Callable[[dict[str, Any]], None],
    gpus_per_arm: float,
    console: Console,
) -> int:
    """Runs arms and seeds, a row each; how many failed."""
    made_by, failed = commit(), 0
    with ray_session():
        needs = resources(gpus_per_arm)
        shared = ray.put(plan)
        running = {
            run_arm.options(**needs).remote(shared, ARMS[name], seed, splits.skipped): (name, seed)
            for name, seed in todo
        }
        began = time.monotonic()
        while running:
            done, _ = ray.wait(list(running))
            name, seed = running.pop(done[0])
            try:
                found = ray.get(done[0])
            except ray.exceptions.RayError as error:
                failed += 1
                reason = str(error).strip().splitlines()[-1]
                console.print(f"[red]{name}, seed {seed}: {reason}[/red]", highlight=False)
                continue
            of = {"arm": name, "settings": plan.digest(ARMS[name]), "images": images_of(splits)}
            add({**of, "commit": made_by, **found})
            tested = found["last"]["test"]
            peers = [peer["recall@1"] for peer in tested["peers"]]
            rate = (time.monotonic() - began) / (len(todo) - len(running)) / 60
            console.print(
                f"{name}, seed {seed}: mean peer {100 * sum(peers) / len(peers):.1f}, ensemble "
                f"{100 * tested['ensemble']['recall@1']:.1f}; {len(running)} left, about "
                f"{rate * len(running):.0f} min",
                highlight=False,
            )
    return failed


def main(
    data: Annotated[
        str, typer.Argument(help="characters (built in), grocery, or a folder of your own.")
    ] = "characters",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of all arms, such as data.root=FOLDER."),
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="An arm to run. Repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each arm.")] = 5,
    gpus_per_arm: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="Below 1: so many arms share a GPU, where there is one."
        ),
    ] = 1,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing; tables and plots.")
    ] = False,
) -> None:
    """Measure what each diversity is worth."""
    folder = EXPERIMENTS / "ablations" / data if data in DATA else Path(data)
    if not (folder / "arms.yaml").is_file():
        sys.exit(
            f"{data}: a folder with config.yaml and arms.yaml is needed, or {' or '.join(DATA)}"
        )
    if unknown := [name for name in arm or () if name not in ARMS]:
        sys.exit(f"no arm {', '.join(unknown)}; there are: {'; '.join(ARMS)}")
    console, failed = Console(soft_wrap=True), 0
    file = folder / "rows.jsonl"
    try:
        if not report:
            plan = Plan(folder, settings or [])
            with rows_of(file) as (rows, add):
                require_same_settings(rows, plan, file)
                done = {(row["arm"], row["seed"]) for row in rows}
                names = dict.fromkeys(arm or ARMS)
                wanted = [(name, seed) for seed in range(seeds) for name in names]
                if todo := [each for each in wanted if each not in done]:
                    splits = load_splits(plan.config(Arm(), 0).data, console.print)
                    require_same_images(rows, splits, file)
                    failed = run(plan, splits, todo, add, gpus_per_arm, console)
        if not file.exists():
            sys.exit(f"{file} is not there: no arm has been run")
        with rows_of(file) as (rows, _):
            if rows:
                page = EXPERIMENTS / "README.md" if data in DATA else folder / "report.md"
                write_report(rows, folder, page)
                console.print(f"tables: {page}; plots: {folder}", highlight=False)
            else:
                console.print(f"{file} has no rows yet", highlight=False)
    except UserError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f"{failed} arms failed; run the same command again to retry them")


if __name__ == "__main__":
    typer.run(main)
