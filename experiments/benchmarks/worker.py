"""A program in a process of its own that works when told, and sleeps in between.

The protocol is lines of text: a count in, a JSON object out. So a competitor needs nothing of the
benchmark to run, and the side whose turn it is not takes no time from the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parent.parent
MARK = "answer "


def serve(work: Callable[[int], Mapping[str, Any]]) -> None:
    """Inside the program: calls ``work`` with each count that comes, until there are no more."""
    print(f"{MARK}{{}}", flush=True)
    for line in sys.stdin:
        print(MARK + json.dumps(dict(work(int(line)))), flush=True)


class Worker(AbstractContextManager["Worker"]):
    """A module of this package that calls :func:`serve`, as a process; it is ready when built.

    Args:
        module: such as ``plain_dm2``.
        arguments: its command line.
        threads: of OpenMP and torch.
        environment: further variables.
        wait: False: the caller calls :meth:`answer` when all that wait for one another are started.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        threads: int = 1,
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        path = os.pathsep.join([str(EXPERIMENTS), str(EXPERIMENTS.parent)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": str(threads),
                **(environment or {}),
            },
        )
        self.pid = self._process.pid
        if wait:
            self.answer()

    def ask(self, count: int) -> None:
        """Sets it to work and returns at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What it says when it is done.

        Raises:
            RuntimeError: it ended instead.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return found
        raise RuntimeError(f"{self._process.args!r} ended with {self._process.wait()}")

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def ask_all(workers: list[Worker], count: int) -> list[dict[str, Any]]:
    """Sets all to work at the same time and waits for all."""
    for worker in workers:
        worker.ask(count)
    return [worker.answer() for worker in workers]
