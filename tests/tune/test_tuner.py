"""The parts of a search that talk to Ray Tune. No process is started here."""

from __future__ import annotations

import shutil
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from conftest import tiny
from ray.train._internal.storage import StorageContext
from ray.tune import Result
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import Searcher, SearchGenerator
from tune_helpers import ANGLE, make_search, make_trial, write_trial

from ray_dmml.errors import UserError
from ray_dmml.tune.results import SearchDir
from ray_dmml.tune.trial import Trial
from ray_dmml.tune.tuner import (
    EndedTrials,
    can_restore,
    make_sampler,
    make_scheduler,
    record_lost_trials,
    run_search,
    watch_trials,
)


@pytest.fixture
def raw(image_folder: Path) -> dict[str, Any]:
    return tiny(image_folder, train={"steps": 4, "evaluate_every": 2})


@pytest.mark.parametrize("state", [{}, {"experiment_state-2026-01-01_00-00-00.json": '{"trial_data": ['}])
def test_a_search_without_its_state_does_not_start_again_over_its_trials(tmp_path: Path, state: dict[str, str]) -> None:
    """If it was killed before any trial trained, it does, and its remains are removed."""
    files = SearchDir(tmp_path)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "tuner.pkl").touch()
    for name, text in state.items():
        (tmp_path / "ray" / name).write_text(text)
    write_trial(files, Trial("a", {}))
    assert not can_restore(files, "optuna")
    assert files.trials() == [] and not (tmp_path / "ray").exists()

    write_trial(files, Trial("b", {}))  # It has trained, and has not reported.
    (files.trial_folder("b") / "fold0-seed0" / "checkpoints" / "step-2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot be resumed\. The results .* are in .*results"):
        can_restore(files, "optuna")
    assert [trial.name for trial in files.trials()] == ["b"]


@pytest.mark.parametrize("sampler", ["optuna", "random"])
def test_a_search_is_resumed_only_with_the_state_of_its_sampler(
    raw: dict[str, Any], tmp_path: Path, sampler: str
) -> None:
    """Ray Tune would fail later, or leave out trials. It has random samples twice."""
    if sampler == "optuna":
        pytest.importorskip("optuna")
    files = SearchDir(tmp_path)
    (files.trial_folder("a") / "fold0-seed0" / "checkpoints" / "step-2").mkdir(parents=True)
    state = tmp_path / "ray"
    state.mkdir()
    (state / "tuner.pkl").touch()
    (state / "experiment_state-2026-01-01_00-00-00.json").write_text('{"trial_data": []}')
    algorithm = make_sampler(make_search(raw, sampler=sampler))
    if isinstance(algorithm, Searcher):  # as Ray Tune does
        algorithm = SearchGenerator(algorithm)
    before = set(state.iterdir())
    algorithm.save_to_dir(str(state), session_str="2026-01-01_00-00-00")
    written = set(state.iterdir()) - before
    assert written and can_restore(files, sampler)

    for file in written:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="damaged: this search cannot be resumed"):
            can_restore(files, sampler)
        file.unlink()
        if sampler == "random":
            assert can_restore(files, sampler)
        else:
            with pytest.raises(UserError, match="damaged: this search cannot be resumed"):
                can_restore(files, sampler)
        file.write_bytes(whole)
    assert can_restore(files, sampler)


def test_results_that_cannot_be_written_end_nothing(raw: dict[str, Any], tmp_path: Path) -> None:
    """The watcher receives the trials all the same."""
    files, names = SearchDir(tmp_path), list[str]()
    write_trial(files, Trial("a", {ANGLE: 1.0}))
    files.results_file.mkdir()  # no file can replace it
    completed = Event()
    completed.set()
    watch_trials(
        files,
        make_search(raw),
        lambda trials: names.extend(trial.name for trial in trials),
        completed,
        completed,
    )
    assert names == ["a"]


