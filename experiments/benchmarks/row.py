"""What every row of the benchmark is made of: A and B measured in turn, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Settings:
    """What the command line says to every row."""

    rounds: int
    """How often A and B are measured, in turn."""

    data_root: Path | None = None
    """A folder of images, one folder a class, for the rows that train; None: they make their own."""


@dataclass(frozen=True)
class Goal:
    """What a row has to reach."""

    of: Literal["A/B", "B/A", "A"]
    """The quantity; ``A`` is an absolute figure, and B stands beside it."""

    sense: Literal["<=", ">="]
    bound: float

    def __str__(self) -> str:
        return f"{self.of} {self.sense} {self.bound:g}"

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.sense == "<=" else value >= self.bound


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    what: str
    unit: str
    a: list[float]
    """One figure a round."""

    b: list[float]
    """Likewise; empty where A stands alone."""

    goal: Goal
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """Further figures, for the JSON."""

    @property
    def ratios(self) -> list[float]:
        """Of each round: A/B, or B/A where the goal is of that."""
        pairs = zip(self.a, self.b, strict=True) if self.b else ()
        return [b / a if self.goal.of == "B/A" else a / b for a, b in pairs]

    @property
    def spread(self) -> tuple[float, float] | None:
        """First and third quartile of the rounds' ratios."""
        return tuple(np.percentile(self.ratios, [25, 75]).tolist()) if self.ratios else None

    @property
    def met(self) -> bool:
        return self.goal.is_met(median(self.a if self.goal.of == "A" else self.ratios))

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "a": median(self.a),
            "b": median(self.b) if self.b else None,
            "ratio": median(self.ratios) if self.ratios else None,
            "spread": self.spread,
            "goal": str(self.goal),
            "met": self.met,
            "notes": self.notes,
            "details": self.details,
            "rounds": {"a": self.a, "b": self.b},
        }


def in_turn(
    rounds: int, a: Callable[[], float], b: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Measures A and B in every round; which goes first changes, so that drift favours neither."""
    found_a, found_b = [], []
    for number in range(rounds):
        if number % 2 == 0:
            found_a.append(a())
            found_b.append(b())
        else:
            found_b.append(b())
            found_a.append(a())
    return found_a, found_b


def require(holds: bool, claim: str) -> None:
    """A comparison means nothing unless both sides give the same answer.

    Raises:
        RuntimeError: the claim does not hold.
    """
    if not holds:
        raise RuntimeError(f"not true here: {claim}")
