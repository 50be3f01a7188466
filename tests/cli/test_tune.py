"""Mistakes in a search are reported before anything runs. No test here starts Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXPERIMENTS
from typer.testing import CliRunner

from ray_dmml.cli.main import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "c.yaml"], "needs its --space"),
        (["--resume", "nowhere"], "nowhere is not the folder of a search"),
        (
            ["--resume", "nowhere", "--final-seeds", "0"],
            "leave out --final-seeds, or start another",
        ),
        (
            ["--resume", "nowhere", "--seeds", "2", "--out", "a"],
            "leave out --out, --seeds, or start",
        ),
        (["--resume", "taken"], "taken/search.yaml was not written by ray-dmml tune"),
        (["--scheduler", "hyperband"], "scheduler: Input should be 'asha' or 'none'"),
        (["--sampler", "grid"], "sampler: Input should be 'optuna' or 'random'"),
        (["--seeds", "3"], "seeds: 3 needs scheduler: none"),
        (["--set", "data.validation_fraction=0"], "set data.validation_fraction above 0"),
        (["--out", "taken"], "taken already exists; give another folder (out)"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "search.yaml").write_text("space: {seed: {choice: [0]}}")
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["tune", *arguments])
    error = " ".join(ended.stderr.split()).replace(f"{tmp_path.resolve()}/", "")
    assert ended.exit_code == 2 and message in error, ended.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
def test_the_script_is_the_command(tmp_path: Path) -> None:
    """`experiments/tune_diversity.py` reports a mistake in the same way, without a traceback."""
    script = EXPERIMENTS / "tune_diversity.py"
    line = [sys.executable, str(script), "--resume", "nowhere"]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and "nowhere is not the folder of a search" in ended.stderr
    assert "Traceback" not in ended.stderr
