"""Peers that learn together: in this process (`local`) or each in its own Ray actor (`remote`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the coordinator's process imports this package and has no need of numpy's kin
    import numpy as np

    from ray_dmml.checkpoint.store import PeerFiles

StepRow = dict[str, dict[str, float]]
"""Of one step: peer name to the terms of its loss."""


class Cohort(Protocol):
    """What the training loop needs; every implementation gives the same numbers."""

    names: tuple[str, ...]
    threads: tuple[int, ...]
    """torch threads of each peer: with the seed, what the bits of a result on a CPU depend on."""

    devices: tuple[str, ...]
    """Where each peer computes."""

    nodes: tuple[str, ...]
    """Address of the node of each peer; empty in this process."""

    transport: str
    """How embeddings travel: ``in-process``, ``direct``, ``coordinator``, or ``none`` for one peer."""

    waited: dict[str, float]
    """Seconds that each peer has waited for embeddings of others."""

    def run(self, start: int, stop: int, on_step: Callable[[int], None]) -> list[StepRow]:
        """Trains steps ``start .. stop - 1``; tells ``on_step`` how many steps are finished."""
        ...

    def embeddings(self, split: str, *, ema: bool = False) -> dict[str, np.ndarray]:
        """Embeddings of ``validation`` or ``test`` by each peer, (N, D) float32."""
        ...

    def state(self) -> dict[str, PeerFiles]:
        """The state of every peer, as a checkpoint stores it."""
        ...

    def load(self, state: Mapping[str, PeerFiles]) -> None:
        """Puts every peer where :meth:`state` found it."""
        ...

    def load_weights(self, state: Mapping[str, PeerFiles]) -> None:
        """Takes the nets' weights only; optimisers and averages start afresh."""
        ...

    def recover(self, *, drop: bool = False) -> None:
        """After a PeerLostError: puts new peers in the places of the lost ones, or goes on without
        them. All must be given a state next."""
        ...

    def close(self) -> None:
        """Frees processes and threads; twice is once."""
        ...
