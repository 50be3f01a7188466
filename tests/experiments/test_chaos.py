"""Faults at random moments, from fixed seeds: every run ends with the bits of the undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHAOS = ROOT / "experiments" / "reliability" / "chaos.py"


def test_the_moments_are_what_the_trainer_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults that are drawn for an evaluation, a checkpoint or a recovery wait for these texts."""
    monkeypatch.syspath_prepend(CHAOS.parent)
    trainer = (ROOT / "ray_dmml" / "training" / "trainer.py").read_text()
    moments = import_module("chaos").MOMENTS
    assert len(moments) == 3
    for text in moments:
        assert f'logger.debug("{text}")' in trainer


def rows_of(seeds: tuple[int, ...], rows: Path) -> list[dict[str, object]]:
    chosen = [word for seed in seeds for word in ("--seed", str(seed))]
    done = subprocess.run([sys.executable, CHAOS, *chosen, "--rows", rows], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in rows.read_text().splitlines()]


def all_end_alike(seeds: tuple[int, ...], rows: Path) -> None:
    found = rows_of(seeds, rows)
    assert [row["seed"] for row in found] == list(seeds)
    assert all(row["equal"] is True for row in found), found
    # What is drawn for a recovery strikes only if there is one; the first fault always does.
    assert all(row["struck"] for row in found), found


@pytest.mark.ray
@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    """A lost node, over the coordinator."""
    all_end_alike((14,), tmp_path / "rows.jsonl")


@pytest.mark.ray
@pytest.mark.slow
def test_five_more_runs(tmp_path: Path) -> None:
    """From peer to peer: a stopped peer and a coordinator that is stopped in the recovery, a damaged embedding,
    a lost peer with a damaged checkpoint. Over the coordinator: its end, the driver's."""
    all_end_alike((41, 32, 55, 28, 46), tmp_path / "rows.jsonl")


@pytest.mark.ray
@pytest.mark.slow
def test_odd_sizes_many_peers_and_drops(tmp_path: Path) -> None:
    """Five peers, two teachers each, odd sizes, and a peer that is dropped."""
    seeds = (42, 48, 53, 45)
    found = rows_of(seeds, tmp_path / "rows.jsonl")
    assert [row["seed"] for row in found] == list(seeds)
    assert {row["peers"] for row in found} == {"five", "two teachers", "odd", "drop"}
    # A full disk (seed 42) is a mount of its own, which needs root.
    without_root = [42] if found[0].get("why") == "a small disk needs root" else []
    assert [row["seed"] for row in found if row["equal"] is not True] == without_root, found
