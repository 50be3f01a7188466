"""Searches on Ray Tune from end to end, with real trials."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import tiny
from PIL import Image
from tune_helpers import ANGLE, make_search

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.training.run_dir import RunDir
from ray_dmml.tune.results import SearchDir
from ray_dmml.tune.trial import Trial
from ray_dmml.tune.tuner import run_search

pytestmark = pytest.mark.ray


@pytest.fixture
def raw(image_folder: Path) -> dict[str, Any]:
    return tiny(image_folder, train={"steps": 4, "evaluate_every": 2})


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_search_from_end_to_end(ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path) -> None:
    """Trial 0 is the baseline. A failed trial is named and ends nothing. The best trial on the
    validation classes becomes best.yaml, and is trained beside the baseline with each seed."""
    folder = tmp_path / "search"
    space = {
        ANGLE: {"uniform": [0, 4]},
        # A margin that is no number: the loss fails in the first step.
        "loss.metric.args.margin": {"choice": [0.2, "wide"]},
    }
    raw["checkpoint"] = {"storage_path": str(tmp_path / "of one run")}  # has room for one run
    seen: list[Sequence[Trial]] = []
    search = make_search(raw, space, num_samples=4, final_seeds=2)
    final = run_search(folder, search, watch=seen.append)
    rows = rows_of(folder)
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3"]
    assert (rows[0][ANGLE], rows[0]["status"]) == ("2.0", "finished")
    for row in rows:
        if row["loss.metric.args.margin"] == "wide":
            assert row["status"] == "failed" and row["error"] and "Traceback" not in row["error"]
        else:
            assert row["status"] == "finished" and row["step"] == "4" and not row["error"]
    assert {row["status"] for row in rows} == {"finished", "failed"}
    best = max((r for r in rows if r["objective"]), key=lambda r: float(r["objective"]))
    config = Config.load(folder / "best.yaml")
    assert config.loss.relational.angle_weight == pytest.approx(float(best[ANGLE]))
    assert config.train.steps == 4 and config.evaluation.split == "test"
    assert final["best"]["validation"] == pytest.approx(float(best["objective"]))
    # A number, as in the space.
    assert final["best"]["params"]["loss.metric.args.margin"] == 0.2
    assert {trial.status for trial in seen[0]} == {"training"}
    assert {trial.status for trial in seen[-1]} == {"finished", "failed"}
    for name in ("best", "baseline"):
        assert [run["seed"] for run in final[name]["test"]] == [0, 1]
    name = next(t.name for t in SearchDir(folder).trials() if t.number == int(best["trial"]))
    name = "baseline" if best["trial"] == "0" else name
    seed_1 = json.loads((folder / "final" / f"{name}-seed1" / "results.json").read_text())
    assert (seed_1["split"], seed_1["weights"]) == ("test", "last")
    assert seed_1["ensemble"] == final["best"]["test"][1]["ensemble"]
    assert json.loads((folder / "final.json").read_text()) == final
    assert (folder / "report.html").read_text().count("<img") == 3
    assert len(seen[-1]) == 4
    for trial in SearchDir(folder).trials():
        results = folder / "trials" / trial.name / "fold0-seed0" / "results.json"
        assert not results.exists() or json.loads(results.read_text())["split"] == "validation"
    with pytest.raises(UserError, match="already exists"):
        run_search(folder, search)


def test_a_search_that_never_fits_is_not_begun(ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path) -> None:
    """It would wait without end for what this machine does not have."""
    raw["cohort"]["base"]["num_cpus"] = 3
    with pytest.raises(UserError, match=r"a trial needs 6 CPUs .* and this machine has 4"):
        run_search(tmp_path / "search", make_search(raw))
    assert not (tmp_path / "search").exists()


def test_a_search_runs_in_one_process_at_a_time(ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path) -> None:
    files = SearchDir(tmp_path / "search")
    files.create(make_search(raw))
    with (
        RunDir(files.path).lock(),
        pytest.raises(UserError, match=r"another process is training in .*search"),
    ):
        run_search(files.path)
    assert files.trials() == []


@pytest.mark.slow
def test_two_searches_of_one_seed_are_equal(ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path) -> None:
    """The sampled parameters and their results. Optuna's samples follow from the results."""
    raw["cohort"]["base"]["num_cpus"] = 2  # one trial at a time
    outcomes = []
    for name in ("one", "two"):
        search = make_search(raw, num_samples=4, sampler="optuna", final_seeds=1)
        run_search(tmp_path / name, search)
        outcomes.append([(row[ANGLE], row["objective"]) for row in rows_of(tmp_path / name)])
    assert outcomes[0] == outcomes[1]
    assert len({angle for angle, _ in outcomes[0]}) == 4


