"""The coordinator: exchanges batch embeddings among the peers and knows nothing of networks.

Everything it does is one primitive, a gathering: each peer puts a value under a key and gets the
list of all values, in peer order, once the last one has come. Its process loads neither torch nor
Ray's libraries: it holds arrays.

A coordinator serves one *generation* of the cohort. Where a peer is lost, the driver ends the
coordinator and starts another for the peers of the next generation: who waits in the old one is
woken by its end, and a late message of an old generation reaches nobody. The deadline of a silent
peer is the driver's, too, as it alone can do something about it.
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
    """Host and port of the TCP store that the first peer has opened; None from the others, or
    where it could open none."""


@dataclass(frozen=True)
class Group:
    """The torch.distributed group the coordinator has formed; a peer's rank in it is that of the generation."""

    backend: str
    store: tuple[str, int]


@dataclass(frozen=True)
class PeerStatus:
    """What is known of a peer."""

    sent: int
    """Of so many steps it has sent its embeddings."""

    chunks: int
    """So many chunks of images it has embedded in evaluations."""

    silent_s: float
    """Seconds since its process last gave a sign of life; 0 until it has given the first."""


class Coordinator:
    """An asynchronous actor's class; also an ordinary one, for use without Ray.

    Args:
        names: of the peers of this generation, in peer order; a peer's rank is its place here.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._gatherings: dict[str, _Gathering] = {}
        self._progress = [(0, 0)] * len(self._names)
        self._beats: list[float | None] = [None] * len(self._names)

    async def exchange(
        self, step: int, rank: int, teachers: Sequence[int], checksum: int, *parts: np.ndarray
    ) -> list[Any]:
        """Takes a peer's (B, D) float32 embeddings of a step, gives those of its teachers.

        Args:
            teachers: ranks of the peers it learns from at this step.
            checksum: of its embeddings, for the others to compare with what reaches them.
            parts: the rows of the embeddings in one or more blocks, which are handed on as they
                come: what is below Ray's limit travels inside the call.

        Returns:
            the checksums of all its teachers, then their blocks, one after the other.
        """
        everyone = await self._gather(f"exchange {step}", rank, (checksum, parts))
        checksums = [everyone[teacher][0] for teacher in teachers]
        return [checksums, *(part for teacher in teachers for part in everyone[teacher][1])]

    async def form_group(self, rank: int, offer: Offer) -> Group | None:
        """The rendezvous of the direct transport: every peer offers, all get the same group, or
        None where the first peer has no store to meet at.

        NCCL takes one rank a GPU, so it is used only where every peer has a GPU of its own;
        fractional and mixed cohorts use gloo.
        """
        offers: list[Offer] = await self._gather("form_group", rank, offer)
        devices = [each.device for each in offers]
        own_gpus = "cpu" not in devices and len(set(devices)) == len(devices)
        store = offers[0].store
        if store is None:
            return None
        return Group(backend="nccl" if own_gpus else "gloo", store=store)

    async def all_agree(self, rank: int, agreed: bool) -> bool:
        """Whether every peer says yes: so that all use the group, or none does."""
        return all(await self._gather("all_agree", rank, agreed))

    async def report(self, rank: int, sent: int, chunks: int) -> None:
        """Progress: of how many steps a peer has sent its embeddings, and how many chunks of images it
        has embedded in evaluations."""
        self._progress[rank] = (sent, chunks)

    async def beat(self, rank: int) -> None:
        """A sign of life, which a peer gives about once a second whatever it is at."""
        self._beats[rank] = time.monotonic()

    async def signs(self) -> dict[str, PeerStatus]:
        """The last of each peer, by name."""
        now = time.monotonic()
        return {
            name: PeerStatus(sent, chunks, 0.0 if beat is None else now - beat)
            for name, (sent, chunks), beat in zip(
                self._names, self._progress, self._beats, strict=True
            )
        }

    async def _gather(self, what: str, rank: int, value: Any) -> list[Any]:
        gathering = self._gatherings.setdefault(what, _Gathering())
        gathering.values[rank] = value
        if len(gathering.values) == len(self._names):
            gathering.complete.set()
        await gathering.complete.wait()
        gathering.num_taken += 1
        if gathering.num_taken == len(self._names):
            del self._gatherings[what]
        return [gathering.values[i] for i in range(len(self._names))]
