"""Rows of a file, and tasks of Ray that each give one: what the ablation and its candidates have in common."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
from rich.console import Console

from ray_dmml.data.dataset import Splits
from ray_dmml.errors import UserError

Row = dict[str, Any]
Task = TypeVar("Task")


@contextmanager
def rows_of(file: Path) -> Iterator[tuple[list[Row], Callable[[Row], None]]]:
    """The finished rows, and how one is added, to them and to the file; for one process at a time.

    Raises:
        UserError: another process has the file, or a line of it is no row.
    """
    with file.open("a+b") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{file} is being written by another run of this command") from None
        opened.seek(0)
        rows, whole = _rows(opened.read(), file)
        mended = False

        def add(row: Row) -> None:
            nonlocal mended
            if not mended:
                opened.truncate(len(whole))
                opened.write(b"" if whole.endswith(b"\n") or not whole else b"\n")
                mended = True
            opened.write(json.dumps(row).encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())
            rows.append(row)

        yield rows, add


def _rows(found: bytes, file: Path) -> tuple[list[Row], bytes]:
    """The rows, and what is left of the bytes without a last line that was cut off by a kill."""
    rows, whole = [], b""
    for number, line in enumerate(found.splitlines(keepends=True), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError:
            if not line.endswith(b"\n"):
                break
            raise UserError(f"{file}, line {number} is no row: {line[:60]!r}") from None
        whole += line
    return rows, whole


def images_of(splits: Splits) -> str:
    """Of names, classes and splits, and who is judged against whom."""
    return hashlib.sha256(json.dumps(splits.digests()).encode()).hexdigest()[:12]


def require_same_images(rows: Sequence[Row], splits: Splits, file: Path) -> None:
    """Raises UserError where rows are of other images, or another division of them."""
    if any(row["images"] != images_of(splits) for row in rows):
        raise UserError(
            f"{file} has rows of other images, classes or splits than data.* gives now: undo the change, or "
            "remove those rows to run them anew"
        )


def made_of(rows: Sequence[Row]) -> str:
    """How many, where and of which code."""
    hours = sum(row["seconds"] for row in rows) / 3600
    copies = sum("same_as" in row for row in rows)
    devices = sorted({row.get("device", "a device unknown") for row in rows})
    commits = sorted({row["commit"] for row in rows})
    copied = f" and {copies} copies" if copies else ""
    return (
        f"{len(rows) - copies} rows{copied}, {hours:.1f} hours added up, on {', '.join(devices)}; "
        f"commit {', '.join(commits)}"
    )


def resources(share_of_gpu: float) -> dict[str, float]:
    """What a task takes, in Ray's words: a core, and that share of a GPU where there are any."""
    gpu = {"num_gpus": share_of_gpu} if ray.cluster_resources().get("GPU") else {}
    return {"num_cpus": 1, **gpu}


def side_by_side(
    running: Mapping[ray.ObjectRef[Row], Task],
    name: Callable[[Task], str],
    finished: Callable[[Task, Row], str],
    console: Console,
) -> int:
    """Waits for tasks of Ray, and tells of each; how many failed.

    Args:
        running: what each task is.
        name: how it is called.
        finished: takes its row; what to tell of it.
    """
    left, failed, began = dict(running), 0, time.monotonic()
    while left:
        done, _ = ray.wait(list(left))
        task = left.pop(done[0])
        try:
            row = ray.get(done[0])
        except ray.exceptions.RayError as error:
            failed += 1
            reason = str(error).strip().splitlines()[-1]
            console.print(f"[red]{name(task)}: {reason}[/red]", highlight=False)
            continue
        rate = (time.monotonic() - began) / (len(running) - len(left)) / 60
        console.print(
            f"{name(task)}: {finished(task, row)}; {len(left)} left, about {rate * len(left):.0f} min",
            highlight=False,
        )
    return failed
