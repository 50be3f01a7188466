"""What is each diversity worth? Every arm at one budget, with several seeds; then tables and plots.

    python experiments/ablation.py [characters|grocery|FOLDER] [OPTIONS]

FOLDER holds a config.yaml and an arms.yaml, as experiments/ablations/characters does. A finished (arm,
seed) is a line of its rows.jsonl and is never run again: stop this at any time, and start it again. Of
arms that arms.yaml gives the same settings only one is run; the others' rows are copies that say so.
Arms run side by side as tasks of Ray, one a core (or `--gpus-per-arm`), on this machine or on the
cluster that RAY_ADDRESS names. `--report` makes the tables and the plots anew from what is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import ray
import typer
from ablations.arms import ARMS, Arm, Plan
from ablations.measure import measure
from ablations.report import write_report
from ablations.running import (
    Row,
    images_of,
    require_same_images,
    resources,
    rows_of,
    side_by_side,
)
from provenance import commit
from rich.console import Console

from ray_dmml.cli.errors import user_errors
from ray_dmml.data.dataset import Splits
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.peer_actor import tune_malloc
from ray_dmml.ray_backend.session import ray_session

EXPERIMENTS = Path(__file__).parent
DATA = ("characters", "grocery")

Alike = dict[str, tuple[str, bool]]
"""Of each arm: equal for arms whose rows would be the same."""


def alike_arms(plan: Plan) -> Alike:
    """By their settings, and whether averages are judged or the weights themselves."""
    return {name: (plan.digest(arm), arm.ema) for name, arm in ARMS.items()}


def require_same_settings(rows: list[Row], alike: Alike, file: Path) -> None:
    """Raises UserError where rows are of other settings than the arms have now, or copies of none."""
    other = {row["arm"] for row in rows if alike.get(row["arm"], ("",))[0] != row["settings"]}
    if other:
        raise UserError(
            f"{file} has rows of other settings than config.yaml, arms.yaml and --set give now "
            f"({'; '.join(sorted(other))}): undo the change, remove those rows to run them anew, or give a "
            "copy of the folder without them"
        )
    run = {(row["arm"], row["seed"]) for row in rows if "same_as" not in row}
    if orphans := {
        row["arm"] for row in rows if "same_as" in row and (row["same_as"], row["seed"]) not in run
    }:
        raise UserError(
            f"{file} has rows that are copies (same_as) of rows that are gone: remove them, too "
            f"({'; '.join(sorted(orphans))})"
        )


def left_to_run(
    rows: list[Row], wanted: list[tuple[str, int]], alike: Alike
) -> list[tuple[str, int]]:
    """The arms and seeds without a row, their own or of an arm alike; of those alike the first."""
    done = {(alike[row["arm"]], row["seed"]) for row in rows}
    left: dict[tuple[tuple[str, bool], int], tuple[str, int]] = {}
    for name, seed in wanted:
        if (alike[name], seed) not in done:
            left.setdefault((alike[name], seed), (name, seed))
    return list(left.values())


def copies(rows: list[Row], wanted: list[tuple[str, int]], alike: Alike) -> list[Row]:
    """The rows of arms and seeds that have none, and whose settings are those of an arm that has."""
    done = {(row["arm"], row["seed"]) for row in rows}
    run = {(alike[row["arm"]], row["seed"]): row for row in rows if "same_as" not in row}
    return [
        {**row, "arm": name, "same_as": row["arm"], "seconds": 0.0}
        for name, seed in wanted
        if (name, seed) not in done and (row := run.get((alike[name], seed)))
    ]


@ray.remote(max_retries=0)
def run_arm(plan: Plan, arm: Arm, seed: int, skipped: tuple[str, ...]) -> Row:
    """In a process of Ray's, which is used again for the next."""
    tune_malloc()
    splits = load_splits(plan.config(arm, seed).data, skip=frozenset(skipped), check=False)
    return measure(plan, arm, seed, splits)


def run(
    plan: Plan,
    splits: Splits,
    todo: list[tuple[str, int]],
    alike: Alike,
    add: Callable[[Row], None],
    gpus_per_arm: float,
    console: Console,
) -> int:
    """Runs arms and seeds, a row each; how many failed."""
    made_by = commit()

    def finished(task: tuple[str, int], found: Row) -> str:
        of = {"arm": task[0], "settings": alike[task[0]][0], "images": images_of(splits)}
        add({**of, "commit": made_by, **found})
        tested = found["last"]["test"]
        peers = [peer["recall@1"] for peer in tested["peers"]]
        return (
            f"mean peer {100 * sum(peers) / len(peers):.1f}, ensemble "
            f"{100 * tested['ensemble']['recall@1']:.1f}"
        )

    with ray_session():
        run_one, shared = run_arm.options(**resources(gpus_per_arm)), ray.put(plan)
        running = {
            run_one.remote(shared, ARMS[name], seed, splits.skipped): (name, seed)
            for name, seed in todo
        }
        return side_by_side(running, lambda task: f"{task[0]}, seed {task[1]}", finished, console)


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
            min=0.01,
            max=1,
            help="Share of a GPU that an arm takes, beside a core; 0.25: four on each.",
        ),
    ] = 1,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing; tables and plots.")
    ] = False,
) -> None:
    """Measure what each diversity is worth."""
    folder = EXPERIMENTS / "ablations" / data if data in DATA else Path(data)
    console, failed = Console(soft_wrap=True), 0
    file = folder / "rows.jsonl"
    with user_errors():
        if not (folder / "arms.yaml").is_file():
            raise UserError(
                f"{data}: a folder with config.yaml and arms.yaml is needed, or {' or '.join(DATA)}"
            )
        if unknown := [name for name in arm or () if name not in ARMS]:
            raise UserError(f"no arm {', '.join(unknown)}; there are: {'; '.join(ARMS)}")
        if not report:
            plan = Plan(folder, settings or [])
            with rows_of(file) as (rows, add):
                alike = alike_arms(plan)
                require_same_settings(rows, alike, file)
                names = dict.fromkeys(arm or ARMS)
                wanted = [(name, seed) for seed in range(seeds) for name in names]
                if todo := left_to_run(rows, wanted, alike):
                    splits = load_splits(plan.config(Arm(), 0).data, console.print)
                    require_same_images(rows, splits, file)
                    failed = run(plan, splits, todo, alike, add, gpus_per_arm, console)
                for row in copies(rows, wanted, alike):
                    add(row)
        if not file.exists():
            raise UserError(f"{file} is not there: no arm has been run")
        with rows_of(file) as (rows, _):
            if rows:
                page = EXPERIMENTS / "README.md" if data in DATA else folder / "report.md"
                write_report(rows, folder, page)
                console.print(f"tables: {page}; plots: {folder}", highlight=False)
            else:
                console.print(f"{file} has no rows yet", highlight=False)
    if failed:
        sys.exit(f"{failed} arms failed; run the same command again to retry them")


if __name__ == "__main__":
    typer.run(main)
