"""Searches on Ray Tune, from end to end, on real trials."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import EXPERIMENTS, tiny
from PIL import Image
from ray import tune
from ray.train._internal.storage import StorageContext
from ray.tune import Result
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import Searcher, SearchGenerator
from typer.testing import CliRunner

from ray_dmml.cli.main import app
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.session import ray_session
from ray_dmml.training.run_dir import RunDir
from ray_dmml.training.trainer import Silent
from ray_dmml.tune.search_space import Search, SearchConfig, final_rows
from ray_dmml.tune.tuner import (
    SearchFolder,
    Trial,
    _can_restore,
    _final_runs,
    _name_the_lost,
    _NameTheEnded,
    _nodes,
    _proposer,
    _reason,
    _require_room,
    _resources,
    _scheduler,
    _watch,
    run_search,
)

ANGLE = "loss.relational.angle_weight"


@pytest.fixture
def raw(image_folder: Path) -> dict[str, Any]:
    return tiny(image_folder, train={"steps": 4, "evaluate_every": 2})


def search(raw: dict[str, Any], space: dict[str, Any] | None = None, **settings: Any) -> Search:
    asked = {
        "space": space or {ANGLE: {"uniform": [0, 4]}},
        "num_samples": 2,
        "search": "random",
        "scheduler": "none",
        "final_seeds": 1,
        **settings,
    }
    return Search(raw, SearchConfig.model_validate(asked))


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_search_from_end_to_end(
    ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path
) -> None:
    """Trial 0 is the config as it is; a trial that fails is named and ends nothing; the best on the
    validation classes is best.yaml, and is trained with the seeds asked for beside the default."""
    folder = tmp_path / "search"
    space = {
        ANGLE: {"uniform": [0, 4]},
        # A margin that is no number: the loss fails in the first step.
        "loss.metric.args.margin": {"choice": [0.2, "wide"]},
    }
    raw["checkpoint"] = {"storage_path": str(tmp_path / "of one run")}  # and not of six
    watched: list[Sequence[Trial]] = []
    found = search(raw, space, num_samples=4, final_seeds=2)
    final = run_search(folder, found, watch=watched.append)
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
    assert {trial.status for trial in watched[0]} == {"training"}
    assert {trial.status for trial in watched[-1]} == {"finished", "failed"}
    for name in ("best", "default"):
        assert [run["seed"] for run in final[name]["test"]] == [0, 1]
    name = next(t.name for t in SearchFolder(folder).trials() if t.number == int(best["trial"]))
    name = "default" if best["trial"] == "0" else name
    seed_1 = json.loads((folder / "final" / f"{name}-seed1" / "results.json").read_text())
    assert (seed_1["split"], seed_1["weights"], seed_1["classes"]) == ("test", "last", 8)
    assert seed_1["ensemble"] == final["best"]["test"][1]["ensemble"]
    assert (folder / "report.html").read_text().count("<img") == 3
    assert len(watched[-1]) == 4
    for trial in SearchFolder(folder).trials():
        results = folder / "trials" / trial.name / "fold0" / "results.json"
        assert not results.exists() or json.loads(results.read_text())["split"] == "validation"
    with pytest.raises(UserError, match="already exists"):
        run_search(folder, found)


def test_a_trial_that_never_fits_is_refused(
    ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path
) -> None:
    """Where it would wait for ever for what this machine has not."""
    raw["cohort"]["base"]["num_cpus"] = 3
    with pytest.raises(UserError, match=r"a trial needs 6 CPUs .* and this machine has 4"):
        run_search(tmp_path / "search", search(raw))
    assert not (tmp_path / "search").exists()


@pytest.mark.slow
def test_two_searches_of_one_seed_are_the_same(
    ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path
) -> None:
    """The proposals, and what came of them; the model-based ones follow from the results."""
    raw["cohort"]["base"]["num_cpus"] = 2  # one trial at a time
    outcomes = []
    for name in ("one", "two"):
        found = search(raw, num_samples=4, search="optuna", final_seeds=1)
        run_search(tmp_path / name, found)
        outcomes.append([(row[ANGLE], row["objective"]) for row in rows_of(tmp_path / name)])
    assert outcomes[0] == outcomes[1]
    assert len({angle for angle, _ in outcomes[0]}) == 4


@pytest.mark.slow
def test_folds_are_judged_one_after_the_other(
    ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path
) -> None:
    """The objective is the mean over folds that hold out other classes."""
    run_search(tmp_path / "search", search(raw, num_samples=1, folds=2))
    (trial,) = SearchFolder(tmp_path / "search").trials()
    folds = []
    for fold in range(2):
        run = tmp_path / "search" / "trials" / trial.name / f"fold{fold}"
        assert Config.load(run / "config.yaml").data.validation_fold == fold
        folds.append(json.loads((run / "results.json").read_text())["ensemble"]["recall@1"])
    assert trial.objective == pytest.approx(sum(folds) / 2)
    assert trial.starts == [0, 0]


@pytest.mark.slow
def test_population_based_training_changes_weights_in_mid_run(
    ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path
) -> None:
    """A trial that copied another goes on from its step with other weights, and the peers' losses
    are made with these."""
    raw["train"] = {"steps": 12, "evaluate_every": 5, "log_every": 5}
    raw["cohort"]["base"]["optimizer"]["lr"] = 1e-2
    space = {ANGLE: {"uniform": [0, 40]}, "loss.relational.distance_weight": {"uniform": [0, 40]}}
    run_search(tmp_path / "search", search(raw, space, num_samples=2, scheduler="pbt"))
    trials = SearchFolder(tmp_path / "search").trials()
    checked = 0
    for trial in trials:
        # A trial that copies another starts anew at that one's step; its last stretch is looked at.
        assert trial.starts[0] == 0 and trial.finished
        run = tmp_path / "search" / "trials" / trial.name / "fold0"
        weights = Config.load(run / "config.yaml").loss.relational
        assert weights.angle_weight == pytest.approx(trial.params[ANGLE])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        after = [r for r in rows if "peers" in r and r["step"] > trial.starts[-1] > 0]
        for terms in (terms for row in after for terms in row["peers"].values()):
            mutual = (
                weights.distance_weight * terms["distance"] + weights.angle_weight * terms["angle"]
            )
            assert terms["loss"] == pytest.approx(terms["metric"] + mutual, rel=1e-4)
            checked += 1
    assert checked, f"no trial was copied in mid-run: {[trial.starts for trial in trials]}"


@pytest.mark.slow
def test_a_draw_that_cannot_be_ends_its_own_trial(
    ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path
) -> None:
    """A milestone where there is no schedule of steps. With population based training, too, where the others
    would wait for the one that failed."""
    raw["cohort"]["peers"][1] = {"schedule": {"name": "step", "milestones": [2]}}
    space = {
        "cohort.peers": {"choice": [raw["cohort"]["peers"], [{}, {}]]},
        "cohort.peers.1.schedule.milestones.0": {"choice": [2, 3]},
    }
    for scheduler in ("none", "pbt"):
        folder = tmp_path / scheduler
        run_search(folder, search(raw, space, num_samples=4, scheduler=scheduler, final_seeds=0))
        rows = rows_of(folder)
        assert {row["status"] for row in rows} == {"finished", "failed"} and len(rows) == 4
        for row in rows:
            without = row["cohort.peers"] == "[{}, {}]"
            assert (row["status"] == "failed") == without
            assert ("milestones" in row["error"]) == without


@pytest.mark.parametrize(
    "first_end",
    [
        {0: 20, 1: 10},
        pytest.param({2: 10}, marks=pytest.mark.slow),
        pytest.param({0: 30, 1: 10, 2: 20}, marks=pytest.mark.slow),
    ],
)
def test_a_population_is_compared_at_equal_steps(
    ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path, first_end: dict[int, int]
) -> None:
    """Where trials failed at different steps, the others go on; resumed, those behind catch up first: nobody
    copies the first trial, which is the worst at any step."""

    def climb(params: dict[str, Any]) -> None:
        """Its figure is its step, plus its name: of two at one step the second is better, and one that is
        further is better than any. Fails once after the step of `first_end`."""
        step, lineage = 0, []
        if checkpoint := tune.get_checkpoint():
            step, lineage = json.loads((Path(checkpoint.path) / "state.json").read_text())
        name = int(tune.get_context().get_trial_id()[-1])
        lineage = [*lineage, name]
        mark = tmp_path / f"{name}-failed"
        while step < 50:
            if step == first_end.get(name) and not mark.exists():
                mark.touch()
                raise RuntimeError("once")
            step += 10
            with TemporaryDirectory() as folder:
                (Path(folder) / "state.json").write_text(json.dumps([step, lineage]))
                (tmp_path / f"{name}-{step}").write_text(json.dumps(lineage))
                report = {"step": step, "objective": step + name / 10, "cost": 0.0}
                tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))

    steps = {"train": {"steps": 50, "evaluate_every": 10}}
    asked = search(raw | steps, num_samples=3, scheduler="pbt")
    tuner = tune.Tuner(
        climb,
        param_space={ANGLE: tune.uniform(0, 4)},
        tune_config=tune.TuneConfig(num_samples=3, scheduler=_scheduler(asked)),
        run_config=tune.RunConfig(name="ray", storage_path=str(tmp_path), verbose=0),
    )
    found = tuner.fit()
    assert len(found.errors) == len(first_end)
    assert sum(each.metrics["step"] == 50 for each in found) == 3 - len(first_end)
    again = tune.Tuner.restore(str(tmp_path / "ray"), climb, resume_errored=True).fit()
    assert not again.errors and [each.metrics["step"] for each in again] == [50, 50, 50]
    for name in (1, 2):
        assert 0 not in json.loads((tmp_path / f"{name}-50").read_text())


@pytest.mark.slow
def test_a_killed_population_goes_on(raw: dict[str, Any], tmp_path: Path) -> None:
    """After the trials were compared: each goes on from its step, and all finish."""
    raw["train"] = {"steps": 200, "evaluate_every": 40, "log_every": 40}
    raw["cohort"]["base"]["num_cpus"] = 0.5
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    space = {"space": {ANGLE: {"uniform": [0, 4]}}, "scheduler": "pbt", "num_samples": 2}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({**space, "final_seeds": 0}))
    folder = SearchFolder(tmp_path / "search")
    command = [sys.executable, "-m", "ray_dmml.cli.main", "tune"]
    asked = ["--config", "config.yaml", "--space", "space.yaml", "--storage", "search"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, *asked], cwd=tmp_path, stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            trials = folder.trials()
            if len(trials) == 2 and all(80 <= trial.step < 200 for trial in trials):
                break
            time.sleep(0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    before = folder.trials()
    assert len(before) == 2 and not any(trial.finished for trial in before)
    ended = subprocess.run(
        [*command, "--resume", "search"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    for trial, earlier in zip(folder.trials(), before, strict=True):
        assert trial.finished and trial.starts[: len(earlier.starts)] == earlier.starts
        assert all(start >= 40 for start in trial.starts[len(earlier.starts) :])


@pytest.mark.parametrize(
    ("how", "proposer"),
    [
        (signal.SIGKILL, "optuna"),
        pytest.param(signal.SIGINT, "random", marks=pytest.mark.slow),
    ],
)
def test_an_ended_search_goes_on(
    raw: dict[str, Any], tmp_path: Path, how: signal.Signals, proposer: str
) -> None:
    """SIGKILL or Ctrl-C while a trial trains: the finished one is not run again, the other goes on
    from its step, and the end is as if nothing had been."""
    if proposer == "optuna":
        pytest.importorskip("optuna")
    raw["train"] = {"steps": 400, "evaluate_every": 20, "log_every": 20}
    raw["cohort"]["base"]["num_cpus"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    space = {"space": {ANGLE: {"uniform": [0, 4]}}, "search": proposer, "scheduler": "none"}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({**space, "num_samples": 2}))
    folder = SearchFolder(tmp_path / "search")
    command = [sys.executable, "-m", "ray_dmml.cli.main", "tune"]
    asked = ["--config", "config.yaml", "--space", "space.yaml", "--storage", "search"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [*command, *asked, "--final-seeds", "1"],
        cwd=tmp_path,
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        trials = folder.trials()
        if len(trials) == 2 and trials[0].finished and 40 <= trials[1].step < 400:
            break
        time.sleep(0.05)
    os.kill(process.pid, how)
    code = process.wait()
    told = (tmp_path / "log").read_text()
    if how == signal.SIGINT:
        assert code == 130 and "go on with: ray-dmml tune --resume search" in told, told
    else:
        assert code == -signal.SIGKILL, told
    assert not (folder.path / "final").exists()
    before = folder.trials()
    assert before[0].finished and not before[1].finished
    ended = subprocess.run(
        [*command, "--resume", "search"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0 and "Warning" not in ended.stderr, ended.stderr
    first, second = folder.trials()
    assert vars(first) == vars(before[0])
    assert second.finished and len(second.starts) == 2 and 40 <= second.starts[1] < 400
    assert [report["step"] for report in second.reports] == list(range(20, 401, 20))
    assert "config as it is" in ended.stdout and (folder.path / "best.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "c.yaml"], "needs its --space"),
        (["--resume", "nowhere"], "nowhere is not the folder of a search"),
        (
            ["--resume", "nowhere", "--final-seeds", "0"],
            "leave out --final-seeds, or begin another",
        ),
        (["--scheduler", "hyperband"], "scheduler: Input should be 'asha', 'pbt' or 'none'"),
        (["--set", "data.validation_fraction=0"], "set data.validation_fraction above 0"),
        (["--set", "data.classes_per_batch=5000"], "data.classes_per_batch is 5000 but only"),
        (["--storage", "taken"], "taken already exists; give another --storage"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "photo.jpg").touch()
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["tune", *arguments])
    assert ended.exit_code == 2 and says in " ".join(ended.stderr.split()), ended.stderr
    assert not (tmp_path / "runs").exists()


def test_the_script_is_the_command(tmp_path: Path) -> None:
    """A user's mistake is told by `experiments/tune_diversity.py` just so: one sentence, no traceback."""
    script = EXPERIMENTS / "tune_diversity.py"
    line = [sys.executable, str(script), "--resume", "nowhere"]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and "nowhere is not the folder of a search" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        ({"labels": {"zone": "a"}}, r"no node has the labels .* of peer0"),
        ({"num_cpus": 5}, "a trial needs 10 CPUs"),
        ({"resources": {"node:__internal_head__": 0.6}}, "a trial needs 1.2 node:__internal"),
    ],
)
def test_a_trial_that_would_wait_without_end_is_refused(
    ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path, peer: dict[str, Any], says: str
) -> None:
    """Where Ray is private nothing more will come. No search is begun."""
    raw["cohort"]["base"] |= peer
    with pytest.raises(UserError, match=says):
        run_search(tmp_path / "search", search(raw))
    assert not (tmp_path / "search" / "search.yaml").exists()


