"""The command that repeats published figures, on tiny archives in the official layouts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
from conftest import EXPERIMENTS, Refused
from safetensors.torch import save_file
from scipy import stats
from tiny_archives import MAKE, SMALL

TINY = [each for each in SMALL if not each.startswith(("train.evaluate_every", "cohort.base.num_gpus"))]
NAMES = (
    *("single net", "independent peers", "mutual, initial weights differ", "mutual, views differ"),
    *("mutual, update intervals differ", "DM2", "self-distillation", "student of DM2", "student of a frozen net"),
)


@pytest.fixture
def reproduce(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command's module."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    import reproduce

    return reproduce


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with weights of the smallest transformer."""
    file = tmp_path_factory.mktemp("teacher") / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    return str(file)


def plan_of(reproduce: ModuleType, data: str, *settings: str) -> Any:
    return reproduce.Plan.of(data, Path("somewhere"), list(settings), "test_vit", "pretrained", Path("work"))


def archive(folder: Path, data: str) -> Path:
    folder.mkdir(parents=True)
    MAKE[data](folder)
    return folder


@pytest.mark.parametrize("data", MAKE)
def test_arms_have_the_published_setting_and_what_their_names_say(reproduce: ModuleType, data: str) -> None:
    """The recipe is that of the published triplet baseline; peers differ in nothing but the diversities of their
    arm. All training classes train, and nothing is selected on test classes."""
    plan = plan_of(reproduce, data)
    assert tuple(reproduce.ARMS) == NAMES
    for name in NAMES[:6]:
        config = plan.config(name, 3)
        first, *others = config.cohort.peers
        assert (first.backbone, first.embedding_size, first.view, first.update_interval) == ("resnet50", 512, "weak", 1)
        assert (first.optimizer.name, first.optimizer.lr, first.optimizer.weight_decay) == ("adam", 1e-5, 1e-5)
        assert len(others) == (name != "single net") and config.seed == 3
        relational = config.loss.relational
        is_mutual = name.startswith(("mutual", "DM2"))
        assert (relational.distance_weight, relational.angle_weight) == ((1, 2) if is_mutual else (0, 0))
        for other in others:
            assert other.seed != first.seed
            assert (other.init_seed != first.init_seed) == (name in ("mutual, initial weights differ", "DM2"))
            assert (other.view != first.view) == (name in ("mutual, views differ", "DM2"))
            assert (other.update_interval != 1) == (name in ("mutual, update intervals differ", "DM2"))
            same = {"name", "seed", "init_seed", "view", "update_interval"}
            assert other.model_dump(exclude=same) == first.model_dump(exclude=same)
        assert config.weights_to_evaluate() == "last" and config.evaluation.split == "test"
        assert (config.data.validation_fraction, config.data.images_per_class) == (0, 5 if "c" in data[0] else 2)
    student = plan.config("student of a frozen net", 0)
    assert [(peer.backbone, peer.frozen) for peer in student.cohort.peers] == [("resnet50", False), ("test_vit", True)]
    assert student.cohort.peers[1].input_size == 224
    changed = plan_of(reproduce, data, "train.steps=9"), plan_of(reproduce, data, "cohort.base.num_gpus=2")
    digests = [[each.digest(name) for name in NAMES] for each in (plan, *changed)]
    assert digests[0] == digests[2] and len({*digests[0], *digests[1]}) == 18


def row(arm: str, seed: int, **figures: Any) -> dict[str, Any]:
    known = {"device": "GPU", "commit": "abc", "seconds": 1800.0, "counts": [5864, 100, 5924, 100]}
    return {"arm": arm, "seed": seed, **known, **figures}


def recall(value: float) -> dict[str, float]:
    return {"recall@1": value, "recall@2": value + 0.1, "map@r": value / 2}


