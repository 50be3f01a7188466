"""Repeats the published figures of a data set, with intervals over seeds.

    python experiments/reproduce.py cub200 --root DIR --dry-run             # what it would run, and for how long
    python experiments/reproduce.py cub200 --root DIR --seeds 3 --gpus 4

It trains a single net, independent peers, mutual learning with each diversity alone and with all (DM2), and students of
the single net (self-distillation), of DM2 and of a frozen ViT, at the setting of configs/NAME.yaml. Each finished run
becomes a line of OUT/rows.jsonl and is never run again, and one that was killed is resumed from its last checkpoint, so
the command can be stopped and started again at any time. OUT/table.md is rewritten after each run. The peers of a run
take turns on one GPU, or on one core.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from provenance import commit
from reproduction.archive import counts_of, read_archive
from reproduction.arms import ARMS, with_teachers
from reproduction.hours import Speed, as_time, estimate
from reproduction.machine import Machine
from reproduction.plan import Plan
from reproduction.run import tasks_of, train_arm
from reproduction.table import report
from runner.digests import digest
from runner.rows import Row, open_rows, require_images, require_settings
from runner.tasks import Task, console, run_tasks

from ray_dmml.cli.output import user_errors
from ray_dmml.data.dataset import Splits
from ray_dmml.data.datasets.benchmarks import BENCHMARKS
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.session import ray_session
from ray_dmml.training.quick_check import check_quickly

VIT = "vit_base_patch14_dinov2.lvd142m"


def require_names(data: str, arms: Sequence[str]) -> None:
    """Raises UserError for a data set or an arm that there is not."""
    if data not in BENCHMARKS:
        near = difflib.get_close_matches(data, BENCHMARKS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no data set {data}; the data sets are: {', '.join(BENCHMARKS)}{hint}")
    if unknown := [name for name in arms if name not in ARMS]:
        raise UserError(f"no arm {', '.join(unknown)}; the arms are: {'; '.join(ARMS)}")


def announce(plan: Plan, tasks: Sequence[Task], splits: Splits, machine: Machine, speed: Speed) -> None:
    """Prints which runs will be made, and how long they take."""
    seconds = estimate(plan, tasks, splits, speed)
    for name, each in seconds.items():
        number = sum(task.row["arm"] == name for task in tasks)
        console.print(f"  {name}: {number} {'run' if number == 1 else 'runs'}, {as_time(each)}")
    total = sum(seconds.values())
    console.print(
        f"{len(tasks)} runs, about {total / 3600:.2g} {machine.device}-hours, {as_time(total / machine.num_devices)} "
        f"on {machine.shown()}, at {speed.images_per_s:.3g} images/s that a net learns from ({speed.source})"
    )


def shown(row: Row) -> str:
    """The Recall@1 of each peer, and of their ensemble."""
    figures = [*row["peers"], *([row["ensemble"]] if "ensemble" in row else [])]
    return " / ".join(f"{100 * each['recall@1']:.1f}" for each in figures)


def may_start(yes: bool) -> bool:
    """Whether the user wants the runs. Raises UserError if nobody can be asked."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("nobody can be asked whether to start: give --yes")
    return typer.confirm("Start?")


def main(
    data: Annotated[str, typer.Argument(help=f"{', '.join(BENCHMARKS)}.")],
    root: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the unpacked archive, or the one around it.")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each arm. Intervals need three.")] = 3,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs to use, one a run. Default: all.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: runs/reproduce-NAME.")] = None,
    arm: Annotated[list[str] | None, typer.Option(metavar="NAME", help="An arm to run. Repeatable.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For all arms. The table names it.")
    ] = None,
    teacher: Annotated[str, typer.Option(metavar="BACKBONE", help="The frozen net that teaches.")] = VIT,
    teacher_weights: Annotated[str, typer.Option(metavar="WEIGHTS", help="pretrained, or a file.")] = "pretrained",
    images_per_second: Annotated[
        float | None,
        typer.Option(min=0.001, help="Estimate the time with this speed, of a net that learns, and measure none."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be run, and for how long.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without a question.")] = False,
) -> None:
    """Repeat the published figures of a data set."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ray_dmml").setLevel(logging.INFO)
    failed = 0
    with user_errors():
        require_names(data, arm or ())
        out, names = out or Path("runs") / f"reproduce-{data}", with_teachers(arm or list(ARMS))
        plan = Plan.of(data, root, settings or [], teacher, teacher_weights, out.absolute() / "runs", not dry_run)
        for name in names:
            if ARMS[name].teacher not in ARMS:  # others have no config before their teacher has finished
                check_quickly(plan.config(name, 0), on_this_machine=True)
        machine, file, page = Machine(gpus), out / "rows.jsonl", out / "table.md"
        out.mkdir(parents=True, exist_ok=True)
        with open_rows(file) as (rows, add):
            require_settings(rows, {plan.digest(name) for name in ARMS}, file)
            splits = read_archive(plan.base.data, check=not dry_run)
            made = {"images": digest(splits.digests()), "commit": commit(), "counts": counts_of(splits)}
            require_images(rows, made["images"], file)
            tasks = tasks_of(plan, names, seeds, rows, made, machine.cores)

            def keep(row: Row) -> None:
                add(row)
                rows.append(row)
                page.write_text(report(data, rows, plan.metrics, settings or [], teacher))

            if tasks:
                stated = Speed(images_per_second, "as --images-per-second says") if images_per_second else None
                with nullcontext() if stated else ray_session():
                    announce(plan, tasks, splits, machine, stated or machine.speed(plan))
                    if dry_run or not may_start(yes):
                        return
                    failed = run_tasks(train_arm, tasks, keep, shown, workers=machine.num_devices, **machine.resources)
            if rows:
                table = report(data, rows, plan.metrics, settings or [], teacher)
                page.write_text(table)
                print(f"\n{table}\nwrote {page}")
    if failed:
        sys.exit(f"{failed} runs failed; run the same command again to retry them")


if __name__ == "__main__":
    typer.run(main)
