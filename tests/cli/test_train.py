"""`train`, `evaluate` and `config`: what they print. No test here starts Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny
from typer.testing import CliRunner

from ray_dmml import Config
from ray_dmml.cli.main import app
from ray_dmml.cli.train import default_folder


def cli(*arguments: str | Path) -> Any:
    ended = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert ended.exit_code == 0, ended.output
    return ended


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A finished run. Tests do not write into it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "c.yaml").write_text(yaml.safe_dump(tiny(image_folder)))
    ended = cli("train", "--local", "--config", folder / "c.yaml", "--out", folder / "run")
    assert "8 unseen classes" in ended.stdout and f"run: {folder / 'run'}" in ended.stdout
    return folder / "run"


def test_evaluate_prints_a_table_or_json(run: Path) -> None:
    """The table has a row for each peer and the ensemble, the JSON is that of results.json."""
    ended = cli("evaluate", run)
    assert "8 unseen classes" in ended.stdout
    for row in ("peer0, untrained", "ensemble, untrained", "peer1", "ensemble"):
        assert row in ended.stdout
    printed = json.loads(cli("evaluate", run, "--json").stdout)
    results = json.loads((run / "results.json").read_text())
    assert all(printed[key] == results[key] for key in printed)


def test_train_prints_its_results_as_json(run: Path, tmp_path: Path) -> None:
    """Everything else is on standard error."""
    options = ("--local", "--config", run / "config.yaml", "--out", tmp_path / "run", "--json")
    ended = cli("train", *options)
    assert json.loads(ended.stdout) == json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"run: {tmp_path / 'run'}" in ended.stderr


def test_a_resumed_run_is_extended(run: Path, tmp_path: Path) -> None:
    """By more steps; the folder that it prints is its own."""
    options = ("--local", "--config", run / "config.yaml", "--out", tmp_path / "run")
    cli("train", *options, "--set", "train.steps=2")
    ended = cli("train", "--local", "--resume", tmp_path / "run", "--set", "train.steps=6")
    assert f"run: {tmp_path / 'run'}" in ended.stdout
    assert "resumed at step 2 of 6" in ended.stdout.splitlines()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]


def test_the_default_folder_of_a_data_set_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its name has a colon, with which scp and rsync would look for a host; its folder has none."""
    monkeypatch.chdir(tmp_path)
    config = tiny(tmp_path, data={"name": "photos:load"}, train={"steps": 2})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert Path(default_folder(Config.load(tmp_path / "c.yaml"))).name.startswith("photos-load-2")


def test_config_prints_a_config(run: Path) -> None:
    """With its comments it loads as the same config."""
    shown = cli("config", "--config", run / "config.yaml").stdout
    assert Config.parse(yaml.safe_load(shown)) == Config.load(run / "config.yaml")


def test_a_warning_is_shown_once(image_folder: Path, tmp_path: Path) -> None:
    """The log of the process and the console logger are never both at work."""
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "class00" / "0.png").write_bytes(b"not an image")
    raw = tiny(tmp_path / "images", data={"on_bad_image": "skip"}, train={"steps": 2})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    ended = cli("train", "--local", "--config", tmp_path / "c.yaml", "--out", tmp_path / "run")
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if "0.png" in line]
    assert len(lines) == 1 and "class00" in lines[0]
