"""The coordinator as an ordinary object, and the choice of a backend."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from ray_dmml.ray_backend.coordinator import Coordinator
from ray_dmml.ray_backend.rendezvous import backend_for

NAMES = ("a", "b", "c")
OTHERS = {0: (1, 2), 1: (0, 2), 2: (0, 1)}


async def both(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


def test_everyone_gets_the_others_in_peer_order() -> None:
    """Whatever the order of arrival; peers may differ in D; steps may overlap."""

    async def scenario() -> None:
        coordinator = Coordinator(NAMES)
        sent = {(s, p): np.full((2, p + 1), 10 * s + p) for s in (0, 1) for p in range(3)}
        order = [(0, 2), (0, 0), (1, 2), (1, 0), (0, 1), (1, 1)]
        calls = [coordinator.exchange(step, peer, OTHERS[peer], peer + 7, sent[step, peer]) for step, peer in order]
        for (step, peer), (checksums, *others) in zip(order, await both(*calls), strict=True):
            assert checksums == [other + 7 for other in OTHERS[peer]]
            expected = [sent[step, other] for other in range(3) if other != peer]
            assert [other.tolist() for other in others] == [e.tolist() for e in expected]

    asyncio.run(scenario())


def test_some_teachers_in_several_blocks() -> None:
    """A peer gets the checksums and the blocks of its teachers only."""

    async def scenario() -> None:
        coordinator = Coordinator(NAMES)
        blocks = {p: [np.full((1, 2), 10 * p + i) for i in range(p + 1)] for p in range(3)}
        got = await both(
            coordinator.exchange(0, 0, (2,), 0, *blocks[0]),
            coordinator.exchange(0, 1, (0,), 1, *blocks[1]),
            coordinator.exchange(0, 2, (0, 1), 2, *blocks[2]),
        )
        assert [checksums for checksums, *_ in got] == [[2], [0], [0, 1]]
        assert [b is sent for b, sent in zip(got[0][1:], blocks[2], strict=True)] == [True] * 3
        assert [block.tolist() for block in got[1][1:]] == [[[0, 0]]]
        assert [block.tolist() for block in got[2][1:]] == [[[0, 0]], [[10, 10]], [[11, 11]]]

    asyncio.run(scenario())


def test_nobody_goes_on_before_the_last_has_come() -> None:
    """Two of three wait; the third lets all go."""

    async def scenario() -> None:
        coordinator = Coordinator(NAMES)
        early = [
            asyncio.create_task(coordinator.exchange(4, peer, OTHERS[peer], 0, np.zeros((1, 1)))) for peer in (0, 1)
        ]
        for _ in range(20):
            await asyncio.sleep(0)
        assert not any(task.done() for task in early)
        await coordinator.exchange(4, 2, OTHERS[2], 0, np.ones((1, 1)))
        assert [len(got) for got in await asyncio.gather(*early)] == [3, 3]

    asyncio.run(scenario())


def test_finished_exchanges_are_forgotten() -> None:
    """A long run keeps no old embeddings in memory."""
    coordinator = Coordinator(NAMES)

    sent: list[weakref.ref[np.ndarray]] = []

    def embeddings() -> np.ndarray:
        array = np.zeros((1, 1), np.float32)
        sent.append(weakref.ref(array))
        return array

    async def scenario() -> None:
        for step in range(5):
            await asyncio.gather(*(coordinator.exchange(step, n, OTHERS[n], 0, embeddings()) for n in range(3)))

    asyncio.run(scenario())
    gc.collect()
    assert len(sent) == 15
    assert [array() for array in sent] == [None] * 15


@pytest.mark.parametrize(
    ("devices", "backend"),
    [
        (["gpu-1", "gpu-2", "gpu-3"], "nccl"),
        (["gpu-1", "gpu-2", "gpu-1"], "gloo"),
        (["gpu-1", "cpu", "gpu-2"], "gloo"),
        (["cpu", "cpu", "cpu"], "gloo"),
    ],
)
def test_nccl_only_where_every_peer_has_its_own_gpu(devices: list[str], backend: str) -> None:
    """NCCL refuses two ranks on one GPU. Shared and mixed cohorts use gloo."""
    assert backend_for(devices) == backend


def test_statuses_are_the_latest_of_each_peer() -> None:
    """By name, none before the first."""

    async def scenario() -> dict[str, tuple[int, int]]:
        coordinator = Coordinator(NAMES)
        await coordinator.report(2, 5, 0)
        await coordinator.report(0, 3, 1)
        await coordinator.report(2, 6, 4)
        await coordinator.heartbeat(1)
        statuses = await coordinator.statuses()
        assert all(0 <= status.silent_s < 60 for status in statuses.values())
        return {name: (s.num_sent, s.num_chunks) for name, s in statuses.items()}

    assert asyncio.run(scenario()) == {"a": (3, 1), "b": (0, 0), "c": (6, 4)}
