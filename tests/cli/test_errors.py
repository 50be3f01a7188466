"""A mistake of the user is one sentence on standard error and exit code 2, before any training if it can
be known by then. No test here starts Ray."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
import yaml
from conftest import tiny
from typer.testing import CliRunner

from ray_dmml import load_cohort
from ray_dmml.cli.main import app
from ray_dmml.cli.output import user_errors

Edit = Callable[[dict[str, Any]], None]


def cli(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def complaint(*arguments: str | Path) -> str:
    """The error of a command. It must be one line on standard error, with exit code 2."""
    ended = cli(*arguments)
    assert ended.exit_code == 2, ended.output
    assert isinstance(ended.exception, SystemExit)
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), ended.stderr
    return lines[0]


@pytest.fixture
def config_file(tmp_path: Path, image_folder: Path) -> Callable[..., Path]:
    """Writes a config that can train, unless ``edit`` changes it."""

    def write(edit: Edit = lambda raw: None, **changes: Any) -> Path:
        raw = tiny(image_folder, **changes)
        edit(raw)
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
        return tmp_path / "c.yaml"

    return write


def set_to(value: Any, *keys: str) -> Edit:
    """Sets a nested entry."""

    def edit(raw: dict[str, Any]) -> None:
        for key in keys[:-1]:
            raw = raw.setdefault(key, {})
        raw[keys[-1]] = value

    return edit


BASE = ("cohort", "base")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_to(4, "train", "stepps"), "train.stepps: unknown setting; did you mean 'steps'?"),
        (set_to("many", "train", "steps"), "train.steps: Input should be a valid integer"),
        (set_to([{"update_interval": 0}], "cohort", "peers"), "update_interval: Input should be gre"),
        (set_to(1, "data", "images_per_class"), "data.images_per_class: Input should be greater"),
        (set_to(20, "data", "classes_per_batch"), "classes_per_batch is 20 but only 6 classes are"),
        (set_to(8, "data", "images_per_class"), "32 images needs more than the 30 training images"),
        (set_to("/no/where", "data", "root"), "/no/where is not an existing folder"),
        (set_to(0.9, "data", "validation_fraction"), "validation_fraction 0.9 holds out"),
        (set_to("test_resnett", *BASE, "backbone"), "unknown backbone 'test_resnett': it must be"),
        (set_to("/no/file.pth", *BASE, "weights"), "weights file /no/file.pth does not exist"),
        (set_to([{"name": "RandomKrop"}], *BASE, "view"), "view of peer0: unknown transform 'Random"),
        (set_to([{"name": "ToImage"}], *BASE, "view"), "view of peer0 gives torch.uint8 (3, 36, 36)"),
        (set_to("float16", *BASE, "amp"), "peer0: amp float16 needs a GPU"),
        (set_to({"name": "TripletLoss"}, "loss", "metric"), "no loss 'TripletLoss'; did you mean"),
        (
            set_to({"name": "ContrastiveLoss", "args": {"margin": 1}}, "loss", "metric"),
            "ContrastiveLoss does not take margin; it takes",
        ),
        (
            set_to({"miner": {"name": "NoMiner"}}, "loss", "metric"),
            "loss.metric.miner: there is no miner 'NoMiner'",
        ),
    ],
)  # fmt: skip
def test_a_wrong_config(config_file: Callable[..., Path], tmp_path: Path, edit: Edit, message: str) -> None:
    """It is known before training: one sentence, no run folder."""
    out = tmp_path / "run"
    error = complaint("train", "--local", "--config", config_file(edit), "--out", out)
    assert message in error and not out.exists()


def test_wrong_arguments(config_file: Callable[..., Path], tmp_path: Path) -> None:
    """A missing config, a wrong --set, a folder without a run, --resume with --out."""
    train = ("train", "--local")
    out = tmp_path / "run"
    assert "config file nope.yaml does not exist" in complaint(*train, "--config", "nope.yaml")
    config = config_file()
    assert "write KEY=VALUE" in complaint(*train, "--config", config, "--set", "seed")
    assert "is not the folder of a run" in complaint(*train, "--resume", tmp_path)
    assert "is not the folder of a run" in complaint("evaluate", tmp_path / "nothing")
    error = complaint(*train, "--config", config, "--out", out, "--init-from", tmp_path)
    assert "is not the folder of a run" in error
    assert "unknown setting" in complaint("config", "--set", "sede=1")
    shutil.copy(config, tmp_path / "config.yaml")
    assert "checkpoint" in complaint("evaluate", tmp_path)
    assert "give no --out" in complaint(*train, "--resume", tmp_path, "--out", out)
    error = complaint(*train, "--resume", tmp_path, "--init-from", tmp_path)
    assert "takes no --init-from" in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "10"), "--set KEY=VALUE; the length is 'train.steps'"),
        (("--batch-size", "10"), "--set KEY=VALUE; a batch is 'data.classes_per_batch' classes"),
        (("--lr", "1"), "--set KEY=VALUE; did you mean 'cohort.base.optimizer.lr'?"),
        (("--weights", "pretrained"), "--set KEY=VALUE; did you mean 'cohort.base.weights'?"),
        (("--data", "photos"), "--set KEY=VALUE; the folder of your images is 'data.root'"),
        (("--steps=5",), "--set KEY=VALUE; did you mean 'train.steps'?"),
        (("photos.yaml",), "A config is given as --config FILE, a setting as --set KEY=VALUE"),
    ],
)
def test_options_that_are_settings(arguments: tuple[str, ...], message: str) -> None:
    """What people write from habit gets the option and the setting to write instead."""
    ended = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["train", *arguments])
    assert ended.exit_code == 2 and message in ended.stderr


def test_wrong_images(config_file: Callable[..., Path], tmp_path: Path, image_folder: Path) -> None:
    """An empty class, a corrupt image, which is named, too few classes. `skip` leaves the image out."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    out = tmp_path / "run"
    config = config_file(set_to(str(images), "data", "root"))
    command = ("train", "--local", "--config", config, "--out", out)
    (images / "class03" / "2.png").write_bytes(b"\x89PNG\r\n broken")
    error = complaint(*command)
    assert "image class03/2.png cannot be read" in error and "on_bad_image=skip" in error
    assert not out.exists()

    ended = cli(*command, "--set", "data.on_bad_image=skip", "--set", "train.steps=2")
    assert ended.exit_code == 0, ended.output
    assert "class03/2.png" in ended.output and "left out 1" in ended.output
    assert json.loads((out / "run.json").read_text())["skipped_images"] == ["class03/2.png"]
    assert cli("evaluate", out).exit_code == 0

    empty = images / "class04"
    shutil.rmtree(empty)
    empty.mkdir()
    shutil.rmtree(out)
    assert "class04 has no images" in complaint(*command)
    shutil.rmtree(empty)
    for image in images.glob("class0[0-8]/[1-4].png"):
        image.unlink()
    error = complaint(*command, "--set", "data.validation_fraction=0")
    assert "data.images_per_class is 3 and the largest training class has 1" in error
    for folder in sorted(images.iterdir())[2:]:
        shutil.rmtree(folder)
    assert "2 class folders" in complaint(*command)
    assert not out.exists()


