"""What the training loop needs of a cohort: peers in this process (:mod:`~ray_dmml.cohort.local`), or each
peer in a Ray actor (:mod:`~ray_dmml.ray_backend.ray_cohort`). Every implementation gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Protocol

from ray_dmml.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from ray_dmml.checkpoint.peer_files import PeerFiles
    from ray_dmml.config.schema import CohortConfig
    from ray_dmml.errors import PeerLostError

StepRow = dict[str, dict[str, float]]
"""One step: the name of each peer, and the terms of its loss by name."""


class Cohort(Protocol):
    """Peers that learn together."""

    names: tuple[str, ...]
    """The peers in peer order, without those that were dropped."""

    @property
    def threads(self) -> tuple[int, ...]:
        """torch threads of each peer. On a CPU the bits of a result depend on them and on the seed."""
        ...

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each peer."""
        ...

    @property
    def nodes(self) -> tuple[str, ...]:
        """Address of each peer's node; empty in this process."""
        ...

    @property
    def transport(self) -> str:
        """How embeddings travel: ``in-process``, ``direct``, ``coordinator``, or ``none`` for one peer."""
        ...

    seconds: dict[str, dict[str, float]]
    """Seconds that each peer has spent in each phase of its steps, see :mod:`~ray_dmml.cohort.phases`."""

    def run(self, start: int, stop: int, on_step: Callable[[int], None]) -> list[StepRow]:
        """Trains steps ``start .. stop - 1``; calls ``on_step`` with the number of steps that every peer has finished.

        Raises PeerLostError if a peer is gone; :meth:`recover` comes next.
        """
        ...

    def embeddings(self, split: str, *, ema: bool = False) -> dict[str, np.ndarray]:
        """(N, D) float32 embeddings of ``train``, ``validation`` or ``test`` by each peer."""
        ...

    def features(self, split: str, names: Collection[str]) -> dict[str, np.ndarray]:
        """(N, F) float32 pooled features of a split by the backbones of these peers, at unit length."""
        ...

    def save(self, folder: Path) -> dict[str, PeerFiles]:
        """Every peer writes its state into a new folder of its name in ``folder``, and waits until it is on the disk.

        Raises:
            OSError: a file cannot be written.
            PeerLostError: as :meth:`run`.
        """
        ...

    def load(self, state: Mapping[str, PeerFiles]) -> None:
        """Restores what :meth:`save` wrote: every peer reads its own files, and those of others are left alone.

        Raises:
            DamagedError: a file differs from what was written. The peers must be given a state next.
        """
        ...

    def load_weights(self, state: Mapping[str, PeerFiles]) -> None:
        """Does the same with the weights of the nets only; optimizers and counters stay as they were built."""
        ...

    def recover(self, failure: PeerLostError, *, drop: bool = False) -> None:
        """Starts new peers in the places of those that ``failure`` names, or goes on without them. All peers must be
        given a state next."""
        ...

    def close(self) -> None:
        """Frees processes and threads. A second call does nothing."""
        ...


CohortFactory = Callable[..., Cohort]
"""``factory(config, splits, initial_weights=True)`` builds a cohort; both cohort classes are one. False leaves the
initial weights unread, because a state is loaded next."""


def names_without(names: Collection[str], lost: Collection[str], config: CohortConfig) -> tuple[str, ...]:
    """The peers that go on. Raises UserError if none of them learns."""
    left = tuple(name for name in names if name not in lost)
    if not set(left) & set(config.learners):
        raise UserError(f"{', '.join(lost)}: lost, and no peer that learns is left to go on")
    return left