def cells_of(page: str, title: str) -> list[str]:
    [line] = [line for line in page.splitlines() if line.startswith(f"| {title} ")]
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_the_table_has_intervals_beside_published_figures(reproduce: ModuleType) -> None:
    """Means are over seeds, a gain is paired by seed, and three seeds have an interval. A published figure stands
    beside the same method and net only, with its source."""
    alone, first, second, both = [0.6, 0.62, 0.61], [0.61, 0.6, 0.63], [0.63, 0.64, 0.65], [0.66, 0.68, 0.64]
    rows = []
    for seed in range(3):
        rows.append(row("single net", seed, peers=[recall(alone[seed])], untrained=recall(0.4)))
        peers = [recall(first[seed]), recall(second[seed])]
        rows.append(row("independent peers", seed, peers=peers, ensemble=recall(0.65)))
        rows.append(row("DM2", seed, peers=peers, ensemble=recall(both[seed])))
    rows.append(row("student of a frozen net", 0, peers=[recall(0.7)], teacher=recall(0.8)))
    metrics, vit = ("recall@1", "recall@2", "map@r"), reproduce.VIT
    page = reproduce.report("cub200", rows, metrics, [], vit)

    mean = np.mean([first, second], axis=0)
    low, high = stats.ttest_1samp(100 * mean, 0).confidence_interval(0.95)
    assert cells_of(page, "independent peers: mean peer")[1:3] == [
        "3",
        f"{100 * mean.mean():.1f} ± {(high - low) / 2:.1f}",
    ]
    low, high = stats.ttest_rel(100 * mean, 100 * np.array(alone)).confidence_interval(0.95)
    gain = f"+{100 * np.mean(mean - alone):.1f} [{low:+.1f}, {high:+.1f}]"
    assert cells_of(page, "independent peers: mean peer")[5:] == [gain, "not published"]
    low, high = stats.ttest_1samp(100 * (np.array(both) - 0.65), 0).confidence_interval(0.95)
    assert cells_of(page, "DM2: ensemble")[5] == f"+1.0 [{low:+.1f}, {high:+.1f}]"
    assert cells_of(page, "untrained backbone, frozen")[2:5] == ["40.0 ± 0.0", "50.0 ± 0.0", "20.0 ± 0.0"]
    assert cells_of(page, "student of a frozen net")[1:6] == ["1", "70.0", "80.0", "35.0", "+10.0"]

    assert cells_of(page, "single net")[6] == "61.2 [1]"
    assert cells_of(page, "DM2: mean peer")[6] == cells_of(page, "DM2: ensemble")[6] == "69.9 [2]"
    assert cells_of(page, "frozen net, which teaches")[6] == "84.2 [3]"
    assert "[2] DM2 (whether a peer or the ensemble is not stated), net not stated: Park" in page
    assert cells_of(page, "HIST")[2:] == ["71.4", "its tracker, issue 2"]
    assert "5.0 hours in total" in page and "do not compare" not in page and "Settings other" not in page
    other = reproduce.report("inshop", rows, metrics, ["train.steps=9"], "test_vit")
    assert cells_of(other, "single net")[6] == cells_of(other, "DM2: ensemble")[6] == "not published"
    assert "do not compare with published ones" in other and "`train.steps=9`" in other


def test_every_published_figure_has_a_source(reproduce: ModuleType) -> None:
    import yaml
    from reproduction.table import PUBLISHED

    for each in yaml.safe_load(PUBLISHED.read_text()):
        assert each["method"] and each["net"] and each["read_in"] and set(each["recall"]) <= set(MAKE)
        assert all(isinstance(figure, str) and float(figure[:4]) > 60 for figure in each["recall"].values())


