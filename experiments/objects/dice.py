"""Random numbers."""

from __future__ import annotations

import numpy as np

from ray_dmml.randomness import derive_seed

from .vectors import Floats, Triple


class Dice:
    """Random numbers of a key, equal on all machines."""

    def __init__(self, *key: int | str) -> None:
        self._generator = np.random.Generator(np.random.PCG64(derive_seed("objects", *key)))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._generator.random())

    def below(self, number: int) -> int:
        return int(float(self._generator.random()) * number)

    def vector(self, x: float = 1.0, y: float = 1.0, z: float = 1.0) -> Triple:
        """The coordinates are at most so large, and of either sign."""
        return self.between(-x, x), self.between(-y, y), self.between(-z, z)

    def noise(self, *shape: int) -> Floats:
        """Nearly normal numbers with standard deviation 1."""
        four = self._generator.random((4, *shape)).astype(np.float32)
        return (four[0] + four[1] + four[2] + four[3] - np.float32(2)) * np.float32(1.732)

    def field(self, side: int, cells: int) -> Floats:
        """(side, side): random numbers from 0 to 1 at the corners of cells x cells squares, interpolated."""
        corners = self._generator.random((cells + 2, cells + 2)).astype(np.float32)
        at = np.arange(side, dtype=np.float32) * np.float32(cells / side)
        low = at.astype(int)
        share = at - low
        rows = corners[low] + (corners[low + 1] - corners[low]) * share[:, None]
        return rows[:, low] + (rows[:, low + 1] - rows[:, low]) * share
