"""The coordinator: exchanges batch embeddings among the peers and knows nothing of networks.

Everything it does is one primitive, a gathering: each peer puts a value under a key and gets the
list of all values, in peer order, once the last one has come. A deadline turns a silent peer into
an error that names it. Its process loads neither torch nor Ray's libraries: it holds arrays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_dmml.errors import PeerLostError


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
    """The torch.distributed group the coordinator has formed; a peer's rank is its position."""

    backend: str
    store: tuple[str, int]


class Coordinator:
    """An asynchronous actor's class; also an ordinary one, for use without Ray.

    Args:
        names: of the peers, in peer order.
        exchange_timeout_s: seconds that a peer's embeddings wait for those of the others.
        start_timeout_s: the same for what peers need from each other before the first step, when
            some may still be fetching their weights.
    """

    def __init__(
        self, names: Sequence[str], exchange_timeout_s: float, start_timeout_s: float
    ) -> None:
        self._names = tuple(names)
        self._exchange_timeout_s, self._start_timeout_s = exchange_timeout_s, start_timeout_s
        self._gatherings: dict[str, _Gathering] = {}
        self._finished = [0] * len(self._names)

    async def exchange(
        self, step: int, position: int, teachers: Sequence[int], *parts: np.ndarray
    ) -> Any:
        """Takes a peer's (B, D) float32 embeddings of a step, gives those of its teachers.

        Args:
            teachers: positions of the peers it learns from at this step.
            parts: the rows of the embeddings in one or more blocks, which are handed on as they
                come: what is below Ray's limit travels inside the call.

        Returns:
            the blocks of all its teachers, one after the other; a single one by itself, as Ray
            wants it.

        Raises:
            PeerLostError: some peers sent none in time; they are named.
        """
        what = f"exchange of step {step + 1}"
        everyone = await self._gather(what, position, parts, self._exchange_timeout_s)
        found = [part for teacher in teachers for part in everyone[teacher]]
        return found[0] if len(found) == 1 else found

    async def form_group(self, position: int, offer: Offer) -> Group | None:
        """The rendezvous of the direct transport: every peer offers, all get the same group, or
        None where the first peer has no store to meet at.

        NCCL takes one rank a GPU, so it is used only where every peer has a GPU of its own;
        fractional and mixed cohorts use gloo.
        """
        offers: list[Offer] = await self._gather(
            "forming of the group", position, offer, self._start_timeout_s
        )
        devices = [each.device for each in offers]
        own_gpus = "cpu" not in devices and len(set(devices)) == len(devices)
        store = offers[0].store
        if store is None:
            return None
        return Group(backend="nccl" if own_gpus else "gloo", store=store)

    async def all_agree(self, position: int, agreed: bool) -> bool:
        """Whether every peer says yes: so that all use the group, or none does."""
        what = "agreement on the group"
        return all(await self._gather(what, position, agreed, self._start_timeout_s))

    async def report(self, position: int, finished: int) -> None:
        """A peer says how many steps it has finished."""
        self._finished[position] = finished

    async def progress(self) -> dict[str, int]:
        """Finished steps of each peer, by name."""
        return dict(zip(self._names, self._finished, strict=True))

    async def _gather(self, what: str, position: int, value: Any, timeout_s: float) -> list[Any]:
        gathering = self._gatherings.setdefault(what, _Gathering())
        gathering.values[position] = value
        if len(gathering.values) == len(self._names):
            gathering.complete.set()
        try:
            await asyncio.wait_for(gathering.complete.wait(), timeout_s)
        except TimeoutError:
            silent = [n for i, n in enumerate(self._names) if i not in gathering.values]
            raise PeerLostError(
                f"{', '.join(silent)}: nothing came for the {what} within {timeout_s:g} s "
                "(cohort.exchange_timeout_s, cohort.start_timeout_s)"
            ) from None
        gathering.num_taken += 1
        if gathering.num_taken == len(self._names):
            del self._gatherings[what]
        return [gathering.values[i] for i in range(len(self._names))]