@pytest.mark.ray  # git
def test_the_time_is_said_before_anything_runs(
    reproduce: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours follow from images and a speed. What has a row is not counted."""
    root, out = archive(tmp_path / "data", "cub200"), tmp_path / "out"
    options = {"settings": [*TINY, "train.steps=1000"], "teacher": "test_vit", "dry_run": True, "gpus": 0}
    arms = ["single net", "student of DM2"]
    reproduce.main("cub200", root, out=out, images_per_second=2.0, arm=arms, seeds=2, **options)
    printed = capsys.readouterr().out
    # 1,000 steps of 4 images; 16 training and 8 test images are embedded, in a third of the time.
    single = 4000 + (3 * 8) / 3
    dm2 = 2 * 4000 + (2 * 8) / 3
    student = 4000 + (2 * 16 + 3 * 8) / 3
    total = 2 * (single + dm2 + student) / 2
    assert f"6 runs, about {total / 3600:.2g} core-hours" in printed
    assert f"  DM2: 2 runs, {2 * dm2 / 2 / 3600:.1f} h" in printed
    assert "2 images/s that a net learns from (as --images-per-second says)" in printed
    assert not (out / "runs").exists() and not (out / "table.md").exists()


@pytest.mark.ray  # git
def test_mistakes_are_named(
    reproduce: ModuleType, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sentence says what is wrong; for an archive also where to get it, and where its files belong."""
    out = tmp_path / "out"

    def run(data: str, root: Path, *more: str, **options: Any) -> None:
        given = {"images_per_second": 1.0, "gpus": 0, "teacher": "test_vit", **options}
        reproduce.main(data, root, out=out, settings=[*TINY, *more], **given)

    with refused("no data set cub; the data sets are: cub200, cars196, sop, inshop; did you mean cub200?"):
        run("cub", tmp_path)
    with refused("no arm DM3; the arms are: single net; "):
        run("cub200", tmp_path, arm=["DM3"])
    with refused("unknown backbone 'vit_tinny"):
        run("cub200", tmp_path, teacher="vit_tinny")
    with refused("cohort.peers may differ in init_seed, update_interval, update_mode, view only"):
        run("cub200", tmp_path, "cohort.peers.1.embedding_size=8")
    with refused("--gpus is 99, and this machine has"):
        run("cub200", tmp_path, gpus=99)

    with refused(
        "CUB-200-2011 is not in .*: unpack CUB_200_2011.tgz from https.* so that there is CUB_200_2011/images"
    ):
        run("cub200", tmp_path, "data.download=false")
    with refused("Cars-196 is not in .*; put there cars_annos.mat and car_ims/"):
        run("cars196", tmp_path)
    root = archive(tmp_path / "data", "sop")
    missing = next(root.rglob("*.png"))
    missing.unlink()
    with refused(rf"incomplete, 1 of 24 images are missing, such as chair_final/{missing.name}: unpack Stanford"):
        run("sop", root)
    (root / "Ebay_test.txt").unlink()
    with refused("Ebay_test.txt is missing: unpack Stanford_Online_Products.zip"):
        run("sop", root)

    root = archive(tmp_path / "whole", "sop")
    (out / "rows.jsonl").write_text(json.dumps({"arm": "DM2", "settings": "other", "seed": 0, "images": "x"}) + "\n")
    with refused(r"rows.jsonl has rows of other settings than those of now \(DM2\)"):
        run("sop", root)
    plan = reproduce.Plan.of("sop", root, TINY, "test_vit", "pretrained", out)
    known = {"arm": "DM2", "settings": plan.digest("DM2"), "seed": 0, "images": "x"}
    (out / "rows.jsonl").write_text(json.dumps(known) + "\n")
    with refused("rows of other images"):
        run("sop", root)
    (out / "rows.jsonl").unlink()
    monkeypatch.setattr(sys, "stdin", (tmp_path / "data" / "Ebay_train.txt").open())
    with refused("nobody can be asked whether to start: give --yes"):
        run("sop", root)


def test_a_student_and_its_teacher_run(
    reproduce: ModuleType, private_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student brings its teacher along. Another start runs nothing, and a gone teacher runs again for a new student,
    without a second row."""
    root, out = archive(tmp_path / "data", "inshop"), tmp_path / "out"

    def run(*arms: str) -> list[dict[str, Any]]:
        reproduce.main("inshop", root, seeds=1, gpus=0, out=out, arm=list(arms), settings=TINY, yes=True)
        return [json.loads(line) for line in (out / "rows.jsonl").open()]

    rows = run("self-distillation")
    assert [each["arm"] for each in rows] == ["single net", "self-distillation"]
    assert set(rows[0]["untrained"]) == {"recall@1", "recall@10", "recall@20", "recall@30", "map@r"}
    printed = capsys.readouterr().out
    assert "2 runs, about" in printed and "(measured now, " in printed and "steps of DM2 on" in printed
    assert (out / "table.md").read_text() in printed
    assert run("self-distillation") == rows and "runs, about" not in capsys.readouterr().out


def start(root: Path, out: Path, teacher: str, data: str, *settings: str) -> list[str]:
    sets = [part for each in (*TINY, *settings) for part in ("--set", each)]
    options = ["--root", root, "--out", out, "--teacher", "test_vit", "--teacher-weights", teacher, "--gpus", "0"]
    return [sys.executable, str(EXPERIMENTS / "reproduce.py"), data, *map(str, options), *sets, "--yes"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("data", ["cars196", "sop", "inshop"])
def test_all_arms_run(tmp_path: Path, teacher: str, data: str) -> None:
    """One seed of every arm, and a table with all lines."""
    command = start(archive(tmp_path / "data", data), tmp_path / "out", teacher, data)
    ended = subprocess.run([*command, "--seeds", "1"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").open()]
    assert sorted(each["arm"] for each in rows) == sorted(NAMES)
    assert ended.stdout.count("not published") >= 14 and "| student of a frozen net " in ended.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path, teacher: str) -> None:
    """After SIGKILL and the same command, finished rows are unchanged, and a run that had a checkpoint goes on in its
    folder, which a run that starts again would have removed first."""
    out = tmp_path / "out"
    command = [*start(archive(tmp_path / "data", "cub200"), out, teacher, "cub200", "train.steps=60"), "--seeds", "1"]

    def unfinished() -> dict[Path, int]:
        """The steps of the last checkpoint of each run that has not ended."""
        found = {}
        for index in out.glob("runs/*/checkpoints/index.json"):
            run = index.parent.parent
            if not (run / "results.json").exists():
                found[run] = int(json.loads(index.read_text())["last"].split("-")[1])
        return found

    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 1200
    file = out / "rows.jsonl"
    while not (
        file.exists() and file.read_bytes().count(b"\n") >= 2 and any(5 < n < 40 for n in unfinished().values())
    ):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    kept = file.read_bytes()
    began = {run: (run / "config.yaml").stat().st_mtime_ns for run, step in unfinished().items() if step}
    assert began

    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert file.read_bytes().startswith(kept)
    rows = [json.loads(line) for line in file.open()]
    assert sorted(each["arm"] for each in rows) == sorted(NAMES)
    assert {run: (run / "config.yaml").stat().st_mtime_ns for run in began} == began
    third = subprocess.run(command, capture_output=True, text=True)
    assert third.returncode == 0 and file.read_bytes().count(b"\n") == 9 and "runs, about" not in third.stdout
    assert third.stdout.strip().startswith("# CUB-200-2011")
