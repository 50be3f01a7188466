"""The HTML report of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny
from tune_helpers import ANGLE, make_search, make_trial

from ray_dmml.tune.report import at_common_step, importance, write_report
from ray_dmml.tune.results import best_trial
from ray_dmml.tune.trial import Trial


@pytest.fixture
def raw(image_folder: Path) -> dict[str, Any]:
    return tiny(image_folder)


def test_the_report_says_nothing_about_settings_that_few_trials_tried(raw: dict[str, Any], tmp_path: Path) -> None:
    """Nor if all trials are equal. Every plot has a description."""
    search = make_search(raw)
    for values, plots in [([0.1, 0.2, 0.3], 3), ([0.5] * 9, 3), (list(np.linspace(0, 1, 9)), 4)]:
        trials = [make_trial(n, float(value), params={ANGLE: n / 3}) for n, value in enumerate(values)]
        write_report(tmp_path / "report.html", search, trials, best_trial(trials), None)
        page = (tmp_path / "report.html").read_text()
        assert page.count("<img") == plots and 'alt=""' not in page
        assert ("Left out: " in page) == (plots == 3)
        assert "used by no run" in page and "Test classes" not in page


def test_the_report_has_the_final_runs_and_the_pareto_front(raw: dict[str, Any], tmp_path: Path) -> None:
    search = make_search(raw, cost=True)
    trials = [make_trial(n, n / 10, params={ANGLE: float(n)}, is_baseline=n == 0) for n in range(3)]
    figures = {"recall@1": 0.5, "map@r": 0.25}
    test = [{"seed": 0, "peers": {"a": figures, "b": figures}, "ensemble": figures}]
    final = {"params": {ANGLE: 0.0}, "validation": 0.5, "test": test}
    report = tmp_path / "report.html"
    write_report(report, search, trials, trials[2], {"best": final, "baseline": final}, trials[2:])
    page = report.read_text()
    assert "No trial was better than the baseline." in page and "million parameters" in page
    assert "0 (baseline)" in page and "used by the final runs only" in page


def test_importance_is_the_share_of_variance(raw: dict[str, Any]) -> None:
    """All of it for a setting that decides, next to none for one without effect."""
    search = make_search(
        raw,
        {
            "loss.relational.distance_weight": {"uniform": [0, 10]},
            "cohort.peers.1.update_interval": {"choice": [1, 2, 3]},
        },
    )
    rng = np.random.default_rng(0)
    trials = []
    for n in range(300):
        params = {
            "loss.relational.distance_weight": float(rng.uniform(0, 10)),
            "cohort.peers.1.update_interval": str(rng.integers(1, 4)),
        }
        objective = 0.1 * int(params["cohort.peers.1.update_interval"])
        trials.append(make_trial(n, objective, params=params))
    shares = importance(trials, search)
    assert shares["cohort.peers.1.update_interval"] == pytest.approx(1)
    assert shares["loss.relational.distance_weight"] < 0.05


def test_trials_are_compared_at_a_step_that_all_reached() -> None:
    """A trial that was stopped early does not look worse for that."""

    def reported(number: int, values: list[float]) -> Trial:
        rows = [{"step": 10 * n, "objective": v, "cost": 1.0} for n, v in enumerate(values, 1)]
        return Trial(str(number), {}, rows, number=number)

    trials = [reported(0, [0.2, 0.5, 0.9]), reported(1, [0.3, 0.4])]
    assert [t.objective for t in at_common_step(trials)] == [0.5, 0.4]
    assert trials[0].objective == 0.9


def test_the_report_names_its_step(raw: dict[str, Any], tmp_path: Path) -> None:
    """Trials of different lengths may have no step in common."""
    search = make_search(raw)
    one, other = (make_trial(n, n / 10, params={ANGLE: 1.0 + n}) for n in (1, 2))
    for step, text in ((5, "step 5, which all trials reached"), (3, "the last report of each")):
        other.reports[-1]["step"] = step
        write_report(tmp_path / "report.html", search, [one, other], other, None)
        assert text in (tmp_path / "report.html").read_text()
