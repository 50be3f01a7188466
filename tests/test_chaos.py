"""Faults at random moments, from fixed seeds: every run ends with the bits of the undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[1] / "experiments" / "chaos.py"


@pytest.mark.slow
def test_six_runs(tmp_path: Path) -> None:
    """A peer, the coordinator, a node and the driver, killed or stopped, on both transports."""
    seeds = (0, 2, 4, 5, 10, 13)
    for seed in seeds:
        rows = tmp_path / "rows.jsonl"
        subprocess.run(
            [sys.executable, CHAOS, "--runs", "1", "--first-seed", str(seed), "--rows", rows],
            check=True,
        )
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["seed"] for row in found] == list(seeds)
    assert all(row["equal"] for row in found)
    assert all(row["struck"] == len(row["faults"]) for row in found)
