"""Candidates for the settings of the arms, in stages that run one after the other.

A stage uses what the stages before it chose, as `arms.yaml` states it: `rate`, then weights and form in `weights`, or
else in `mutual`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from .arms import Arm, Arms

STAGES = {
    "rate": "learning rate, of peers that learn from labels alone",
    "weights": "weights (distance and angle) and form of relational distillation",
    "teachers": "teachers, number of peers M, and other mutual terms",
}

RELATIONAL, SIMILARITY, RELAXED = "loss.relational.", "loss.similarity.", "loss.relaxed_contrastive."


def candidates(weights: Mapping[str, Any], steps: int) -> dict[str, Arms]:
    """The candidates of each stage, by name."""
    alone = {"independent": Arm(), "independent + all": Arm(diverse=True)}
    rates = {
        f"{name}, {factor:g} x rate": Arm(arm.diverse, rate=factor)
        for (name, arm), factor in product(alone.items(), (0.5, 1, 2))
    }
    # Weights and form alone, so that the rows stay valid when more is chosen.
    chosen = {key: value for key, value in weights.items() if key.startswith(RELATIONAL)} | _relational(teacher="each")
    return {"rate": rates, "weights": {**alone, **_weights(steps)}, "teachers": {**alone, **_teachers(chosen)}}


def _weights(steps: int) -> Arms:
    arms = {}
    for weight, normalize, until in product((0.5, 1, 2, 4, 8, 16), (False, True), (None, steps)):
        form = "unit length" if normalize else "raw"
        name = f"{form}, weights {weight:g} and {2 * weight:g}{', falling' if until else ''}"
        settings = _relational(distance_weight=weight, angle_weight=2 * weight, normalize=normalize, decay_until=until)
        arms[name] = Arm(True, settings)
    return arms


def _teachers(chosen: Mapping[str, Any]) -> Arms:
    arms = {f"independent + all, M = {num}": Arm(True, num_peers=num) for num in (3, 4)}
    for num, teacher in product((2, 3, 4), ("each", "ensemble")):
        arms[f"teacher {teacher}, M = {num}"] = Arm(True, {**chosen, **_relational(teacher=teacher)}, num)
    for weight in (0.05, 0.2):
        similarity = {f"{SIMILARITY}weight": weight, f"{SIMILARITY}temperature": 0.1}
        arms[f"relational + similarity {weight}"] = Arm(True, {**chosen, **similarity})
    relaxed = {f"{RELAXED}sigma": 1, f"{RELAXED}delta": 1}
    for weight in (0.3, 1):
        arms[f"relaxed contrastive {weight} alone"] = Arm(True, {**relaxed, f"{RELAXED}weight": weight})
    arms["relational + relaxed contrastive 0.3"] = Arm(True, {**chosen, **relaxed, f"{RELAXED}weight": 0.3})
    return arms


def _relational(**settings: Any) -> dict[str, Any]:
    return {f"{RELATIONAL}{key}": value for key, value in settings.items()}
