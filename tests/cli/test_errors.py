"""What goes wrong is one clear sentence on standard error and exit code 2, before any training
where it can be known; a peer that is lost is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import tiny
from typer.testing import CliRunner

from ray_dmml import Config, load_cohort
from ray_dmml.cli.main import app
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import NonFiniteLossError, PeerLostError

Edit = Callable[[dict[str, Any]], None]


def cli(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def complaint(*arguments: str | Path) -> str:
    """The one line that a command ends in; it must end so."""
    ended = cli(*arguments)
    assert ended.exit_code == 2, ended.output
    assert isinstance(ended.exception, SystemExit)
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), ended.stderr
    return lines[0]


@pytest.fixture
def config_file(tmp_path: Path, image_folder: Path) -> Callable[..., Path]:
    """Writes a config that trains, but for what ``edit`` makes of it."""

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
    ("edit", "told"),
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
        (set_to("offline", *BASE, "weights"), "'offline' are those of tf_efficientnet_lite0, tf_"),
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
def test_a_config_that_cannot_train(
    config_file: Callable[..., Path], tmp_path: Path, edit: Edit, told: str
) -> None:
    """Known before training: one sentence, no run folder."""
    out = tmp_path / "run"
    said = complaint("train", "--local", "--config", config_file(edit), "--out", out)
    assert told in said and not out.exists()


def test_arguments_that_cannot_be(config_file: Callable[..., Path], tmp_path: Path) -> None:
    """A missing config, a --set that is none, a folder that is no run, --resume with --out."""
    train = ("train", "--local")
    out = tmp_path / "run"
    assert "config file nope.yaml does not exist" in complaint(*train, "--config", "nope.yaml")
    config = config_file()
    assert "write KEY=VALUE" in complaint(*train, "--config", config, "--set", "seed")
    assert "is not the folder of a run" in complaint(*train, "--resume", tmp_path)
    assert "is not the folder of a run" in complaint("evaluate", tmp_path / "nothing")
    said = complaint(*train, "--config", config, "--out", out, "--init-from", tmp_path)
    assert "is not the folder of a run" in said
    assert "unknown setting" in complaint("config", "--set", "sede=1")
    shutil.copy(config, tmp_path / "config.yaml")
    assert "checkpoint" in complaint("evaluate", tmp_path)
    assert "takes no --out" in complaint(*train, "--resume", tmp_path, "--out", out)
    said = complaint(*train, "--resume", tmp_path, "--init-from", tmp_path)
    assert "takes no --init-from" in said
    assert not out.exists()


def test_images_that_cannot_be(
    config_file: Callable[..., Path], tmp_path: Path, image_folder: Path
) -> None:
    """An empty class, a corrupt image (named), too few classes; `skip` leaves the image out."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    out = tmp_path / "run"
    config = config_file(set_to(str(images), "data", "root"))
    command = ("train", "--local", "--config", config, "--out", out)
    (images / "class03" / "2.png").write_bytes(b"\x89PNG\r\n broken")
    said = complaint(*command)
    assert "image class03/2.png cannot be read" in said and "on_bad_image=skip" in said
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
    said = complaint(*command, "--set", "data.validation_fraction=0")
    assert "data.images_per_class is 3 and the largest training class has 1" in said
    for folder in sorted(images.iterdir())[2:]:
        shutil.rmtree(folder)
    assert "2 class folders" in complaint(*command)
    assert not out.exists()


def test_a_label_in_both_splits(
    config_file: Callable[..., Path], tmp_path: Path, image_folder: Path
) -> None:
    """A manifest whose test classes are not unseen is refused with the label."""
    rows = ["path,label,split"]
    for number in range(16):
        split = "train" if number < 8 else "validation"
        rows += [f"class{number:02d}/{i}.png,c{number % 15},{split}" for i in range(5)]
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")

    def edit(raw: dict[str, Any]) -> None:
        raw["data"] |= {"name": "manifest", "manifest": str(tmp_path / "m.csv")}

    out = tmp_path / "run"
    said = complaint("train", "--local", "--config", config_file(edit), "--out", out)
    assert "label 'c0' is in both splits" in said and not out.exists()


