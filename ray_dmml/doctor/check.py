"""What one check of the machine has found, and how amounts are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

GIB = 2**30

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check."""

    name: str
    state: State
    """``note``: it limits a run here, or makes it slower. ``problem``: it would make a run fail."""

    message: str
    """What there is, in one line."""

    advice: str | None = None
    """What to do about a note or a problem."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    """The figures of the message, for programs."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def size(num_bytes: float) -> str:
    """An amount of memory or disk: ``512 MiB``, ``23.5 GiB``, ``140 GiB``."""
    gib = num_bytes / GIB
    if gib >= 100:
        return f"{gib:,.0f} GiB"
    return f"{gib:.1f} GiB" if gib >= 1 else f"{num_bytes / 2**20:.0f} MiB"


def counted(number: int, noun: str) -> str:
    """``1 core``, ``2 cores``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