def test_images_that_cannot_be_read_are_told_before_a_trial(
    raw: dict[str, Any], image_folder: Path, tmp_path: Path
) -> None:
    """No folder is left that would have to be removed once they are mended."""
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "class00" / "0.png").write_text("no image")
    raw["data"]["root"] = str(tmp_path / "images")
    with pytest.raises(UserError, match=r"class00/0\.png cannot be read"):
        run_search(tmp_path / "search", search(raw))
    assert not (tmp_path / "search").exists()


def write_trial(files: SearchFolder, trial: Trial) -> None:
    folder = files.trials_folder / trial.name
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text(json.dumps(vars(trial)))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"experiment_state-2026-01-01_00-00-00.json": '{"trial_data": ['},
    ],
)
def test_a_search_without_its_state_is_not_begun_anew_over_its_trials(
    tmp_path: Path, state: dict[str, str]
) -> None:
    """One that was killed before any trial reported is; what it left goes."""
    files = SearchFolder(tmp_path)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "tuner.pkl").touch()
    for name, text in state.items():
        (tmp_path / "ray" / name).write_text(text)
    write_trial(files, Trial("a", {}))
    assert not _can_restore(files, "optuna")
    assert files.trials() == [] and not (tmp_path / "ray").exists()

    write_trial(files, Trial("b", {}))  # trained, and has reported nothing yet
    (files.trials_folder / "b" / "fold0" / "checkpoints" / "step-2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot go on\. What its trials reported is in .*results"):
        _can_restore(files, "optuna")
    assert [trial.name for trial in files.trials()] == ["b"]


