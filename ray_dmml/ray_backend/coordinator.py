"""The coordinator: exchanges batch embeddings among the peers and knows nothing of networks.

A coordinator serves one *generation* of the cohort. After a peer is lost, the driver ends the coordinator and starts
another one for the next generation. That wakes the peers that wait in the old one, and a late message of an old
generation reaches nobody. Only the driver can do something about a silent peer, so the deadlines are the driver's.

The process of a coordinator imports neither torch nor Ray's libraries.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PeerStatus:
    """Progress and last heartbeat of a peer."""

    num_sent: int  # steps whose embeddings it has sent
    num_chunks: int  # chunks of images that it has embedded in evaluations
    silent_s: float  # since its last heartbeat; 0 before the first one


class Coordinator:
    """The class of an asynchronous actor; without Ray it is an ordinary class.

    Args:
        names: the peers of this generation in peer order. A peer's rank is its position.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._gatherings: dict[str, tuple[dict[int, Any], asyncio.Event]] = {}
        self._progress = [(0, 0)] * len(self._names)
        self._heartbeats: list[float | None] = [None] * len(self._names)

    async def exchange(
        self, step: int, rank: int, teachers: Sequence[int], checksum: int, *parts: np.ndarray
    ) -> list[Any]:
        """Takes a peer's (B, D) float32 embeddings of a step and returns those of its teachers.

        Args:
            teachers: ranks of the peers that it learns from at this step.
            checksum: checksum of the embeddings, for the peer's students.
            parts: the rows of the embeddings in one or more blocks.

        Returns:
            The list of its teachers' checksums, followed by their blocks.
        """
        everyone = await self.gather(f"exchange {step}", rank, (checksum, parts))
        checksums = [everyone[teacher][0] for teacher in teachers]
        return [checksums, *(part for teacher in teachers for part in everyone[teacher][1])]

    async def report(self, rank: int, num_sent: int, num_chunks: int) -> None:
        """Takes the progress of a peer: steps sent, and chunks of images embedded in evaluations."""
        self._progress[rank] = (num_sent, num_chunks)

    async def heartbeat(self, rank: int) -> None:
        """Takes a heartbeat. A peer sends one about every second, whatever it is doing."""
        self._heartbeats[rank] = time.monotonic()

    async def statuses(self) -> dict[str, PeerStatus]:
        """The latest status of each peer, by name."""
        now = time.monotonic()
        return {
            name: PeerStatus(num_sent, num_chunks, 0.0 if beat is None else now - beat)
            for name, (num_sent, num_chunks), beat in zip(self._names, self._progress, self._heartbeats, strict=True)
        }

    async def gather(self, key: str, rank: int, value: Any) -> list[Any]:
        """Returns the values of all peers in peer order, once the last one has brought its value."""
        values, complete = self._gatherings.setdefault(key, ({}, asyncio.Event()))
        values[rank] = value
        if len(values) == len(self._names):
            complete.set()
            del self._gatherings[key]  # those that wait keep the values
        await complete.wait()
        return [values[rank] for rank in range(len(self._names))]
