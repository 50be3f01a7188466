"""Who learns from whom at a step: everybody from all others, or from a few drawn anew each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_dmml.config.schema import Config
from ray_dmml.randomness import derive_seed


@dataclass(frozen=True)
class Teachers:
    """The teachers of every peer at every step; the same in every process.

    With ``at_most`` k below M - 1, the peers of a step are put in a ring in random order and each
    learns from the k after it: so every peer also *teaches* exactly k, and what a peer sends,
    receives and computes does not grow with the cohort.
    """

    num_peers: int
    """M."""

    at_most: int | None = None
    """k; None: all others."""

    seed: int = 0
    """Of the run: draws the rings."""

    @classmethod
    def of(cls, config: Config) -> Teachers:
        """Those of an experiment."""
        return cls(len(config.cohort.peers), config.cohort.max_teachers, config.seed)

    @property
    def all_others(self) -> bool:
        """Whether everybody always learns from everybody."""
        return self.at_most is None or self.at_most >= self.num_peers - 1

    def at(self, step: int) -> list[tuple[int, ...]]:
        """Of each peer, in peer order, the positions of its teachers, ascending."""
        everyone = range(self.num_peers)
        if self.at_most is None or self.all_others:
            return [tuple(n for n in everyone if n != m) for m in everyone]
        generator = np.random.Generator(np.random.PCG64(derive_seed("teachers", self.seed, step)))
        ring = generator.permutation(self.num_peers).tolist()
        found: list[tuple[int, ...]] = [()] * self.num_peers
        for place, peer in enumerate(ring):
            after = [ring[(place + i + 1) % self.num_peers] for i in range(self.at_most)]
            found[peer] = tuple(sorted(after))
        return found


def students(teachers: Sequence[Sequence[int]], position: int) -> list[int]:
    """Who learns from a peer, ascending."""
    return [student for student, taught_by in enumerate(teachers) if position in taught_by]