@pytest.mark.parametrize("proposer", ["optuna", "random"])
def test_a_search_goes_on_only_with_all_that_it_has_proposed(
    raw: dict[str, Any], tmp_path: Path, proposer: str
) -> None:
    """Ray Tune would break off in the middle, or end with trials undone; what is drawn at random it holds twice."""
    files = SearchFolder(tmp_path)
    (files.trials_folder / "a" / "fold0" / "checkpoints" / "step-2").mkdir(parents=True)
    state = tmp_path / "ray"
    state.mkdir()
    (state / "tuner.pkl").touch()
    (state / "experiment_state-2026-01-01_00-00-00.json").write_text('{"trial_data": []}')
    proposes = _proposer(search(raw, search=proposer))
    if isinstance(proposes, Searcher):  # as Ray Tune does
        proposes = SearchGenerator(proposes)
    before = set(state.iterdir())
    proposes.save_to_dir(str(state), session_str="2026-01-01_00-00-00")
    written = set(state.iterdir()) - before
    assert written and _can_restore(files, proposer)

    for file in written:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="damaged: this search cannot go on"):
            _can_restore(files, proposer)
        file.unlink()
        if proposer == "random":
            assert _can_restore(files, proposer)
        else:
            with pytest.raises(UserError, match="damaged: this search cannot go on"):
                _can_restore(files, proposer)
        file.write_bytes(whole)
    assert _can_restore(files, proposer)