def test_weights_that_do_not_fit(config_file: Callable[..., Path], tmp_path: Path) -> None:
    """The first tensors that differ are named."""
    path, out = tmp_path / "w.pth", tmp_path / "run"
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    config = config_file(set_to(str(path), *BASE, "weights"))
    said = complaint("train", "--local", "--config", config, "--out", out)
    assert f"weights {path} do not fit: " in said and "is missing" in said
    assert not out.exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A finished run; not to be written into."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "c.yaml").write_text(yaml.safe_dump(tiny(image_folder)))
    ended = cli("train", "--local", "--config", folder / "c.yaml", "--out", folder / "run")
    assert ended.exit_code == 0, ended.output
    return folder / "run"


def test_a_run_is_not_overwritten(config_file: Callable[..., Path], run: Path) -> None:
    """A folder that exists is left as it is, and the way to go on is told."""
    before = (run / "metrics.jsonl").read_bytes()
    said = complaint("train", "--local", "--config", config_file(), "--out", run)
    assert "already exists" in said and f"--resume {run}" in said
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_changed_run_is_not_resumed(run: Path, tmp_path: Path) -> None:
    """Whether changed by --set or in the run's own config.yaml; more steps are allowed."""
    folder = shutil.copytree(run, tmp_path / "run")
    key = "cohort.peers.1.optimizer.lr"
    said = complaint("train", "--local", "--resume", folder, "--set", f"{key}=0.5")
    assert f"its config was changed: {key} was 0.001 and is 0.5" in said
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        text.replace("classes_per_batch: 4", "classes_per_batch: 5")
    )
    said = complaint("train", "--local", "--resume", folder)
    assert "data.classes_per_batch was 4 and is 5" in said
    (folder / "config.yaml").write_text(text)
    ended = cli("train", "--local", "--resume", folder, "--set", "train.steps=8")
    assert ended.exit_code == 0, ended.output
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 8