@pytest.mark.slow
def test_parameters_that_do_not_fit_together_fail_their_trial(
    ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path
) -> None:
    """A milestone, for peers without a schedule of steps. The other trials finish."""
    raw["cohort"]["peers"][1] = {"schedule": {"name": "step", "milestones": [2]}}
    space = {
        "cohort.peers": {"choice": [raw["cohort"]["peers"], [{}, {}]]},
        "cohort.peers.1.schedule.milestones.0": {"choice": [2, 3]},
    }
    run_search(tmp_path / "search", make_search(raw, space, num_samples=4, final_seeds=0))
    rows = rows_of(tmp_path / "search")
    assert {row["status"] for row in rows} == {"finished", "failed"} and len(rows) == 4
    for row in rows:
        fits = row["cohort.peers"] != "[{}, {}]"
        assert (row["status"] == "finished") == fits
        assert ("milestones" in row["error"]) != fits


class Command:
    """`ray-dmml tune` in a process of its own, in a folder with a config and a space."""

    def __init__(self, folder: Path, raw: dict[str, Any], **settings: Any) -> None:
        self.folder, self.files = folder, SearchDir(folder / "search")
        self._line = [sys.executable, "-m", "ray_dmml.cli", "tune"]
        search = {"space": {ANGLE: {"uniform": [0, 4]}}, "scheduler": "none", **settings}
        (folder / "config.yaml").write_text(yaml.safe_dump(raw))
        (folder / "space.yaml").write_text(yaml.safe_dump(search))

    def end_when(self, ready: Callable[[list[Trial]], bool], how: signal.Signals) -> int:
        """Starts the search, ends it with a signal, and returns the exit code."""
        options = ["--config", "config.yaml", "--space", "space.yaml", "--out", "search"]
        with self.log.open("w") as log:
            process = subprocess.Popen(
                [*self._line, *options],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if ready(self.files.trials()):
                break
            time.sleep(0.05)
        os.kill(process.pid, how)
        return process.wait()

    def resume(self) -> subprocess.CompletedProcess[str]:
        line = [*self._line, "--resume", "search"]
        return subprocess.run(line, cwd=self.folder, capture_output=True, text=True, timeout=600)

    @property
    def log(self) -> Path:
        return self.folder / "log"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "sampler"), [(signal.SIGKILL, "optuna"), (signal.SIGINT, "random")])
def test_an_interrupted_search_is_resumed(
    raw: dict[str, Any], tmp_path: Path, how: signal.Signals, sampler: str
) -> None:
    """SIGKILL or Ctrl-C while a trial trains: the finished one is not run again, the other one
    continues from its step, and the end is as if nothing had happened."""
    if sampler == "optuna":
        pytest.importorskip("optuna")
    raw["train"] = {"steps": 20, "evaluate_every": 20, "log_every": 20}
    raw["cohort"]["base"]["num_cpus"] = 1
    long = {"train.steps": 200}  # long enough to interrupt; the final runs are short
    command = Command(tmp_path, raw, trial=long, sampler=sampler, num_samples=2, final_seeds=1)

    def ready(trials: list[Trial]) -> bool:
        return len(trials) == 2 and trials[0].finished and 40 <= trials[1].step < 200

    code = command.end_when(ready, how)
    output = command.log.read_text()
    if how == signal.SIGINT:
        assert code == 130 and "resume with: ray-dmml tune --resume search" in output, output
    else:
        assert code == -signal.SIGKILL, output
    assert not command.files.final_folder.exists()
    before = command.files.trials()
    assert before[0].finished and not before[1].finished
    ended = command.resume()
    assert ended.returncode == 0 and "Warning" not in ended.stderr, ended.stderr
    first, second = command.files.trials()
    assert vars(first) == vars(before[0])
    assert second.finished and len(second.starts) == 2 and 40 <= second.starts[1] < 200
    assert [report["step"] for report in second.reports] == list(range(20, 201, 20))
    assert "baseline" in ended.stdout and command.files.best_file.exists()


