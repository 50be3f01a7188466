"""Weights & Biases, MLflow and trackio without a network: a run, and the same run resumed."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from ray_dmml import train
from ray_dmml.config.parts import SERVICES
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.training.quick_check import check_quickly

LOGGED, EVALUATED = [2, 3, 4, 6], [3, 4, 6]
"""Steps of the two runs below."""


def run_twice(image_folder: Path, run: Path, name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Trains 4 steps, and then 2 more. Returns what results.json holds."""
    loggers = [{"name": name, "args": args}]
    training = {"steps": 4, "evaluate_every": 3, "log_every": 2, "tensorboard": False, "pictures": 2}
    config = Config.parse(tiny(image_folder, train={**training, "loggers": loggers}))
    train(config, run, local=True, progress=False)
    return train(config.with_overrides({"train.steps": 6}), resume=run, local=True, progress=False)


def needs(package: str) -> Any:
    is_there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not is_there, reason=f"{package} is not installed (the extra {package})")


def test_what_is_wrong_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SERVICES:
        wrong: list[tuple[list[dict[str, Any]], str]] = [
            ([{"name": name, "args": {"projects": "a"}}], rf"{name} does not fit its args: .*'projects'; it takes .*"),
            ([{"name": name}], rf"train.loggers.0.name: {name} needs the extra: pip install 'ray-dmml\[{name}\]'"),
            ([{"name": f"{name}s"}], f"train.loggers.0.name '{name}s': name one of wandb, mlflow, trackio, write"),
        ]
        monkeypatch.setitem(sys.modules, name, None)  # for Python, it is not installed
        for loggers, message in wrong:
            with pytest.raises(UserError, match=message):
                check_quickly(Config.parse({"train": {"loggers": loggers}}), on_this_machine=True)


@pytest.mark.slow
@pytest.mark.ray
@needs("mlflow")
def test_mlflow(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # where MLflow puts pictures
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    results = run_twice(image_folder, tmp_path / "photos", "mlflow", {"experiment": "test", "tracking_uri": uri})
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "photos" and run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "4" and run.data.params["cohort.peers.1.view"] == "weak"
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    assert [metric.step for metric in history["loss/peer0"]] == LOGGED
    assert [metric.step for metric in history["validation_recall_at_1/ensemble"]] == EVALUATED
    assert history["final_recall_at_1/ensemble"][-1].value == results["ensemble"]["recall@1"]
    assert any("views" in file.path for file in client.list_artifacts(run.info.run_id, "images"))


@pytest.mark.slow
@pytest.mark.ray
@needs("trackio")
def test_trackio(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run_twice(image_folder, tmp_path / "photos", "trackio", {"project": "test"})
    [file] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert {name for name, _, _ in rows} == {"photos"}
    assert [step for _, step, metrics in rows if "loss/peer0" in str(metrics)] == LOGGED
    assert [step for _, step, metrics in rows if "validation_recall_at_1/ensemble" in str(metrics)] == EVALUATED


@pytest.mark.slow
@pytest.mark.ray
@needs("wandb")
def test_wandb(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, each start writes a file of its own, with the same id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_twice(image_folder, tmp_path / "photos", "wandb", {"project": "test", "tags": ["a"]})
    files = sorted((tmp_path / "photos/loggers/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1
    until = time.monotonic() + 20  # its own process writes the files
    rows: list[dict[str, Any]] = []
    while not (rows and "final_recall_at_1/ensemble" in rows[-1]) and time.monotonic() < until:
        time.sleep(0.1)
        rows = [row for file in files for row in history_of(file)]
    assert [row["step"] for row in rows if "loss/peer0" in row] == LOGGED
    assert [row["step"] for row in rows if "validation_recall_at_1/ensemble" in row] == EVALUATED


def history_of(file: Path) -> Iterator[dict[str, Any]]:
    """The rows in a file of Weights & Biases, which has the format of LevelDB's logs: records in blocks of 32 KiB, each
    with a checksum, its length, and whether it is whole (1), a beginning (2), a middle part (3) or an end (4)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            record = Record.FromString(parts)
            parts = b""
            if record.HasField("history"):
                items = record.history.item
                yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
