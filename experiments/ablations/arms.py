"""The arms of an ablation: the same images, batches and steps, with and without diversities and mutual learning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALONE: Mapping[str, Any] = {
    "loss.relational.distance_weight": 0,
    "loss.relational.angle_weight": 0,
    "loss.relational.normalize": False,
    "loss.relational.warmup_steps": 0,
    "loss.relational.decay_until": None,
    "loss.relational.teacher": "each",
    "loss.similarity.weight": 0,
    "loss.relaxed_contrastive.weight": 0,
}
"""The mutual terms of peers that learn from labels alone. Each arm states all of them, so that a default that changes
later does not change what a row means."""


@dataclass(frozen=True)
class Arm:
    """One arm, or one candidate for the settings of an arm."""

    diverse: bool = False
    """Peers have all diversities. Without it they are equal, and only what is random in their views differs."""

    mutual: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the mutual terms. Empty: each peer learns from labels alone."""

    num_peers: int = 2
    rate: float | None = None
    """Factor on all learning rates. None: that of `arms.yaml`."""


Arms = Mapping[str, Arm]
"""Arms by name."""


def final_arms(mutual: Mapping[str, Any]) -> Arms:
    """The arms that are evaluated on test classes."""
    return {
        "independent": Arm(),
        "independent + all": Arm(diverse=True),
        "mutual + all": Arm(diverse=True, mutual=mutual),
    }
