"""The experiment on distillation: what it chooses and prints, and that finished runs are never run again."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from conftest import EXPERIMENTS, Refused, tiny

from ray_dmml import Config


@pytest.fixture
def distillation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command's module."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import distillation

    return distillation


def row(arm: str, seed: int, split: str = "validation", **figures: Any) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "split": split, **figures}


def recall(value: float) -> dict[str, float]:
    return {"recall@1": value, "map@r": value / 2}


def test_the_table_and_the_choice(distillation: ModuleType) -> None:
    """Means over seeds in percent. The share is 0 at the twin alone and 1 at the ensemble of the peers. Only validation
    classes choose, and only when all candidates have all seeds."""
    rows = []
    for seed, shift in enumerate((-0.01, 0.01)):
        peers = [recall(0.68 + shift), recall(0.72 + shift)]
        rows.append(row("cohort", seed, peers=peers, ensemble=recall(0.8 + shift)))
        for arm in distillation.STUDENTS:
            value = {"alone": 0.7, "(4, 8), own": 0.75}.get(arm, 0.72)
            rows.append(row(arm, seed, student=recall(value + shift)))
        rows.append(row("(1, 2), own", seed, "test", student=recall(0.9)))
    lines = list(distillation.table(rows, "validation"))
    assert "| peers, mean | 70.0 | 35.0 |  | 69.0, 71.0 |" in lines
    assert "| ensemble of the peers | 80.0 | 40.0 |  | 79.0, 81.0 |" in lines
    assert "| student alone | 70.0 | 35.0 | 0.00 | 69.0, 71.0 |" in lines
    assert "| student (4, 8), own | 75.0 | 37.5 | 0.50 | 74.0, 76.0 |" in lines
    assert distillation.best_candidate(rows, 2) == "(4, 8), own"
    with pytest.raises(distillation.UserError, match=r"\(1, 2\), own; .* have not been run with 3 seeds"):
        distillation.best_candidate(rows, 3)


def test_the_config_of_the_experiment(distillation: ModuleType) -> None:
    """Two peers with all diversities; rows follow every setting, and not where the images are."""
    base = Config.load(EXPERIMENTS / "distillation/config.yaml", ["data.root=somewhere"])
    assert [(peer.view, peer.update_interval) for peer in base.cohort.peers] == [("standard", 1), ("weak", 2)]
    moved, longer = base.with_overrides({"data.root": "x"}), base.with_overrides({"train.steps": 9})
    digests = [
        [distillation.Plan(each, "resnet18", Path("work")).digest(arm) for arm in ("cohort", *distillation.STUDENTS)]
        for each in (base, moved, longer)
    ]
    assert digests[0] == digests[1] and len({*digests[0], *digests[2]}) == 2 * len(digests[0])


@pytest.mark.slow
def test_finished_runs_are_kept(
    distillation: ModuleType,
    private_ray: None,
    noisy_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
) -> None:
    """A second command runs nothing; `--test` runs the chosen student and its twin again, on test classes."""
    names = ("alone", "(4, 8), evaluation", "(4, 8), student")
    monkeypatch.setattr(distillation, "STUDENTS", {name: distillation.STUDENTS[name] for name in names})
    monkeypatch.setattr(distillation, "CANDIDATES", list(names[1:]))
    raw = tiny(noisy_folder, train={"steps": 2})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))

    def run(**options: Any) -> list[dict[str, Any]]:
        given = {"settings": [], "test": False, "seeds": 1, "workers": 1, "report": False, **options}
        distillation.main(tmp_path, student="test_resnet", work=tmp_path / "work", **given)
        return [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]

    with refused("have not been run with 1 seeds"):
        run(test=True)
    rows = run()
    assert [(row["arm"], row["split"]) for row in rows] == [(arm, "validation") for arm in ("cohort", *names)]
    assert run() == rows
    rows = run(test=True)
    assert [row["arm"] for row in rows if row["split"] == "test"][:2] == ["cohort", "alone"] and len(rows) == 7
    assert run(report=True) == rows == run(test=True)
    with refused("rows of other settings"):
        run(settings=["train.steps=3"])
