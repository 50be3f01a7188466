"""Rows `exchange` and `exchange-coordinator`: what it costs two actors to swap their embeddings."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.cluster import private_ray
from benchmarks.plain_exchange import ROWS, SIZE
from benchmarks.row import Goal, Row, Settings, in_turn
from benchmarks.worker import Worker, ask_all
from ray_dmml.cohort.teachers import Teachers
from ray_dmml.ray_backend.coordinator import Coordinator
from ray_dmml.ray_backend.exchange import Members, connect

DIRECT_COUNT, COORDINATOR_COUNT, WARM_UP = 500, 100, 10
TIMEOUT_S = 60.0


class Exchanger:
    """An actor that exchanges the same embedding again and again."""

    def connect(self, transport: str, coordinator: Any, position: int, threads: int = 1) -> str:
        torch.set_num_threads(threads)
        self._step = 0
        self._exchange, how = connect(
            transport,
            coordinator,
            position,
            Members(("peer0", "peer1"), (SIZE, SIZE)),
            Teachers(2),
            torch.device("cpu"),
            TIMEOUT_S,
        )
        return how

    def run(self, count: int) -> float:
        """Seconds an exchange; the first ones make the peers start together and are not counted."""
        sent = torch.randn(ROWS, SIZE)
        began = 0.0
        for i in range(WARM_UP + count):
            if i == WARM_UP:
                began = time.perf_counter()
            self._exchange.start(self._step, sent)
            self._exchange.finish()
            self._step += 1
        return (time.perf_counter() - began) / count


class Echo:
    """An actor that hands back what it is given."""

    def echo(self, array: np.ndarray) -> np.ndarray:
        return array.copy()


class Caller:
    """An actor that calls another."""

    def run(self, echo: Any, count: int) -> float:
        """Seconds a call with an array of 256 KiB and one back."""
        sent = np.random.default_rng(0).normal(size=(ROWS, SIZE)).astype(np.float32)
        began = 0.0
        for i in range(WARM_UP + count):
            if i == WARM_UP:
                began = time.perf_counter()
            ray.get(echo.echo.remote(sent))
        return (time.perf_counter() - began) / count


@contextmanager
def exchangers(transport: str) -> Iterator[list[Any]]:
    """Two actors that are connected; Ray is up."""
    coordinator = ray.remote(Coordinator).options(num_cpus=0).remote(("peer0", "peer1"))
    actors = [ray.remote(Exchanger).options(num_cpus=1).remote() for _ in range(2)]
    how = ray.get([a.connect.remote(transport, coordinator, i) for i, a in enumerate(actors)])
    if set(how) != {transport}:
        raise RuntimeError(f"asked for transport {transport}, got {how}")
    yield actors
    for actor in [*actors, coordinator]:
        ray.kill(actor)


def exchange(settings: Settings) -> list[Row]:
    """The direct transport against gloo between plain processes."""
    with ExitStack() as stack:
        plain = [stack.enter_context(worker) for worker in distributed("plain_exchange")]
        stack.enter_context(private_ray())
        actors = stack.enter_context(exchangers("direct"))
        a, b = in_turn(
            settings.rounds,
            lambda: 1e3 * max(ray.get([actor.run.remote(DIRECT_COUNT) for actor in actors])),
            lambda: 1e3 * max(answer["seconds"] for answer in ask_all(plain, DIRECT_COUNT)),
        )
    what = "exchange of 128 x 512 float32, M = 2: direct transport / plain gloo"
    return [Row("exchange", what, "ms", a, b, Goal("A/B", "<=", 1.5))]


def exchange_coordinator(settings: Settings) -> list[Row]:
    """Through the coordinator, against one call of an actor."""
    with private_ray(), exchangers("coordinator") as actors:
        caller, echo = (ray.remote(cls).options(num_cpus=0).remote() for cls in (Caller, Echo))
        a, b = in_turn(
            settings.rounds,
            lambda: 1e3 * max(ray.get([actor.run.remote(COORDINATOR_COUNT) for actor in actors])),
            lambda: 1e3 * ray.get(caller.run.remote(echo, COORDINATOR_COUNT)),
        )
    what = "the same through the coordinator / one actor call, 256 KiB each way"
    return [Row("exchange-coordinator", what, "ms", a, b, Goal("A/B", "<=", 2))]


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
