"""A row of the benchmark: A and B are measured in turn, and compared with a goal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Settings:
    """The settings of the command line that rows need."""

    rounds: int
    """How often A and B are measured, in turn."""

    data_root: Path | None = None
    """Images to train on, one folder a class. None: the rows that train make their own."""


@dataclass(frozen=True)
class Goal:
    """What a row has to reach."""

    of: Literal["A/B", "B/A", "A"]
    """``A`` is an absolute figure; B then only stands beside it."""

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
    """One figure a round; empty where A has no competitor."""

    goal: Goal
    details: dict[str, Any] = field(default_factory=dict)
    """Further figures, for the JSON file."""

    @property
    def ratios(self) -> list[float]:
        """One ratio a round: B/A where the goal is of B/A, else A/B."""
        pairs = zip(self.a, self.b, strict=True) if self.b else ()
        return [b / a if self.goal.of == "B/A" else a / b for a, b in pairs]

    @property
    def spread(self) -> tuple[float, float] | None:
        """First and third quartile of the ratios."""
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
            "details": self.details,
            "rounds": {"a": self.a, "b": self.b},
        }


def in_turn(rounds: int, a: Callable[[], float], b: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Measures A and B in every round. They take turns at going first, so that drift favours neither."""
    figures_a, figures_b = [], []
    for number in range(rounds):
        if number % 2 == 0:
            figures_a.append(a())
            figures_b.append(b())
        else:
            figures_b.append(b())
            figures_a.append(a())
    return figures_a, figures_b


def require(holds: bool, claim: str) -> None:
    """A comparison of speed means nothing unless both sides give the same answer.

    Raises:
        RuntimeError: the claim does not hold.
    """
    if not holds:
        raise RuntimeError(f"not true here: {claim}")
