"""Rows `exchange` and `exchange-coordinator`: two actors exchange their embeddings."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.row import Goal, Row, Settings, in_turn
from benchmarks.worker import ask_all, distributed
from ray_dmml.cohort.teachers import Teachers
from ray_dmml.ray_backend.coordinator import Coordinator
from ray_dmml.ray_backend.exchange import Member
from ray_dmml.ray_backend.process import prepare_process
from ray_dmml.ray_backend.rendezvous import connect

ROWS, SIZE = 128, 512
DIRECT_COUNT, COORDINATOR_COUNT, WARM_UP = 500, 100, 10
TIMEOUT_S = 60.0


@contextmanager
def private_ray(num_cpus: int = 2) -> Iterator[None]:
    """Ray on this machine for the length of the block. Actors find this package by PYTHONPATH."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        "local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


class Exchanger:
    """An actor that exchanges the same embedding again and again."""

    def connect(self, transport: str, coordinator: Any, position: int, threads: int = 1) -> str:
        prepare_process(threads)  # as a peer does
        self._step = 0
        names, device = ("peer0", "peer1"), torch.device("cpu")
        member = Member(position, device, names, Teachers(2), coordinator)
        self._exchange, connected = connect(member, transport, TIMEOUT_S)
        return connected

    def run(self, count: int) -> float:
        """Seconds an exchange. The first ones let the actors start together and are not counted."""
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
    """An actor that returns a copy of its argument."""

    def echo(self, array: np.ndarray) -> np.ndarray:
        return array.copy()


class Caller:
    """An actor that calls another."""

    def run(self, echo: Any, count: int) -> float:
        """Seconds a call with an array of 256 KiB, which returns one of the same size."""
        sent = np.random.default_rng(0).normal(size=(ROWS, SIZE)).astype(np.float32)
        began = 0.0
        for i in range(WARM_UP + count):
            if i == WARM_UP:
                began = time.perf_counter()
            ray.get(echo.echo.remote(sent))
        return (time.perf_counter() - began) / count


@contextmanager
def exchangers(transport: str) -> Iterator[list[Any]]:
    """Two connected actors; Ray must be running."""
    coordinator = ray.remote(Coordinator).options(num_cpus=0).remote(("peer0", "peer1"))
    actors = [ray.remote(Exchanger).options(num_cpus=1).remote() for _ in range(2)]
    used = ray.get([a.connect.remote(transport, coordinator, i) for i, a in enumerate(actors)])
    if set(used) != {transport}:
        raise RuntimeError(f"asked for transport {transport}, got {used}")
    yield actors
    for actor in [*actors, coordinator]:
        ray.kill(actor)


def exchange(settings: Settings) -> list[Row]:
    """The direct transport against gloo between plain processes."""
    with ExitStack() as stack:
        programs = distributed("plain", "exchange", str(ROWS), str(SIZE))
        plain = [stack.enter_context(program) for program in programs]
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
