"""The README's first command as it stands: the quickstart, on Ray, on this machine."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


ROOT = Path(__file__).parents[2]


def test_the_command_is_a_function() -> None:
    """`ray-dmml` runs a function of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["ray-dmml"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.slow
def test_the_quickstart_retrieves_unseen_characters(tmp_path: Path) -> None:
    """`ray-dmml train` ends with a table. The ensemble is right for nine of ten queries."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-m", "ray_dmml.cli", "train"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (run,) = (tmp_path / "runs").iterdir()
    results = json.loads((run / "results.json").read_text())
    assert results["ensemble"]["recall@1"] >= 0.90
    assert results["split"] == "test" and results["num_classes"] == 487
    best_peer = max(peer["recall@1"] for peer in results["peers"].values())
    assert results["ensemble"]["recall@1"] > best_peer
    assert best_peer > results["untrained_ensemble"]["recall@1"]
    table = ended.stdout.split("unseen classes")[1]
    for name in (*results["peers"], "ensemble"):
        assert name in table
    assert f"{100 * results['ensemble']['recall@1']:.1f}" in table
