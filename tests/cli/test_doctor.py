"""`ray-dmml doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import tiny
from typer.testing import CliRunner

from ray_dmml.cli.main import app


def test_the_checks_of_this_machine(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table and its JSON have the same checks, each with a state; the exit code is that of the worst state. No Ray
    is started: the test has no marker for processes."""
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tiny(image_folder)))
    runner = CliRunner(env={"COLUMNS": "80"})
    ended = runner.invoke(app, ["doctor", "--json", "--config", str(config)])
    checks = {check.pop("name"): check for check in json.loads(ended.stdout)["checks"]}
    assert {"versions", "GPUs", "faiss", "cores", "memory", "temporary folder", "caches", "config"} <= set(checks)
    assert all(set(check) == {"state", "message", "advice", "facts"} for check in checks.values())
    assert {check["state"] for check in checks.values()} <= {"ok", "note", "problem"}
    assert all(check["advice"] for check in checks.values() if check["state"] == "note")
    assert ended.exit_code == int(any(check["state"] == "problem" for check in checks.values()))
    monkeypatch.setenv("RAY_TMPDIR", "/proc/no/folder")
    ended = runner.invoke(app, ["doctor"])
    assert ended.exit_code == 1
    lines = ended.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines[:-1])
    assert "temporary folder" in lines[-1] and lines[-1].startswith("a run would fail here: ")
    assert {line.split()[0] for line in lines if line[:1] not in ("", " ")} <= {"ok", "note", "problem", "a"}


def test_settings_without_a_config_are_refused() -> None:
    ended = CliRunner().invoke(app, ["doctor", "--set", "train.steps=1"])
    assert ended.exit_code == 2 and "give --config FILE, too" in ended.stderr
