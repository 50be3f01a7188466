"""The coordinator: exchanges batch embeddings among the peers and knows nothing of networks.

Everything it does is one primitive: each peer puts a value under a key and gets the list of all values, in
peer order, once the last one is there. Its process imports neither torch nor Ray's libraries.

A coordinator serves one *generation* of the cohort. After a peer is lost, the driver ends the coordinator
and starts another one for the next generation. That wakes the peers that wait in the old one, and a late
message of an old generation reaches nobody. Only the driver can do something about a silent peer, so the
deadlines are the driver's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class _Gathering:
    values: dict[int, Any] = field(default_factory=dict)
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    num_taken: int = 0


@dataclass(frozen=True)
class Offer:
    """What a peer can bring to a torch.distributed group."""

    device: str
    """``cpu``, or one string for each physical GPU."""

    store: tuple[str, int] | None
    """Host and port of the TCP store that the first peer has opened; None from the other peers, or if it
    could not open one."""


@dataclass(frozen=True)
class Group:
    """The torch.distributed group that the coordinator has formed. A peer's rank in it is its rank in the
    generation."""

    backend: str
    """``nccl`` or ``gloo``."""

    store: tuple[str, int]
    """Host and port of the store where the group meets."""


@dataclass(frozen=True)
class PeerStatus:
    """What is known of a peer."""

    num_sent: int
    """Number of steps whose embeddings it has sent."""

    num_chunks: int
    """Number of chunks of images that it has embedded in evaluations."""

    silent_s: float
    """Seconds since its last heartbeat; 0 before the first one."""


class Coordinator:
    """The class of an asynchronous actor; without Ray it is an ordinary class.

    Args:
        names: the peers of this generation in peer order. A peer's rank is its position.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._gatherings: dict[str, _Gathering] = {}
        self._progress = [(0, 0)] * len(self._names)
        self._heartbeats: list[float | None] = [None] * len(self._names)

    async def exchange(
        self, step: int, rank: int, teachers: Sequence[int], checksum: int, *parts: np.ndarray
    ) -> list[Any]:
        """Takes a peer's (B, D) float32 embeddings of a step and returns those of its teachers.

        Args:
            teachers: ranks of the peers that it learns from at this step.
            checksum: checksum of its embeddings, which the other peers compare with what they receive.
            parts: the rows of the embeddings in one or more blocks. They are handed on as they are; a block
                below Ray's limit travels inside the call.

        Returns:
            The list of its teachers' checksums, followed by their blocks.
        """
        everyone = await self._gather(f"exchange {step}", rank, (checksum, parts))
        checksums = [everyone[teacher][0] for teacher in teachers]
        return [checksums, *(part for teacher in teachers for part in everyone[teacher][1])]

    async def form_group(self, rank: int, offer: Offer) -> Group | None:
        """The rendezvous of the direct transport: every peer offers, and all get the same group.

        NCCL takes one rank a GPU. So it is used only if every peer has a GPU of its own; cohorts that share
        GPUs, or have peers on CPUs, use gloo.

        Returns:
            None if the first peer has no store where the group could meet.
        """
        offers: list[Offer] = await self._gather("form_group", rank, offer)
        devices = [each.device for each in offers]
        has_own_gpus = "cpu" not in devices and len(set(devices)) == len(devices)
        store = offers[0].store
        if store is None:
            return None
        return Group(backend="nccl" if has_own_gpus else "gloo", store=store)

    async def all_agree(self, rank: int, agreed: bool) -> bool:
        """Whether every peer agrees, so that all of them use the group or none does."""
        return all(await self._gather("all_agree", rank, agreed))

    async def report(self, rank: int, num_sent: int, num_chunks: int) -> None:
        """Takes the progress of a peer: steps sent, and chunks of images embedded in evaluations."""
        self._progress[rank] = (num_sent, num_chunks)

    async def heartbeat(self, rank: int) -> None:
        """Takes a sign of life. A peer sends one about every second, whatever it is doing."""
        self._heartbeats[rank] = time.monotonic()

    async def statuses(self) -> dict[str, PeerStatus]:
        """The latest status of each peer, by name."""
        now = time.monotonic()
        return {
            name: PeerStatus(num_sent, num_chunks, 0.0 if beat is None else now - beat)
            for name, (num_sent, num_chunks), beat in zip(self._names, self._progress, self._heartbeats, strict=True)
        }

    async def _gather(self, key: str, rank: int, value: Any) -> list[Any]:
        gathering = self._gatherings.setdefault(key, _Gathering())
        gathering.values[rank] = value
        if len(gathering.values) == len(self._names):
            gathering.complete.set()
        await gathering.complete.wait()
        gathering.num_taken += 1
        if gathering.num_taken == len(self._names):
            del self._gatherings[key]
        return [gathering.values[i] for i in range(len(self._names))]