@pytest.mark.slow
def test_a_killed_search_with_seeds_is_resumed(raw: dict[str, Any], tmp_path: Path) -> None:
    """Killed while the second seed trains: the first is not trained again, and the second continues
    from its checkpoint. results.csv has one line for each trial, with the mean."""
    raw["train"] = {"steps": 200, "evaluate_every": 20, "log_every": 20}
    raw["cohort"]["base"]["num_cpus"] = 0.5  # both trials at a time
    command = Command(tmp_path, raw, sampler="random", num_samples=2, seeds=2, final_seeds=0)

    def step_of(trial: Trial, seed: int) -> int:
        file = command.files.trial_folder(trial.name) / f"fold0-seed{seed}" / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return len([line for line in lines if "validation" in line]) * 20

    def ready(trials: list[Trial]) -> bool:
        return len(trials) == 2 and any(step_of(trial, 1) >= 60 for trial in trials)

    assert command.end_when(ready, signal.SIGKILL) == -signal.SIGKILL, command.log.read_text()
    before = {trial.name: trial for trial in command.files.trials()}
    assert any(trial.finished_runs == 1 for trial in before.values())
    ended = command.resume()
    assert ended.returncode == 0, ended.stderr
    trials = command.files.trials()
    assert len(trials) == len(rows_of(command.files.path)) == 2
    for trial, row in zip(trials, rows_of(command.files.path), strict=True):
        values = []
        for seed in (0, 1):
            run = command.files.trial_folder(trial.name) / f"fold0-seed{seed}"
            assert Config.load(run / "config.yaml").seed == seed
            values.append(json.loads((run / "results.json").read_text())["ensemble"]["recall@1"])
        assert trial.finished and trial.reports[-1]["objectives"] == values
        assert float(row["objective"]) == pytest.approx(np.mean(values))
        earlier = before[trial.name]
        assert trial.starts[: len(earlier.starts)] == earlier.starts
        if earlier.finished_runs == 1:
            assert trial.starts[:2] == [0, 0] and len(trial.starts) == 3 and trial.starts[2] >= 40


@pytest.mark.slow
def test_asha_stops_the_worse_trials(ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path) -> None:
    """A trial that reached its last step is finished, and the best is one of them. The others were
    stopped early."""
    rng = np.random.default_rng(0)
    for number in range(16):  # noise, because all trials are perfect on the usual images
        (tmp_path / "noise" / f"class{number:02d}").mkdir(parents=True)
        for image in range(5):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            file = tmp_path / "noise" / f"class{number:02d}" / f"{image}.png"
            Image.fromarray(pixels).save(file)
    raw["data"]["root"] = str(tmp_path / "noise")
    raw["train"] = {"steps": 8, "evaluate_every": 2}
    raw["cohort"]["base"]["num_cpus"] = 2  # one trial at a time
    search = make_search(raw, num_samples=6, scheduler="asha", final_seeds=0, metric="map@r")
    seen: list[str] = []
    final = run_search(
        tmp_path / "search",
        search,
        watch=lambda trials: seen.append(" ".join(trial.status for trial in trials)),
    )
    # It is known while others still train, not only at the end.
    assert any("stopped" in statuses and "training" in statuses for statuses in seen)
    trials = SearchDir(tmp_path / "search").trials()
    assert all(trial.finished == (trial.step == 8) for trial in trials)
    assert trials[0].finished and not any(trial.error for trial in trials)
    assert {trial.step for trial in trials} <= {2, 4, 8}
    assert {trial.status for trial in trials} == {"finished", "stopped early"}
    assert "stopped early" in (tmp_path / "search" / "results.csv").read_text()
    best = max(trial.objective or 0 for trial in trials if trial.finished)
    assert final["best"]["validation"] == best and final["best"]["test"] == []
    assert not (tmp_path / "search" / "final").exists()
    page = (tmp_path / "search" / "report.html").read_text()
    assert "used by no run" in page and "Test classes" not in page
