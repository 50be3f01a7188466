"""`distill`: what it prints, and its mistakes. No test here starts Ray."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import yaml
from conftest import tiny
from typer.testing import CliRunner

from ray_dmml.cli.main import app


def cli(*arguments: str | Path) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["distill", *map(str, arguments)])


@pytest.fixture
def config(image_folder: Path, tmp_path: Path) -> Path:
    raw = tiny(image_folder, train={"steps": 2, "tensorboard": False}, evaluation={"untrained": False})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "c.yaml"


@pytest.fixture
def teacher(config: Path) -> tuple[str | Path, ...]:
    """Options of a teacher that is not of a run."""
    file = config.with_name("vit.safetensors")
    safetensors.torch.save_file(timm.create_model("test_vit").state_dict(), file)
    return "--teacher", "test_vit", "--teacher-weights", file, "--config", config


def test_a_model_teaches_and_then_the_run(teacher: tuple[str | Path, ...], tmp_path: Path) -> None:
    """The first has one teacher; the second has two, and so a row for their ensemble."""
    first, second = tmp_path / "first", tmp_path / "second"
    ended = cli(*teacher, "--student", "test_resnet", "--local", "--json", "--out", first)
    assert ended.exit_code == 0, ended.output
    results = json.loads(ended.stdout)
    assert results == json.loads((first / "results.json").read_text())
    assert list(results["peers"]) == ["student", "teacher"] and "teachers_ensemble" not in results
    ended = cli(first, "--student", "test_convnext", "--teacher-view", "own", "--local", "--out", second)
    assert ended.exit_code == 0, ended.output
    rows = [row.strip("│ ").split("│")[0].strip() for row in ended.stdout.splitlines()]
    names = ["student1", "student", "teacher", "ensemble of the teachers", "ensemble of all"]
    assert [row for row in rows if row in names] == names
    assert f"run: {second}" in ended.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student", "test_resnett"], "unknown backbone 'test_resnett': it must be a timm model name; did you mean"),
        (
            ["--student", "test_resnet", "--set", "train.stepps=3"],
            "train.stepps: unknown setting; did you mean",
        ),
        (["--student", "test_resnet", "--weights", "gone.pth"], "weights file .*gone.pth does not exist"),
        (["--student", "test_resnet", "RUN"], "give one of the two"),
        (["--student", "test_resnet", "--set", "data.root=gone"], "gone is not an existing folder"),
    ],
)
def test_mistakes_are_one_sentence(teacher: tuple[str | Path, ...], options: list[str], message: str) -> None:
    ended = cli(*teacher, *options, "--local")
    assert ended.exit_code == 2 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert re.search(message, ended.stderr), ended.stderr