def test_damaged_checkpoints_are_told(run: Path, tmp_path: Path) -> None:
    """`evaluate` and `--resume` name the file instead of judging damaged weights."""
    folder = shutil.copytree(run, tmp_path / "run")
    for file in folder.glob("checkpoints/*/peer1/weights.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    for command in (("evaluate", folder), ("train", "--local", "--resume", folder)):
        said = complaint(*command)
        assert "peer1/weights.safetensors is damaged" in said


def test_a_good_run_prints_its_table(run: Path) -> None:
    """`evaluate` prints a table or the JSON of results.json; `config` prints what can be loaded."""
    ended = cli("evaluate", run)
    assert ended.exit_code == 0 and "8 unseen classes" in ended.stdout
    for row in ("peer0, untrained", "ensemble, untrained", "peer1", "ensemble"):
        assert row in ended.stdout
    printed = json.loads(cli("evaluate", run, "--json").stdout)
    results = json.loads((run / "results.json").read_text())
    assert all(printed[key] == results[key] for key in printed)
    shown = cli("config", "--config", run / "config.yaml").stdout
    assert Config.parse(yaml.safe_load(shown)) == Config.load(run / "config.yaml")


def test_an_error_is_the_same_from_a_shell(tmp_path: Path) -> None:
    """The command itself: exit code 2, nothing on standard output, no traceback."""
    command = [sys.executable, "-m", "ray_dmml.cli.main", "train", "--set", "train.stepps=3"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite(config_file: Callable[..., Path], tmp_path: Path) -> None:
    """The peer, the step and the term are named; the last checkpoint is whole and its weights are
    those from before."""
    out = tmp_path / "run"
    ruin = {"name": "sgd", "lr": 1e30}
    config = config_file(
        lambda raw: raw["cohort"].update(peers=[{}, {"optimizer": ruin}]),
        train={"steps": 6, "evaluate_every": 0, "log_every": 6},
    )
    said = complaint("train", "--local", "--config", config, "--out", out)
    assert "peer1: the embedding is not finite at step 2" in said
    assert json.loads((out / "checkpoints" / "index.json").read_text())["last"] == "step-00000000"
    net = load_cohort(out, "last").peers["peer1"].net
    assert all(torch.isfinite(tensor).all() for tensor in net.state_dict().values())
    again = complaint("train", "--local", "--resume", out)
    assert "peer1: the embedding is not finite at step 2" in again


def test_embeddings_that_are_not_finite_in_an_evaluation(
    config_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Where the evaluation after an update meets them first, it names the peer too."""
    ruin = {"name": "sgd", "lr": 1e30}
    config = config_file(
        lambda raw: raw["cohort"].update(peers=[{}, {"optimizer": ruin}]),
        train={"steps": 6, "evaluate_every": 1, "log_every": 6},
    )
    said = complaint("train", "--local", "--config", config, "--out", tmp_path / "run")
    assert "peer1" in said and "not finite" in said


# --- on Ray ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("num_gpus=1", "the peers ask for 2 GPUs (cohort.peers.*.num_gpus), but the cluster has 0"),
        ("num_cpus=3", "the peers ask for 6 CPUs (cohort.peers.*.num_cpus), but the cluster has 4"),
        ("weights=/no/file.pth", "weights file /no/file.pth does not exist"),
    ],
)
def test_what_a_cluster_does_not_have(
    ray_start_4_cpus: None,
    config_file: Callable[..., Path],
    tmp_path: Path,
    setting: str,
    told: str,
) -> None:
    """More GPUs or CPUs than there are is said with what there is, at once; a mistake that an
    actor finds is told as if there were no actor."""
    out = tmp_path / "run"
    said = complaint(
        "train", "--config", config_file(), "--out", out, "--set", f"cohort.base.{setting}"
    )
    assert told in said and not out.exists()


def ray_cohort(image_folder: Path, run: dict[str, Any] | None = None, **cohort: Any) -> Any:
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    changes = {"cohort": {**tiny(image_folder)["cohort"], **cohort}, "run": run or {}}
    config = Config.parse(tiny(image_folder, **changes))
    return RayCohort(config, load_splits(config.data))


@pytest.mark.parametrize(
    "transport", ["direct", pytest.param("coordinator", marks=pytest.mark.slow)]
)
def test_a_killed_peer_is_named(ray_start_4_cpus: None, image_folder: Path, transport: str) -> None:
    """SIGKILL from outside amid training ends the run with the peer's name, long before any
    deadline."""
    with closing(ray_cohort(image_folder, transport=transport)) as cohort:
        victim = cohort.pids["peer1"]

        def kill(finished: int) -> None:
            if finished >= 2:
                os.kill(victim, signal.SIGKILL)

        with pytest.raises(PeerLostError, match=r"^peer1 died in step \d+: its process was killed"):
            cohort.run(0, 1_000_000, kill)


@pytest.mark.parametrize(
    "transport", ["direct", pytest.param("coordinator", marks=pytest.mark.slow)]
)
def test_a_silent_peer_is_named(ray_start_4_cpus: None, image_folder: Path, transport: str) -> None:
    """A peer that hangs trips the deadline and is named, not the one that waited."""
    with closing(
        ray_cohort(image_folder, {"heartbeat_timeout_s": 6}, transport=transport)
    ) as cohort:
        victim = cohort.pids["peer1"]

        def stop(finished: int) -> None:
            if finished >= 2:
                os.kill(victim, signal.SIGSTOP)

        cohort.run(0, 1, lambda finished: None)  # the first steps may take as long as the start
        try:
            with pytest.raises(PeerLostError, match=r"^peer1: no sign of life for 6 s"):
                cohort.run(1, 1_000_000, stop)
        finally:
            os.kill(victim, signal.SIGCONT)


def test_a_loss_that_is_not_finite_on_ray(ray_start_4_cpus: None, image_folder: Path) -> None:
    """The error of the peer that is the cause, not that of the one that waited in vain."""
    peers = [{}, {"optimizer": {"name": "sgd", "lr": 1e30}}]
    with (
        closing(ray_cohort(image_folder, peers=peers)) as cohort,
        pytest.raises(NonFiniteLossError, match="peer1: the embedding is not finite at step 2"),
    ):
        cohort.run(0, 10, lambda finished: None)
