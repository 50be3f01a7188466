"""The final runs of the best trial and of the baseline, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny
from tune_helpers import ANGLE, make_search

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.tune.final_runs import final_runs
from ray_dmml.tune.results import SearchDir
from ray_dmml.tune.trial import Trial


@pytest.fixture
def raw(image_folder: Path) -> dict[str, Any]:
    return tiny(image_folder, train={"steps": 4, "evaluate_every": 2})


def ended(name: str, angle: float, **fields: Any) -> Trial:
    report = {"step": 4, "objective": angle / 10, "cost": 1.0}
    return Trial(name, {ANGLE: angle}, [report], **{"finished": True, **fields})


def test_the_best_trial_and_the_baseline_are_trained_on_all_training_classes(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    """With each seed, and evaluated on the test classes. Finished runs are read, not trained again."""
    raw["checkpoint"] = {"storage_path": str(tmp_path / "of one run")}
    search, files = make_search(raw, final_seeds=2), SearchDir(tmp_path)
    first, best = ended("a", 2.0, is_baseline=True), ended("b", 3.0, number=1)
    final = final_runs(files, search, best, [first, best], local=True)
    assert final["best"]["params"] == {ANGLE: 3.0} and final["baseline"]["params"] == {ANGLE: 2.0}
    assert [final[name]["validation"] for name in ("best", "baseline")] == [0.3, 0.2]
    for name, folder in (("best", "b"), ("baseline", "baseline")):
        assert [run["seed"] for run in final[name]["test"]] == [0, 1]
        for run in final[name]["test"]:
            results_file = tmp_path / "final" / f"{folder}-seed{run['seed']}" / "results.json"
            results = json.loads(results_file.read_text())
            assert (results["split"], results["weights"]) == ("test", "last")
            assert run["ensemble"] == results["ensemble"]
            config = Config.load(results_file.parent / "config.yaml")
            assert not config.data.validation_fraction and config.seed == run["seed"]
    assert not (tmp_path / "of one run").exists()
    files_before = sorted(tmp_path.rglob("*"))
    assert final_runs(files, search, best, [first, best], local=True) == final
    assert sorted(tmp_path.rglob("*")) == files_before


def test_a_baseline_that_did_not_finish_has_no_validation_metric(raw: dict[str, Any], tmp_path: Path) -> None:
    """The metric of an earlier step would not compare with the best trial's."""
    search, files, best = make_search(raw, final_seeds=0), SearchDir(tmp_path), ended("b", 3.0)
    for finished, expected in ((True, 0.2), (False, None)):
        first = ended("a", 2.0, is_baseline=True, finished=finished)
        final = final_runs(files, search, best, [first, best], local=True)
        assert final["baseline"] == {"params": {ANGLE: 2.0}, "validation": expected, "test": []}


def test_a_final_run_that_fails_stops_no_other(
    raw: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its seed and its error are kept and logged. If all fail, the search fails."""
    search, files = make_search(raw, final_seeds=2), SearchDir(tmp_path)
    best = ended("a", 2.0, is_baseline=True)

    def damage(seed: int) -> None:
        (tmp_path / f"final/baseline-seed{seed}").mkdir(parents=True)
        (tmp_path / f"final/baseline-seed{seed}/config.yaml").write_text("train: {stesp: 4}")

    damage(1)
    final = final_runs(files, search, best, [best], local=True)
    first, second = final["best"]["test"]
    assert first["ensemble"]["recall@1"] >= 0 and second["seed"] == 1
    assert "stesp" in second["error"] and final["baseline"] == final["best"]
    assert "final run: best, seed 1 failed" in caplog.text

    shutil.rmtree(tmp_path / "final/baseline-seed0")
    damage(0)
    with pytest.raises(UserError, match="stesp"):
        final_runs(files, search, best, [best], local=True)


def test_without_test_classes_there_are_no_final_runs(raw: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is trained: nothing could be compared."""
    search, files, best = make_search(raw, final_seeds=2), SearchDir(tmp_path), ended("b", 3.0)
    final = final_runs(files, search, best, [best], has_test_classes=False, local=True)
    assert [final[name]["test"] for name in ("best", "baseline")] == [[], []]
    assert final["best"]["params"] == {ANGLE: 3.0} and not list(tmp_path.iterdir())