def test_a_search_goes_on_with_the_proposer_that_it_was_begun_with(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra may be installed, or be gone, before it is resumed."""
    find_spec = importlib.util.find_spec
    without, with_it, population = (SearchFolder(tmp_path / name) for name in ("a", "b", "c"))
    with_it.create(search(raw, search=None))
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "optuna" else find_spec(name)
        )
        without.create(search(raw, search=None))
        population.create(search(raw, search=None, scheduler="pbt"))
        with pytest.raises(UserError, match=r"pip install 'ray-dmml\[search\]'"):
            with_it.search()
    assert without.search().config.proposer == "random"
    assert population.search().config.proposer == "random"
    assert with_it.search().config.proposer == "optuna"


def test_a_search_goes_on_in_one_process_at_a_time(
    ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path
) -> None:
    files = SearchFolder(tmp_path / "search")
    files.create(search(raw))
    with (
        RunDir(files.path).lock(),
        pytest.raises(UserError, match=r"another process is training in .*search"),
    ):
        run_search(files.path)
    assert files.trials() == []


def test_a_table_that_cannot_be_written_ends_nothing(raw: dict[str, Any], tmp_path: Path) -> None:
    """Who watches is told of the trials as before."""
    files, told = SearchFolder(tmp_path), list[str]()
    write_trial(files, Trial("a", {ANGLE: 1.0}))
    files.results_file.mkdir()  # nothing can be put in its place
    over = Event()
    over.set()
    _watch(
        files, search(raw), lambda trials: told.extend(trial.name for trial in trials), over, over
    )
    assert told == ["a"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("space: {seed: {choice: [0]}}", "is not what a search was asked for"),
        ("settings: {}\nsearch: {spice: 1}", "spice: unknown setting; did you mean 'space'"),
        ("settings: [", "is not valid YAML"),
    ],
)
def test_another_search_file_is_not_gone_on_with(tmp_path: Path, text: str, says: str) -> None:
    """Such as one's own, in the folder that it lies in."""
    (tmp_path / "search.yaml").write_text(text)
    ended = CliRunner().invoke(app, ["tune", "--resume", str(tmp_path)])
    assert ended.exit_code == 2 and says in " ".join(ended.stderr.split()), ended.stderr


def test_parts_of_gpus_that_no_gpu_has_are_refused(ray_start_4_cpus: None) -> None:
    """1.8 of 2 GPUs, and yet the third peer's 0.6 are nowhere."""
    config = Config.parse({"cohort": {"base": {"num_gpus": 0.6}, "peers": [{}] * 3}})
    nodes = [{**_nodes()[0], "GPU": 2.0}]
    with pytest.raises(
        UserError, match=r"find no place on this machine.* 4 CPUs and 2 GPUs.*0.6 GPU"
    ):
        _require_room(_resources(config, nodes, None), nodes)
    nodes[0]["GPU"] = 3.0
    _require_room(_resources(config, nodes, None), nodes)


def test_a_reason_is_one_line() -> None:
    """So that results.csv has a line a trial, whatever Ray tells of a node that ran out of memory."""
    from ray.exceptions import OutOfMemoryError

    told = OutOfMemoryError("2 worker(s) were killed.\nOOM kill reason: ...\nTop 10 memory users:")
    assert _reason(told) == "OutOfMemoryError: 2 worker(s) were killed."
    assert _reason(ValueError()) == "ValueError"
    assert _reason(UserError("the view's size is wrong")) == "the view's size is wrong"


def ended(name: str, angle: float, step: int = 4, **known: Any) -> Trial:
    figures = {"step": step, "objective": angle / 10, "cost": 1.0}
    return Trial(name, {ANGLE: angle}, [figures], **{"finished": True, **known})


def test_a_trial_that_was_given_another_draw_is_not_the_config_as_it_is(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    """Population based training does so: its figure is not shown beside the default's test runs."""
    found, files = search(raw, final_seeds=0), SearchFolder(tmp_path)
    first, best = ended("a", 2.0, is_default=True), ended("b", 3.0, number=1)
    final = _final_runs(files, found, best, [first, best], Silent())
    assert final["default"]["validation"] == pytest.approx(0.2)
    final = _final_runs(files, found, best, [ended("a", 3.5, is_default=True), best], Silent())
    assert final["default"]["validation"] is None


def test_a_final_run_that_fails_costs_no_other(raw: dict[str, Any], tmp_path: Path) -> None:
    """It is told with its seed and reason, in the table with how many are left; where all fail, there is
    nothing to show."""
    raw["cohort"]["base"]["num_cpus"] = 0.5
    found, files = search(raw, final_seeds=2), SearchFolder(tmp_path)
    best = ended("a", 2.0, is_default=True)

    def damage(seed: int) -> None:
        (tmp_path / f"final/default-seed{seed}").mkdir(parents=True)
        (tmp_path / f"final/default-seed{seed}/config.yaml").write_text("train: {stesp: 4}")

    damage(1)
    with ray_session():
        final = _final_runs(files, found, best, [best], Silent())
    (first, second) = final["best"]["test"]
    assert first["ensemble"]["recall@1"] >= 0 and (second["seed"], "stesp" in second["error"]) == (
        1,
        True,
    )
    (row,) = final_rows(final, found)
    assert row[0] == "config as it is (1 of 2 seeds; the others failed)"
    assert row[2] == f"{100 * first['ensemble']['recall@1']:.1f}"

    shutil.rmtree(tmp_path / "final/default-seed0")
    damage(0)
    with pytest.raises(UserError, match="stesp"):
        _final_runs(files, found, best, [best], Silent())


def test_a_trial_that_is_lost_before_it_wrote_anything_is_told_too(tmp_path: Path) -> None:
    """One whose process was killed while it imported torch, say."""
    storage, draw = StorageContext(str(tmp_path), "ray"), {ANGLE: 1.0}
    write_trial(SearchFolder(tmp_path), Trial("8f", {ANGLE: 2.0}, began=1.0))
    lost = TuneTrial("trial", trial_id="9a", stub=True, storage=storage, config=draw)
    _NameTheEnded({ANGLE: 1.0}).on_trial_error(1, [lost], lost)
    files, killed = SearchFolder(tmp_path), RuntimeError("The actor died.\nOut of memory.")
    _name_the_lost(files, [Result({}, None, killed, str(tmp_path / "ray/_trial_9a_1_angle=1"))])
    told, _ = files.trials()  # the config as it is comes first, whenever it was lost
    assert (told.params, told.error, told.status) == (draw, "Out of memory.", "failed")
    assert told.is_default


def test_a_resumed_search_compares_trials_at_equal_steps(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    """ASHA is told again what a trial had reported: its next figure is of a later step than those that
    others are yet to reach."""
    steps = {"train": {"steps": 8, "evaluate_every": 2}}
    storage = StorageContext(str(tmp_path), "ray")
    before, new = (
        TuneTrial("trial", trial_id=name, stub=True, storage=storage) for name in ("a", "b")
    )
    reports = [{"step": step, "objective": step / 10, "cost": 1.0} for step in (2, 4)]
    write_trial(SearchFolder(tmp_path), Trial("a", {ANGLE: 1.0}, reports))
    scheduler = _scheduler(search(raw | steps, scheduler="asha"))
    for each in (before, new):
        scheduler.on_trial_add(None, each)

    def verdict(trial: TuneTrial, step: int, objective: float) -> str:
        return scheduler.on_trial_result(None, trial, {"step": step, "objective": objective})

    assert verdict(before, 6, 0.6) == "CONTINUE"
    assert verdict(new, 2, 0.25) == "CONTINUE"
    assert verdict(new, 4, 0.45) == "CONTINUE"  # 0.4 was the other's here, not 0.6


def test_a_trial_whose_process_was_killed_is_told_from_one_of_the_same_draw(tmp_path: Path) -> None:
    """Tune alone knows of it; the other one was ended early, and did not fail."""
    files = SearchFolder(tmp_path)
    for name in ("9a_00000", "9a_00001"):
        write_trial(files, ended(name, 1.0, 2, finished=False))
    killed = RuntimeError("The actor died.\nIts process was killed.")
    _name_the_lost(
        files,
        [
            Result({}, None, error, str(tmp_path / f"ray/_trial_9a_0000{n}_{n}_angle=1"))
            for n, error in enumerate([None, killed])
        ],
    )
    found = {trial.name: (trial.status, trial.error) for trial in files.trials(over=True)}
    assert found == {
        "9a_00000": ("ended early", None),
        "9a_00001": ("failed", "Its process was killed."),
    }


@pytest.mark.slow
def test_halving_ends_the_worse_and_the_rest_finish(
    ray_start_4_cpus: None, raw: dict[str, Any], tmp_path: Path
) -> None:
    """The default scheduler: a trial that reached its last step is finished, and one is the best; a
    worse one is ended before."""
    rng = np.random.default_rng(0)
    for number in range(16):  # noise, or all trials were as good
        (tmp_path / "noise" / f"class{number:02d}").mkdir(parents=True)
        for image in range(5):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            file = tmp_path / "noise" / f"class{number:02d}" / f"{image}.png"
            Image.fromarray(pixels).save(file)
    raw["data"]["root"] = str(tmp_path / "noise")
    raw["train"] = {"steps": 8, "evaluate_every": 2}
    raw["cohort"]["base"]["num_cpus"] = 2  # one trial at a time
    asked = search(raw, num_samples=6, scheduler="asha", final_seeds=0, metric="map@r")
    seen: list[str] = []
    final = run_search(
        tmp_path / "search",
        asked,
        watch=lambda trials: seen.append(" ".join(trial.status for trial in trials)),
    )
    # It is said while others still train, not only at the end.
    assert any("ended" in statuses and "training" in statuses for statuses in seen)
    trials = SearchFolder(tmp_path / "search").trials()
    assert all(trial.finished == (trial.step == 8) for trial in trials)
    assert trials[0].finished and not any(trial.error for trial in trials)
    assert {trial.step for trial in trials} <= {2, 4, 8}
    assert {trial.status for trial in trials} == {"finished", "ended early"}
    assert "ended early" in (tmp_path / "search" / "results.csv").read_text()
    best = max(trial.objective or 0 for trial in trials if trial.finished)
    assert final["best"]["validation"] == best and final["best"]["test"] == []
    assert not (tmp_path / "search" / "final").exists()
    page = (tmp_path / "search" / "report.html").read_text()
    assert "seen by none" in page and "Test classes" not in page
