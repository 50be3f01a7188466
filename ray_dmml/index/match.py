"""An image that was found. Programs that only show results import nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Match:
    """An image of the index that is similar to a query."""

    rank: int
    """From 1."""
    similarity: float
    path: str
    """Relative to the root of the index."""
    id: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
