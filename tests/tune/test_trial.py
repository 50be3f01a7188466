"""One trial: its runs, its reports, and what it continues after it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
from conftest import as_in_training, tiny
from tune_helpers import ANGLE, make_search

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.training.run import train
from ray_dmml.tune.search_space import Search
from ray_dmml.tune.trial import Report, Trial, first_line, run_trial


@pytest.fixture
def raw(image_folder: Path) -> dict[str, Any]:
    return tiny(image_folder, train={"steps": 2, "evaluate_every": 1, "tensorboard": False})


def trained(search: Search, folder: Path) -> tuple[Trial, list[Report]]:
    """The record and the reports of the baseline, trained in this process."""
    reports: list[Report] = []
    run_trial(search.baseline, search, folder, reports.append, local=True)
    return Trial.load(folder / "trial.json"), reports


def test_a_trial_of_one_run_reports_at_each_evaluation(raw: dict[str, Any], tmp_path: Path) -> None:
    """On the validation classes. The report is on disk when the scheduler receives it."""
    trial, reports = trained(make_search(raw), tmp_path / "a")
    assert [report["step"] for report in reports] == [1, 2]
    assert all(set(report) == {"step", "objective", "cost"} for report in reports)
    assert trial.finished and trial.is_baseline and trial.starts == [0] and trial.name == "a"
    results = json.loads((tmp_path / "a" / "fold0-seed0" / "results.json").read_text())
    assert results["split"] == "validation"
    assert trial.objective == reports[-1]["objective"] == results["ensemble"]["recall@1"]
    assert trial.reports[-1]["figures"]["peers"] == as_in_training(results["peers"])


def test_the_objective_is_the_mean_over_folds_and_seeds(raw: dict[str, Any], tmp_path: Path) -> None:
    """Each fold holds out other classes, and each seed trains other weights. One report at the end."""
    trial, reports = trained(make_search(raw, folds=2, seeds=2), tmp_path / "a")
    values, maps, metrics = [], [], set()
    for fold in range(2):
        for seed in range(2):
            run = tmp_path / "a" / f"fold{fold}-seed{seed}"
            config = Config.load(run / "config.yaml")
            assert (config.data.validation_fold, config.seed) == (fold, seed)
            results = json.loads((run / "results.json").read_text())
            values.append(results["ensemble"]["recall@1"])
            maps.append(results["peers"]["peer0"]["map@r"])
            metrics.add((run / "metrics.jsonl").read_text())
    assert len(metrics) == 4
    (report,) = reports
    assert report["objective"] == trial.objective == pytest.approx(np.mean(values))
    assert trial.reports[-1]["objectives"] == values
    mean_map = trial.reports[-1]["figures"]["peers"]["peer0"]["map@r"]
    assert mean_map == pytest.approx(np.mean(maps))
    assert trial.finished and trial.finished_runs == 4 and trial.starts == [0] * 4


def test_frozen_peers_of_a_sampled_cohort_do_not_count(raw: dict[str, Any], tmp_path: Path) -> None:
    """They are frozen in this trial, and not in the config that the search starts from."""
    weights = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(timm.create_model("test_vit").state_dict(), weights)
    teacher = {"name": "peer1", "backbone": "test_vit", "weights": str(weights), "frozen": True}
    cohorts = [[{"name": "peer0"}, {"name": "peer1"}], [{"name": "peer0"}, teacher]]
    raw["cohort"]["peers"] = cohorts[0]
    search = make_search(raw, {"cohort.peers": {"choice": cohorts}}, objective="mean_peer")
    reports: list[Report] = []
    run_trial({"cohort.peers": json.dumps(cohorts[1])}, search, tmp_path / "a", reports.append, local=True)
    student = json.loads((tmp_path / "a" / "fold0-seed0" / "results.json").read_text())["peers"]["peer0"]
    assert reports[-1]["objective"] == student["recall@1"]
    assert Trial.load(tmp_path / "a" / "trial.json").reports[-1]["figures"]["peers"] == {
        "peer0": as_in_training(student)
    }
    file = next((tmp_path / "a").glob("fold0-seed0/checkpoints/step-*2/peer0/weights.safetensors"))
    assert reports[-1]["cost"] == pytest.approx(file.stat().st_size / 4e6)


def test_the_first_seed_is_the_run_of_a_trial_without_seeds(raw: dict[str, Any], tmp_path: Path) -> None:
    """And the second one is that of a config with the next seed."""
    several, _ = trained(make_search(raw, seeds=2), tmp_path / "several")
    first, _ = trained(make_search(raw), tmp_path / "first")
    second, _ = trained(make_search(raw | {"seed": 1}), tmp_path / "second")
    assert several.reports[-1]["objectives"] == [first.objective, second.objective]


def test_a_killed_trial_continues_with_the_run_it_stood_at(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its finished runs are not trained again, and the end is as if nothing had happened."""
    search, seeds = make_search(raw, seeds=3), list[int]()

    def killed_in_the_second(config: Config, *arguments: Any, **options: Any) -> None:
        seeds.append(config.seed)
        if len(seeds) == 2:
            config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 1})})
            train(config, *arguments, **options)
            (tmp_path / "a" / "fold0-seed1" / "results.json").unlink()
            raise KeyboardInterrupt
        train(config, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ray_dmml.tune.trial.train", killed_in_the_second)
        trained(search, tmp_path / "a")
    trial = Trial.load(tmp_path / "a" / "trial.json")
    assert (trial.status, trial.finished_runs, trial.starts) == ("training", 1, [0, 0])

    trial, reports = trained(search, tmp_path / "a")
    undisturbed, expected = trained(search, tmp_path / "b")
    assert trial.finished and trial.starts == [0, 0, 1, 0] and seeds == [0, 1]
    assert reports == expected and trial.reports == undisturbed.reports


def test_a_report_that_the_scheduler_never_received_is_repeated(raw: dict[str, Any], tmp_path: Path) -> None:
    """The process was killed within its last report: it trains no step again."""
    search = make_search(raw)
    before, reports = trained(search, tmp_path / "a")
    after, again = trained(search, tmp_path / "a")
    assert again == reports[-1:] and vars(after) == vars(before)
    # Or before the report was written, but after the run had ended.
    before.finished, before.reports = False, before.reports[:-1]
    before.save(tmp_path / "a" / "trial.json")
    after, again = trained(search, tmp_path / "a")
    assert again == reports[-1:] and after.starts == [0] and after.finished


def test_a_failed_trial_says_why(raw: dict[str, Any], tmp_path: Path) -> None:
    """Parameters that do not fit together fail the trial."""
    raw["cohort"]["peers"][1] = {"schedule": {"name": "step", "milestones": [2]}}
    space = {
        "cohort.peers": {"choice": [raw["cohort"]["peers"], [{}, {}]]},
        "cohort.peers.1.schedule.milestones.0": {"choice": [2, 3]},
    }
    params = {"cohort.peers": "[{}, {}]", "cohort.peers.1.schedule.milestones.0": "3"}
    with pytest.raises(UserError, match="milestones"):
        run_trial(params, make_search(raw, space), tmp_path / "a", print, local=True)
    trial = Trial.load(tmp_path / "a" / "trial.json")
    assert trial.status == "failed" and "milestones" in (trial.error or "")


def test_an_error_is_one_line() -> None:
    """So that results.csv has one line for each trial."""
    from ray.exceptions import OutOfMemoryError

    error = OutOfMemoryError("2 worker(s) were killed.\nOOM kill reason: ...\nTop 10 memory users:")
    assert first_line(error) == "OutOfMemoryError: 2 worker(s) were killed."
    assert first_line(ValueError()) == "ValueError"
    assert first_line(UserError("the view's size is wrong")) == "the view's size is wrong"


@pytest.mark.parametrize(("objective", "peers"), [("ensemble", 2), ("mean_peer", 1), ("best_peer", 1)])
def test_the_cost_is_the_parameters_of_the_networks_in_use(
    raw: dict[str, Any], tmp_path: Path, objective: str, peers: int
) -> None:
    from ray_dmml import load_cohort

    trial, _ = trained(make_search(raw, objective=objective, cost=True), tmp_path / "a")
    cohort = load_cohort(tmp_path / "a" / "fold0-seed0", "last")
    net = cohort.peers["peer0"].net
    parameters = sum(tensor.numel() for tensor in net.parameters())
    assert trial.reports[-1]["cost"] == pytest.approx(peers * parameters / 1e6, rel=0.1)
    assert parameters and ANGLE in trial.params
