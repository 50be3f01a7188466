"""The benchmark runs and reports its figures. No speed is asserted here."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import EXPERIMENTS


def benchmark(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXPERIMENTS / "benchmark.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_row_gives_a_table_and_json(tmp_path: Path) -> None:
    """Two rows without Ray have one line each, with figures, ratio and goal, in both forms."""
    file = tmp_path / "figures.json"
    only = ["--only", "relational", "--only", "input"]
    ended = benchmark(*only, "--rounds", "1", "--json", file)
    assert ended.returncode == 0, ended.stderr
    report: dict[str, Any] = json.loads(file.read_text())
    assert {"commit", "command", "machine", "versions"} <= set(report)
    assert [row["name"] for row in report["rows"]] == ["relational", "input"]
    lines = [line for line in ended.stdout.splitlines() if line.startswith("| ")]
    for row, line in zip(report["rows"], lines[1:], strict=True):
        assert row["a"] > 0 and row["b"] > 0
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == row["name"] and cells[-2] == row["goal"]
        assert cells[-1] == ("yes" if row["met"] else "NO")
    relational, images = report["rows"]
    assert relational["ratio"] == pytest.approx(relational["b"] / relational["a"])
    assert images["ratio"] == pytest.approx(images["a"] / images["b"])


def test_an_unknown_row_is_refused_with_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong name ends the command before anything is measured."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import benchmark

    with pytest.raises(typer.BadParameter, match=r"no row relationl; .*relational-memory"):
        benchmark.main(only=["relationl"], json_file=tmp_path / "figures.json")
    assert not (tmp_path / "figures.json").exists()


def test_every_row_has_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of rows names functions that exist, and the tables are among the rows."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import benchmark

    for module, function in benchmark.ROWS.values():
        assert callable(getattr(importlib.import_module(f"benchmarks.{module}"), function))
    assert set(benchmark.TABLES) < set(benchmark.ROWS)


def test_a_goal_is_met_by_the_median_of_its_own_quantity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of three rounds decides, of A/B, of B/A, or of A alone."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    from benchmarks.row import Goal, Row, in_turn

    a, b = [1.0, 2.0, 30.0], [4.0, 4.0, 4.0]
    for goal, expected in [
        (Goal("A/B", "<=", 0.5), True),
        (Goal("A/B", "<=", 0.49), False),
        (Goal("B/A", ">=", 2.0), True),
        (Goal("B/A", ">=", 2.1), False),
        (Goal("A", "<=", 2.0), True),
        (Goal("A", "<=", 1.9), False),
    ]:
        assert Row("name", "what", "s", a, b, goal).met is expected, goal
    calls: list[str] = []

    def measured(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    assert in_turn(2, lambda: measured("a"), lambda: measured("b")) == ([1, 4], [2, 3])
    assert calls == ["a", "b", "b", "a"]
