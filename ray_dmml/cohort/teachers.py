"""Who learns from whom at a step: every peer from all others, or from a few that change at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_dmml.config.schema import Config
from ray_dmml.randomness import derive_seed


@dataclass(frozen=True)
class Teachers:
    """The teachers of every peer at every step; the same in every process.

    With ``max_teachers`` k below M - 1, the peers of a step form a ring in random order, and each
    learns from the k peers after it. So every peer also *teaches* exactly k peers, and what it sends,
    receives and computes does not grow with the cohort.
    """

    num_peers: int
    """M, the size of the cohort."""

    max_teachers: int | None = None
    """k; None: all others."""

    seed: int = 0
    """Seed of the run. It determines the rings."""

    @classmethod
    def of(cls, config: Config) -> Teachers:
        """The teachers of an experiment."""
        return cls(len(config.cohort.peers), config.cohort.max_teachers, config.seed)

    @property
    def all_others(self) -> bool:
        """Whether every peer learns from all others at every step."""
        return self.max_teachers is None or self.max_teachers >= self.num_peers - 1

    def at(self, step: int) -> list[tuple[int, ...]]:
        """Positions of the teachers of each peer, ascending, in peer order."""
        everyone = range(self.num_peers)
        if self.max_teachers is None or self.all_others:
            return [tuple(n for n in everyone if n != m) for m in everyone]
        generator = np.random.Generator(np.random.PCG64(derive_seed("teachers", self.seed, step)))
        ring = generator.permutation(self.num_peers).tolist()
        teachers: list[tuple[int, ...]] = [()] * self.num_peers
        for place, peer in enumerate(ring):
            after = [ring[(place + i + 1) % self.num_peers] for i in range(self.max_teachers)]
            teachers[peer] = tuple(sorted(after))
        return teachers

    def place(self, step: int, position: int) -> int:
        """How many of the teachers of the peer at ``position`` come before it."""
        return sum(teacher < position for teacher in self.at(step)[position])


def students(teachers: Sequence[Sequence[int]], position: int) -> list[int]:
    """Positions of the peers that learn from the one at ``position``, ascending."""
    return [student for student, taught_by in enumerate(teachers) if position in taught_by]
