"""Searches and records of trials, shared by the tests of this folder."""

from __future__ import annotations

import json
from typing import Any

from ray_dmml.tune.results import SearchDir
from ray_dmml.tune.search_space import Search, SearchConfig
from ray_dmml.tune.trial import Trial

ANGLE = "loss.relational.angle_weight"


def make_search(raw: dict[str, Any], space: dict[str, Any] | None = None, **settings: Any) -> Search:
    """A search of the angle weight, or of another space, by two random trials."""
    config = {
        "space": space or {ANGLE: {"uniform": [0, 4]}},
        "num_samples": 2,
        "sampler": "random",
        "scheduler": "none",
        "final_seeds": 1,
        **settings,
    }
    return Search(raw, SearchConfig.model_validate(config))


def make_trial(number: int, objective: float | None, cost: float = 1.0, **changes: Any) -> Trial:
    """A finished trial with one report, or a trial without reports."""
    reports = [] if objective is None else [{"step": 5, "objective": objective, "cost": cost}]
    fields = {"params": {}, "finished": True, "number": number, **changes}
    return Trial(str(number), reports=reports, **fields)


def write_trial(files: SearchDir, trial: Trial) -> None:
    folder = files.trial_folder(trial.name)
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text(json.dumps(vars(trial)))