def test_a_trial_that_is_killed_before_its_record_is_recorded(tmp_path: Path) -> None:
    """Such as one whose process was killed while it imported torch."""
    storage, params = StorageContext(str(tmp_path), "ray"), {ANGLE: 1.0}
    files = SearchDir(tmp_path)
    write_trial(files, Trial("8f", {ANGLE: 2.0}, start_time=1.0))
    lost = TuneTrial("trial", trial_id="9a", stub=True, storage=storage, config=params)
    EndedTrials(params).on_trial_error(1, [lost], lost)
    killed = RuntimeError("The actor died.\nOut of memory.")
    folder = str(tmp_path / "ray/_trial_9a_1_angle=1")
    record_lost_trials(files, [Result({}, None, killed, folder)])
    record, _ = files.trials()  # The baseline is first, whenever it was lost.
    assert (record.params, record.error, record.status) == (params, "Out of memory.", "failed")
    assert record.is_baseline


def test_a_stopped_trial_is_recorded(tmp_path: Path) -> None:
    """The scheduler kills its process within its last report."""
    storage, files = StorageContext(str(tmp_path), "ray"), SearchDir(tmp_path)
    write_trial(files, make_trial(0, 0.5, finished=False))
    write_trial(files, make_trial(1, 0.5))
    for name in ("0", "1", "2"):
        trial = TuneTrial("trial", trial_id=name, stub=True, storage=storage, config={})
        EndedTrials({}).on_trial_complete(1, [trial], trial)
    assert {t.name: t.status for t in files.trials()} == {"0": "stopped early", "1": "finished"}


def test_a_killed_trial_is_not_mistaken_for_one_with_the_same_parameters(tmp_path: Path) -> None:
    """Only Ray Tune knows that it was killed. The other one was stopped early, and did not fail."""
    files = SearchDir(tmp_path)
    for name in ("9a_00000", "9a_00001"):
        reports = [{"step": 2, "objective": 0.1, "cost": 1.0}]
        write_trial(files, Trial(name, {ANGLE: 1.0}, reports))
    killed = RuntimeError("The actor died.\nIts process was killed.")
    results = [
        Result({}, None, error, str(tmp_path / f"ray/_trial_9a_0000{n}_{n}_angle=1"))
        for n, error in enumerate([None, killed])
    ]
    record_lost_trials(files, results)
    assert {t.name: (t.status, t.error) for t in files.trials(ended=True)} == {
        "9a_00000": ("stopped early", None),
        "9a_00001": ("failed", "Its process was killed."),
    }


def test_a_resumed_search_compares_trials_at_equal_steps(raw: dict[str, Any], tmp_path: Path) -> None:
    """ASHA receives the earlier reports again. Otherwise the next report, of a later step, would be
    compared with other trials' reports of earlier steps."""
    storage = StorageContext(str(tmp_path), "ray")
    before, new = (TuneTrial("trial", trial_id=name, stub=True, storage=storage) for name in ("a", "b"))
    reports = [{"step": step, "objective": step / 10, "cost": 1.0} for step in (2, 4)]
    write_trial(SearchDir(tmp_path), Trial("a", {ANGLE: 1.0}, reports))
    steps = {"train": {"steps": 8, "evaluate_every": 2}}
    scheduler = make_scheduler(make_search(raw | steps, scheduler="asha"))
    for trial in (before, new):
        scheduler.on_trial_add(None, trial)

    def decision(trial: TuneTrial, step: int, objective: float) -> str:
        return scheduler.on_trial_result(None, trial, {"step": step, "objective": objective})

    assert decision(before, 6, 0.6) == "CONTINUE"
    assert decision(new, 2, 0.25) == "CONTINUE"
    assert decision(new, 4, 0.45) == "CONTINUE"  # The other had 0.4 at this step, not 0.6.


def test_images_that_cannot_be_read_are_reported_before_a_trial(
    raw: dict[str, Any], image_folder: Path, tmp_path: Path
) -> None:
    """No folder is left that a second try would find."""
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "class00" / "0.png").write_text("no image")
    raw["data"]["root"] = str(tmp_path / "images")
    with pytest.raises(UserError, match=r"class00/0\.png cannot be read"):
        run_search(tmp_path / "search", make_search(raw))
    assert not (tmp_path / "search").exists()
