"""A search on the console."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny
from rich.console import Console
from tune_helpers import ANGLE, make_search, make_trial

from ray_dmml.tune.progress import TrialsTable, final_table
from ray_dmml.tune.results import short_name, short_value


@pytest.fixture
def raw(image_folder: Path) -> dict[str, Any]:
    return tiny(image_folder)


def test_the_final_table_says_when_no_trial_was_better(raw: dict[str, Any]) -> None:
    figures = {"recall@1": 0.5, "map@r": 0.25}
    test = [{"seed": 0, "peers": {"a": figures}, "ensemble": figures}]
    best = {"params": {ANGLE: 1}, "validation": 0.75, "test": test}
    baseline = {**best, "params": {ANGLE: 0}}
    for final, expected in (
        ({"best": best, "baseline": baseline}, 0),
        ({"best": best, "baseline": best}, 1),
    ):
        output = io.StringIO()
        final_table(final, make_search(raw), Console(file=output, width=100))
        assert output.getvalue().count("No trial was better than the baseline.") == expected
        assert "baseline" in output.getvalue()


def test_a_line_for_each_change_without_a_terminal(raw: dict[str, Any]) -> None:
    """Parameters first, then each report; nothing twice."""
    output = io.StringIO()
    training = make_trial(0, None, params={ANGLE: 2.0}, finished=False)
    with TrialsTable(Console(file=output, width=200), make_search(raw)) as table:
        table.show([training])
        table.show([training, make_trial(1, None, finished=False, error="it broke")])
        table.show([make_trial(0, 0.5, params={ANGLE: 2.0})])
        table.show([make_trial(0, 0.5, params={ANGLE: 2.0})])
    assert output.getvalue().splitlines() == [
        f"trial 0: {ANGLE} 2",
        "trial 1: ",
        "trial 1: failed: it broke",
        "trial 0: finished, step 5, recall@1 0.5000",
    ]


def test_a_trial_of_several_runs_shows_which_one_trains(raw: dict[str, Any]) -> None:
    """It has no report before the last run."""
    output = io.StringIO()
    table = TrialsTable(Console(file=output, width=200), make_search(raw, seeds=3))
    for finished_runs in (0, 1, 1):
        table.show([make_trial(0, None, finished=False, finished_runs=finished_runs)])
    assert output.getvalue().splitlines()[1:] == ["trial 0: run 1 of 3", "trial 0: run 2 of 3"]


def test_a_live_table_on_a_terminal(raw: dict[str, Any]) -> None:
    """The best finished trial is bold. It can be stopped before its block ends."""
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=True)
    trials = [
        make_trial(0, 0.5, params={ANGLE: 2.0}, is_baseline=True),
        make_trial(1, 0.75, params={ANGLE: 3.0}),
        make_trial(2, None, params={ANGLE: 1.0}, finished=False),
    ]
    with TrialsTable(console, make_search(raw)) as table:
        table.show(trials)
        table.stop()
    text = output.getvalue()
    assert "0 (baseline)" in text and "75.0 %" in text and "finished" in text
    assert "angle_weight 3" in text and "angle_weight 2" not in text  # which is the baseline's
    assert "\x1b[1m1 " in text


def test_parameters_are_shown_in_a_few_characters(raw: dict[str, Any]) -> None:
    """A long choice, such as a list of transforms, by its number."""
    views = [[{"name": "CenterCrop", "args": {"size": 32}}], "weak"]
    key = "cohort.peers.1.view"
    search = make_search(raw, {key: {"choice": views}, ANGLE: {"uniform": [0, 4]}})
    labels = search.config.space[key].labels
    assert [short_value(search, key, label) for label in labels] == ["no. 1", "no. 2"]
    assert short_value(search, ANGLE, 1.23456) == "1.23"
    assert (short_name(key), short_name(ANGLE)) == ("peer 1: view", "angle_weight")
