"""Programs in processes of their own that work on request and sleep in between.

The protocol is lines of text: a count goes in, a JSON object comes out. So a competitor needs nothing
of the benchmark, and the side whose turn it is not takes no time from the other.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parent.parent
MARK = "answer "


def serve(work: Callable[[int], Mapping[str, Any]]) -> None:
    """Inside the program: calls ``work`` with each count that arrives, until the input ends."""
    print(f"{MARK}{{}}", flush=True)
    for line in sys.stdin:
        print(MARK + json.dumps(dict(work(int(line)))), flush=True)


class Worker(AbstractContextManager["Worker"]):
    """A process that runs a module of this package which calls :func:`serve`.

    Args:
        module: such as ``plain``.
        arguments: of its command line.
        threads: of OpenMP and torch.
        environment: further variables.
        wait: returns when the program is ready. False for programs that wait for one another at the
            start: the caller calls :meth:`answer` on each when all of them run.
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
        """Sends a count and returns at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Waits for the program's answer.

        Raises:
            RuntimeError: the program ended instead.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return answer
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
    """Lets all of them work at the same time, and waits for all."""
    for worker in workers:
        worker.ask(count)
    return [worker.answer() for worker in workers]


def distributed(module: str, *arguments: str, size: int = 2) -> list[Worker]:
    """Workers that are the ranks of one torch.distributed group on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        Worker(
            module,
            *arguments,
            environment={
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            },
            wait=False,
        )
        for rank in range(size)
    ]
    for worker in workers:
        worker.answer()
    return workers