def test_a_loss_that_needs_equal_classes(config_file: Callable[..., Path], tmp_path: Path, image_folder: Path) -> None:
    """It is refused where a class has fewer images than others, which a batch might contain only in mid-run."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    config = config_file(set_to({"name": "SmoothAPLoss"}, "loss", "metric"), train={"steps": 1})
    command = ("train", "--local", "--config", config, "--set", f"data.root={images}")
    assert cli(*command, "--out", tmp_path / "equal").exit_code == 0
    for image in (images / "class00").glob("[2-4].png"):
        image.unlink()
    error = complaint(*command, "--set", "data.validation_fraction=0", "--out", tmp_path / "run")
    assert "SmoothAPLoss does not work with batches in which a class has fewer images" in error
    assert "1 training classes have fewer than data.images_per_class, which is 3" in error
    assert not (tmp_path / "run").exists()


def test_a_label_in_both_splits(config_file: Callable[..., Path], tmp_path: Path, image_folder: Path) -> None:
    """A manifest is refused if a test class is also a training class. The label is named."""
    rows = ["path,label,split"]
    for number in range(16):
        split = "train" if number < 8 else "validation"
        rows += [f"class{number:02d}/{i}.png,c{number % 15},{split}" for i in range(5)]
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")

    def edit(raw: dict[str, Any]) -> None:
        raw["data"] |= {"name": "manifest", "manifest": str(tmp_path / "m.csv")}

    out = tmp_path / "run"
    error = complaint("train", "--local", "--config", config_file(edit), "--out", out)
    assert "label 'c0' is in both splits" in error and not out.exists()


def test_weights_that_do_not_fit(config_file: Callable[..., Path], tmp_path: Path) -> None:
    """The first tensors that differ are named."""
    path, out = tmp_path / "w.pth", tmp_path / "run"
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    config = config_file(set_to(str(path), *BASE, "weights"))
    error = complaint("train", "--local", "--config", config, "--out", out)
    assert f"weights {path} do not fit: " in error and "is missing" in error
    assert not out.exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A finished run. Tests do not write into it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "c.yaml").write_text(yaml.safe_dump(tiny(image_folder)))
    ended = cli("train", "--local", "--config", folder / "c.yaml", "--out", folder / "run")
    assert ended.exit_code == 0, ended.output
    return folder / "run"


def test_a_run_is_not_overwritten(config_file: Callable[..., Path], run: Path) -> None:
    """A folder that exists stays unchanged, and the message says how to continue it."""
    before = (run / "metrics.jsonl").read_bytes()
    error = complaint("train", "--local", "--config", config_file(), "--out", run)
    assert f"{run} already exists; give another folder (out), or continue this run (resume)" in error
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT])
def test_a_path_that_cannot_be_used_is_named(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """What a user can mend. A file that is missing may be a fault of the package, which needs its traceback."""
    with pytest.raises(typer.Exit if number == errno.EACCES else FileNotFoundError), user_errors():
        raise OSError(number, os.strerror(number), "/some/file")
    assert capsys.readouterr().err == ("error: /some/file: Permission denied\n" if number == errno.EACCES else "")


def test_a_mistyped_setting_is_no_older_version(run: Path) -> None:
    """The run is as it was; only --set is wrong."""
    error = complaint("train", "--local", "--resume", run, "--set", "run.max_restarts=9")
    assert "run: unknown setting" in error and "older version" not in error and "with overrides" in error


def test_a_changed_run_is_not_resumed(run: Path, tmp_path: Path) -> None:
    """By --set, or in the run's own config.yaml. More steps are allowed."""
    folder = shutil.copytree(run, tmp_path / "run")
    key = "cohort.peers.1.optimizer.lr"
    error = complaint("train", "--local", "--resume", folder, "--set", f"{key}=0.5")
    assert f"cannot be resumed, because its config was changed: {key} was 0.001 and is 0.5" in error
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("classes_per_batch: 4", "classes_per_batch: 5"))
    error = complaint("train", "--local", "--resume", folder)
    assert "data.classes_per_batch was 4 and is 5" in error
    (folder / "config.yaml").write_text(text)
    ended = cli("train", "--local", "--resume", folder, "--set", "train.steps=8")
    assert ended.exit_code == 0, ended.output
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 8


