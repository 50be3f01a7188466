"""Candidates for the settings of the arms, in stages that run one after the other.

A stage uses what the stages before it chose, as `arms.yaml` states it: `rate`, then weights and form in `mutual`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arms import ALONE, Arm, Arms

STAGES = ("rate", "weights", "teachers")

RELATIONAL, DECAY = "loss.relational.", "loss.relational.decay_until"


def candidates(mutual: Mapping[str, Any], steps: int) -> dict[str, Arms]:
    """The candidates of each stage, by name."""
    # The search of weights and form does not depend on what was chosen, so its rows stay valid.
    chosen = {key: value for key, value in mutual.items() if key in ALONE or key == DECAY}
    alone = {"independent": Arm(), "independent + all": Arm(diverse=True)}
    return {
        "rate": {
            f"{name}, {factor:g} x rate": Arm(arm.diverse, rate=factor)
            for name, arm in alone.items()
            for factor in (0.5, 1, 2)
        },
        "weights": {**alone, **_weights(steps)},
        "teachers": {**alone, **_teachers(chosen)},
    }


def _weights(steps: int) -> Arms:
    arms = {}
    for weight in (1, 2, 4, 8, 16):
        for normalize in (False, True):
            for until in (None, steps):
                form, falling = "unit length" if normalize else "raw", ", falling" if until else ""
                arms[f"{form}, weights {weight} and {2 * weight}{falling}"] = Arm(
                    True,
                    _relational(distance_weight=weight, angle_weight=2 * weight, normalize=normalize)
                    | ({DECAY: until} if until else {}),
                )
    return arms


def _teachers(chosen: Mapping[str, Any]) -> Arms:
    arms = {f"independent + all, M = {num}": Arm(True, num_peers=num) for num in (3, 4)}
    for num in (2, 3, 4):
        for teacher in ("each", "ensemble"):
            arms[f"teacher: {teacher}, M = {num}"] = Arm(True, {**chosen, **_relational(teacher=teacher)}, num)
    for weight in (0.05, 0.2):
        similarity = {"loss.similarity.weight": weight, "loss.similarity.temperature": 0.1}
        arms[f"relational + similarity {weight}"] = Arm(True, {**chosen, **similarity})
    for weight in (0.3, 1):
        arms[f"relaxed contrastive {weight} alone"] = Arm(True, {"loss.relaxed_contrastive.weight": weight})
    arms["relational + relaxed contrastive 0.3"] = Arm(True, {**chosen, "loss.relaxed_contrastive.weight": 0.3})
    return arms


def _relational(**settings: Any) -> dict[str, Any]:
    return {f"{RELATIONAL}{key}": value for key, value in settings.items()}
