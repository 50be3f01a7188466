"""The files of a search, and what is made of its trials."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny
from tune_helpers import ANGLE, make_search, make_trial, write_trial

from ray_dmml.errors import UserError
from ray_dmml.tune.results import (
    SearchDir,
    best_trial,
    final_columns,
    final_rows,
    pareto_front,
    tie_message,
    write_results,
)


@pytest.fixture
def raw(image_folder: Path) -> dict[str, Any]:
    return tiny(image_folder)


def test_the_best_trial_is_a_finished_one() -> None:
    """A trial that failed or was stopped early is not the best. Of equals it is the first."""
    trials = [
        make_trial(0, 0.5),
        make_trial(1, 0.9, finished=False),
        make_trial(2, 0.7),
        make_trial(3, 0.7),
        make_trial(4, None, finished=False, error="it broke"),
    ]
    assert best_trial(trials).number == 2
    with pytest.raises(UserError, match="no trial of 1 finished: it broke"):
        best_trial(trials[4:])


def test_equally_good_trials_are_named() -> None:
    """Unfinished trials are not among them."""
    trials = [
        make_trial(0, 1.0),
        make_trial(1, 0.5),
        make_trial(2, 1.0),
        make_trial(3, 1.0, finished=False),
    ]
    assert "trials 0, 2 are equally good" in (tie_message(trials, best_trial(trials)) or "")
    assert tie_message(trials[:2], trials[0]) is None


def test_no_trial_dominates_one_of_the_pareto_front() -> None:
    """Against the definition, pair by pair."""
    rng = np.random.default_rng(0)
    trials = [make_trial(n, float(value), float(cost)) for n, (value, cost) in enumerate(rng.integers(0, 6, (40, 2)))]
    expected = {
        one.number
        for one in trials
        if not any(
            other.reports[0]["objective"] >= one.reports[0]["objective"]
            and other.reports[0]["cost"] <= one.reports[0]["cost"]
            and other.reports[0] != one.reports[0]
            for other in trials
        )
    }
    assert {each.number for each in pareto_front(trials)} == expected


def test_results_have_a_line_for_each_trial(raw: dict[str, Any], tmp_path: Path) -> None:
    """Parameters, the metrics of the last report, and the deviation over the runs of a trial."""
    search, files = make_search(raw, seeds=2), SearchDir(tmp_path)
    metrics = {metric: 0.5 for metric in search.metrics}
    figures = {"ensemble": {**metrics, "recall@1": 0.75}, "peers": {"a": metrics, "b": metrics}}
    done = make_trial(0, 0.75, params={ANGLE: 2.0})
    done.reports[-1] |= {"figures": figures, "objectives": [0.7, 0.8]}
    failed = make_trial(1, None, params={ANGLE: 3.0}, finished=False, error="it broke")
    write_results(files, search, [done, failed])
    with files.results_file.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["status"], first[ANGLE], first["step"]) == ("finished", "2.0", "5")
    assert (first["objective"], first["ensemble_recall@1"]) == ("0.75", "0.75")
    assert first["mean_peer_recall@1"] == "0.5"
    assert float(first["objective_std"]) == pytest.approx(np.std([0.7, 0.8], ddof=1))
    assert (second["status"], second["error"], second["objective"]) == ("failed", "it broke", "")


def test_the_baseline_is_the_first_trial(tmp_path: Path) -> None:
    """The others follow in the order in which they began."""
    files = SearchDir(tmp_path)
    write_trial(files, make_trial(7, 0.5, start_time=3.0))
    write_trial(files, make_trial(8, 0.5, start_time=2.0, finished=False))
    write_trial(files, make_trial(9, 0.5, start_time=4.0, is_baseline=True))
    assert [(t.number, t.name, t.status) for t in files.trials(ended=True)] == [
        (0, "9", "finished"),
        (1, "8", "stopped early"),
        (2, "7", "finished"),
    ]


def test_a_resumed_search_keeps_its_sampler(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra may be installed, or removed, before it is resumed."""
    pytest.importorskip("optuna")
    find_spec = importlib.util.find_spec
    without, with_it = SearchDir(tmp_path / "a"), SearchDir(tmp_path / "b")
    with_it.create(make_search(raw, sampler=None))
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find_spec(name))
        without.create(make_search(raw, sampler=None))
        with pytest.raises(UserError, match=r"pip install 'ray-dmml\[tune\]'"):
            with_it.search()
    assert without.search().config.sampler_name == "random"
    assert with_it.search().config.sampler_name == "optuna"


def test_a_search_is_what_was_written(raw: dict[str, Any], tmp_path: Path) -> None:
    """Its settings and its experiment; a folder with files is refused."""
    files = SearchDir(tmp_path / "search")
    search = make_search(raw, seeds=2, final_seeds=0)
    files.create(search)
    assert files.search().config == search.config and files.search().base == search.base
    with pytest.raises(UserError, match="already exists"):
        files.create(search)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("space: {seed: {choice: [0]}}", "was not written by ray-dmml tune"),
        ("settings: {}\nsearch: {spice: 1}", "spice: unknown setting; did you mean 'space'"),
        (
            "settings: {}\nsearch: {space: {seed: {choice: [0]}}, search: optuna}",
            "A search of another version of ray-dmml cannot be resumed",
        ),
        ("settings: [", "is not valid YAML"),
    ],
)
def test_another_search_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """Such as a file for --space in its own folder."""
    (tmp_path / "search.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        SearchDir(tmp_path).search()


def run(ensemble: float, *peers: float) -> dict[str, Any]:
    """The test metrics of a final run."""
    first, *others = [{"recall@1": value, "map@r": value / 2} for value in (ensemble, *peers)]
    return {"ensemble": first, "peers": dict(enumerate(others))}


def test_the_final_table_has_means_and_deviations(raw: dict[str, Any]) -> None:
    """Over the seeds. It has one row if no trial was better than the baseline."""
    search = make_search(raw)
    best = {
        "params": {"a": 1},
        "validation": 0.75,
        "test": [run(0.8, 0.6, 0.8), run(0.9, 0.7, 0.7)],
    }
    baseline = {"params": {"a": 0}, "validation": None, "test": [run(0.5, 0.4, 0.4)]}
    rows = final_rows({"best": best, "baseline": baseline}, search)
    assert rows[0] == ["best", "75.0", "85.0 ± 7.1", "42.5 ± 3.5", "70.0 ± 0.0", "35.0 ± 0.0"]
    assert rows[1] == ["baseline", "-", "50.0", "25.0", "40.0", "20.0"]
    assert len(final_columns(search)) == len(rows[0])
    (only,) = final_rows({"best": best, "baseline": best}, search)
    assert only == ["baseline", *rows[0][1:]]


def test_the_final_table_names_failed_seeds(raw: dict[str, Any]) -> None:
    test = [{**run(0.5, 0.4, 0.4), "seed": 0}, {"seed": 1, "error": "it broke"}]
    final = {"params": {}, "validation": 0.5, "test": test}
    (row,) = final_rows({"best": final, "baseline": final}, make_search(raw))
    assert row[0] == "baseline (1 of 2 seeds; the others failed)" and row[2] == "50.0"
