"""Curves: what metrics.jsonl says, and where it is drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_dmml import Config
from ray_dmml.report.agreement import agreement_charts
from ray_dmml.report.curves import (
    MAX_POINTS,
    NamedMetrics,
    best_validation,
    describe_best,
    loss_charts,
    read_metrics,
    validation_charts,
)
from ray_dmml.report.data import Chart, Line
from ray_dmml.report.drawing import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, draw, ticks

CONFIG = Config.parse({"cohort": {"peers": [{}, {}]}})


def write(path: Path, rows: list[dict[str, Any]], rest: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)
    return path


def step(number: int, **losses: float) -> dict[str, Any]:
    return {"step": number, "peers": {name: {"loss": value, "metric": value / 2} for name, value in losses.items()}}


def validation(number: int, peer0: float, peer1: float, ensemble: float) -> dict[str, Any]:
    rows = {"peer0": {"recall@1": peer0}, "peer1": {"recall@1": peer1}}
    return {"step": number, "validation": {"peers": rows, "ensemble": {"recall@1": ensemble}}}


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    """Whole lines count; the last one may be half written; values that are not finite have no point."""
    rows = [step(1, peer0=3.0, peer1=1.0), step(2, peer0=float("nan"), peer1=2.0)]
    rows.append({"step": 3, "peers": {"peer0": {"skipped_nonfinite": 1.0}, "peer1": {}}})
    path = write(tmp_path / "metrics.jsonl", rows, 'not json\n[1]\n{"step": 4, "peers": {"pe')
    found = read_metrics(path)
    assert found.losses["loss"] == {"peer0": [(1, 3.0)], "peer1": [(1, 1.0), (2, 2.0)]}
    assert found.num_damaged == 2 and found.num_steps == 3 and found.skipped == {"peer0": 1}
    assert read_metrics(tmp_path / "none").num_steps == 0


def test_the_best_evaluation(tmp_path: Path) -> None:
    """That of the best checkpoint: the first of equals, of the ensemble or the mean of the peers."""
    rows = [validation(2, 0.5, 0.9, 0.6), validation(4, 0.8, 0.5, 0.9), validation(6, 0.1, 0.1, 0.9)]
    metrics = read_metrics(write(tmp_path / "m", rows))
    best = best_validation(metrics, CONFIG)
    assert best is not None and (best.step, best.value, best.num_later) == (4, 0.9, 1)
    assert describe_best(best).endswith("best at step 4: 90.0 %. The evaluation after it was not better.")
    best = best_validation(metrics, CONFIG.with_overrides({"train.monitor": "mean_peer"}))
    assert best is not None and (best.step, best.num_later) == (2, 2)
    frozen = {"train": {"monitor": "mean_peer"}, "cohort": {"peers": [{}, {"frozen": True, "weights": "pretrained"}]}}
    best = best_validation(metrics, Config.parse(frozen))  # of the peers that learn
    assert best is not None and (best.step, best.value) == (4, 0.8)
    last = best_validation(read_metrics(write(tmp_path / "m", rows[:2])), CONFIG)
    assert last is not None and "That is the last evaluation" in describe_best(last)
    assert best_validation(read_metrics(tmp_path / "none"), CONFIG) is None


def test_long_curves_are_means(tmp_path: Path) -> None:
    """A curve has a bounded number of points, and a band with the lowest and the highest value."""
    rng = np.random.default_rng(0)
    values = rng.random(1000)
    path = write(tmp_path / "m", [step(n + 1, peer0=value) for n, value in enumerate(values)])
    metrics = NamedMetrics("", read_metrics(path), None)
    chart, _ = loss_charts([metrics], CONFIG)
    [line] = chart.lines
    assert len(line.points) == MAX_POINTS
    parts = np.array_split(values, MAX_POINTS)
    assert [value for _, value in line.points] == pytest.approx([part.mean() for part in parts], rel=1e-5)
    assert line.band[3][1:] == (parts[3].min(), parts[3].max())


def test_curves_of_several_runs_stand_together(tmp_path: Path) -> None:
    metrics = read_metrics(write(tmp_path / "m", [validation(2, 0.5, 0.9, 0.6), validation(4, 0.6, 0.9, 0.7)]))
    best = best_validation(metrics, CONFIG)
    [chart] = validation_charts([NamedMetrics("a: ", metrics, best), NamedMetrics("b: ", metrics, best)])
    assert [line.name for line in chart.lines] == [
        f"{run}: {name}" for run in "ab" for name in ("peer0", "peer1", "ensemble")
    ]
    assert len({line.style for line in chart.lines}) == 6
    assert [mark.text for mark in chart.marks] == ["a: best: step 4", "b: best: step 4"]


def test_the_agreement_of_two_peers(tmp_path: Path) -> None:
    """A curve for what each finds alone, and for what neither finds, on their own axis; what both find is said."""
    rows = [validation(2, 0.5, 0.9, 0.6), validation(4, 0.5, 0.9, 0.6)]
    shares = [(0.94, 0.01, 0.02, 0.03), (0.92, 0.03, 0.05, 0.0)]
    for row, numbers in zip(rows, shares, strict=True):
        kinds = dict(zip(("both", "only_first", "only_second", "neither"), numbers, strict=True))
        row["validation"]["agreement"] = {"peer0/peer1": kinds}
    [chart] = agreement_charts([NamedMetrics("", read_metrics(write(tmp_path / "m", rows)), None)])
    assert {line.name: line.points for line in chart.lines} == {
        "only peer0 finds": ((2, 1.0), (4, 3.0)),
        "only peer1 finds": ((2, 2.0), (4, 5.0)),
        "neither finds": ((2, 3.0), (4, 0.0)),
    }
    assert chart.note == "both find 94.0 % at step 2, 92.0 % at step 4"
    labels = [text for _, text in draw(chart).y_ticks]
    assert labels[0] == "0" and float(labels[-1]) < 10


def test_an_axis_from_zero_where_all_is_zero() -> None:
    drawn = draw(Chart("c", "Agreement", "", "%", (Line("a", 0, ((1, 0.0), (2, 0.0))),), from_zero=True))
    assert drawn.y_ticks[0][1] == "0"
    assert drawn.strokes[0].dots[0][1] == HEIGHT - BOTTOM


@pytest.mark.parametrize(("low", "high"), [(0, 1), (97.31, 99.2), (-3, 2000), (5, 5), (0, 0), (1e-7, 3e-7)])
def test_ticks_are_round_and_reach_around(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    gaps = np.diff(found)
    assert np.allclose(gaps, gaps[0])
    mantissa = gaps[0] / 10.0 ** np.floor(np.log10(gaps[0]))
    assert min(abs(mantissa - each) for each in (1, 2, 2.5, 5, 10)) < 1e-6


def test_a_chart_is_drawn_inside_its_box() -> None:
    """Also with a single point, and with a band beyond the ticks."""
    lines = (Line("a", 0, ((1, 0.2), (9, 0.7)), ((1, -5, 9), (9, 0, 1))), Line("b", 1, ((4, 0.5),)))
    for chart in (Chart("c", "Loss", "", "", lines), Chart("c", "Loss", "", "", lines[1:])):
        drawn = draw(chart)
        for stroke in drawn.strokes:
            numbers = [float(n) for n in re.findall(r"[\d.]+", stroke.path + stroke.band)]
            assert all(LEFT <= x <= WIDTH - RIGHT for x in numbers[::2])
            assert all(TOP <= y <= HEIGHT - BOTTOM for y in numbers[1::2])
        assert drawn.x_ticks and drawn.y_ticks
