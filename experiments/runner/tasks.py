"""Runs tasks side by side, as Ray tasks on this machine or on the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console

from ray_dmml.ray_backend.process import tune_malloc
from ray_dmml.ray_backend.session import ray_session

from .rows import Add, Row

console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Task:
    """A run that is to be made."""

    name: str
    """In messages. No two tasks have the same one."""

    row: Row
    """How its row begins."""

    arguments: tuple[Any, ...]
    """Of the function that makes the run in a process of Ray and returns the rest of the row."""

    needs: str | None = None
    """The task whose run this one reads."""

    has_row: bool = False
    """The run is only made again because another one needs it."""


def run_tasks(
    function: Callable[..., Row],
    tasks: Sequence[Task],
    add: Add,
    shown: Callable[[Row], str],
    *,
    workers: int = 0,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> int:
    """Runs tasks, adds a row for each, and prints a line about it. A task that fails does not stop the others.

    Args:
        function: makes a run from the arguments of its task.
        tasks: those that others need come before them.
        add: adds a row to the file.
        shown: the figures of a row, for its line.
        workers: most tasks side by side; 0: as many as there are CPUs and GPUs for.
        num_cpus, num_gpus: of each task.

    Returns:
        How many tasks failed.
    """
    remote = ray.remote(max_retries=0, num_cpus=num_cpus, num_gpus=num_gpus)(_in_worker)
    waiting, running, failed, began = list(tasks), dict[Any, Task](), dict[str, Task](), time.monotonic()
    with ray_session():
        while waiting or running:
            open_names = {task.name for task in (*waiting, *running.values())}
            for task in [task for task in waiting if task.needs in failed]:
                waiting.remove(task)
                failed[task.name] = task
                console.print(f"[red]{task.name}: not run, because it needs the run of {task.needs}[/red]")
            for task in [task for task in waiting if task.needs not in open_names]:
                if not workers or len(running) < workers:
                    waiting.remove(task)
                    running[remote.remote(function, task.arguments)] = task
            if not running:
                continue
            (finished, *_), _ = ray.wait(list(running))
            task = running.pop(finished)
            left = len(waiting) + len(running)
            try:
                row = {**task.row, **ray.get(finished)}
            except ray.exceptions.RayError as error:
                failed[task.name] = task
                console.print(f"[red]{task.name}: {str(error).strip().splitlines()[-1]}[/red]")
                continue
            if not task.has_row:
                add(row)
            minutes = (time.monotonic() - began) / 60 / (len(tasks) - left) * left
            console.print(f"{task.name}: {shown(row)}, {row['seconds']:.0f} s; {left} left, about {minutes:.0f} min")
    return len(failed)


def _in_worker(function: Callable[..., Row], arguments: tuple[Any, ...]) -> Row:
    tune_malloc()  # Ray uses the process again for the next task
    return function(*arguments)