def test_damaged_checkpoints_are_named(run: Path, tmp_path: Path) -> None:
    """`evaluate` and `--resume` name the file instead of using damaged weights."""
    folder = shutil.copytree(run, tmp_path / "run")
    for file in folder.glob("checkpoints/*/peer1/weights.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    for command in (("evaluate", folder), ("train", "--local", "--resume", folder)):
        error = complaint(*command)
        assert "peer1/weights.safetensors is damaged" in error


@pytest.mark.ray
def test_an_error_is_the_same_from_a_shell(tmp_path: Path) -> None:
    """The command itself: exit code 2, nothing on standard output, no traceback."""
    command = [sys.executable, "-m", "ray_dmml.cli", "train", "--set", "train.stepps=3"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite(config_file: Callable[..., Path], tmp_path: Path) -> None:
    """The peer, the step and the term are named. The last checkpoint is whole, and its weights are from
    before that step."""
    out = tmp_path / "run"
    ruin = {"name": "sgd", "lr": 1e30}
    config = config_file(
        lambda raw: raw["cohort"].update(peers=[{}, {"optimizer": ruin}]),
        train={"steps": 6, "evaluate_every": 0, "log_every": 6},
    )
    error = complaint("train", "--local", "--config", config, "--out", out)
    assert "peer1: the embedding is not finite at step 2" in error
    assert json.loads((out / "checkpoints" / "index.json").read_text())["last"] == "step-00000000"
    net = load_cohort(out, "last").peers["peer1"].net
    assert all(torch.isfinite(tensor).all() for tensor in net.state_dict().values())
    again = complaint("train", "--local", "--resume", out)
    assert "peer1: the embedding is not finite at step 2" in again


def test_embeddings_that_are_not_finite_in_an_evaluation(config_file: Callable[..., Path], tmp_path: Path) -> None:
    """If the evaluation after an update is the first to see them, it names the peer too."""
    ruin = {"name": "sgd", "lr": 1e30}
    config = config_file(
        lambda raw: raw["cohort"].update(peers=[{}, {"optimizer": ruin}]),
        train={"steps": 6, "evaluate_every": 1, "log_every": 6},
    )
    error = complaint("train", "--local", "--config", config, "--out", tmp_path / "run")
    assert "peer1" in error and "not finite" in error
