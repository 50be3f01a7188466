"""Candidates for an ablation's settings: judged on held-out training classes alone, each row kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from test_ablation import EXPERIMENTS, PARTS, STEPS
from test_ablation import folder as ablation

from ray_dmml.cohort.local import LocalCohort
from ray_dmml.errors import UserError
from ray_dmml.retrieval.metrics import retrieval_metrics

__all__ = ["ablation"]  # the fixture

CANDIDATES: dict[str, Any] = {
    "held_out": {"apples": {"prefix": "apple"}, "some": {"fraction": 0.25, "fold": 1}},
    "candidates": {
        "independent": {"slow": {"cohort.base.optimizer.lr": 0.001}, "as in arms.yaml": None},
        "mutual + all": {"other views": {"view": [{"view": "strong"}, {"view": "weak"}, {}, {}]}},
    },
}


@pytest.fixture
def folder(ablation: Path, image_folder: Path) -> Path:
    """An ablation whose first three classes are apples."""
    images = ablation / "images"
    shutil.copytree(image_folder, images)
    for number in range(3):
        (images / f"class{number:02d}").rename(images / f"apple{number:02d}")
    raw = yaml.safe_load((ablation / "config.yaml").read_text())
    raw["data"]["root"] = str(images)
    (ablation / "config.yaml").write_text(yaml.safe_dump(raw))
    return ablation


@pytest.fixture
def choose() -> Iterator[ModuleType]:
    """The experiment's own module."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import choose

        yield choose
    finally:
        sys.path.remove(str(EXPERIMENTS))


def candidates(choose: ModuleType, folder: Path, changes: dict[str, Any] | None = None) -> Any:
    written = {**CANDIDATES, **(changes or {})}
    (folder / "candidates.yaml").write_text(yaml.safe_dump(written))
    return choose.Candidates(folder, [])


def test_only_training_classes_are_held_out(choose: ModuleType, folder: Path) -> None:
    """Those of the prefix, or as many as the fraction says; no class is in two parts, and no test class
    in any."""
    found = candidates(choose, folder)
    images = found.images("independent", "slow")
    names = set(images.train.class_names)
    prefixed = {name for name in names if name.startswith("apple")}
    assert images.validation is None and prefixed and prefixed != names
    for held_out in CANDIDATES["held_out"]:
        splits = found.splits(images.train, held_out)
        trained, held = set(splits.train.class_names), set(splits.validation.class_names)
        assert trained | held == names and not trained & held
        assert not (trained | held) & set(images.test.class_names)
        assert len(splits.train) + len(splits.validation) == len(images.train)
        if held_out == "apples":
            assert held == prefixed
        else:
            assert len(held) == round(0.25 * len(names))


def test_a_candidate_changes_its_arm_and_no_other_setting(choose: ModuleType, folder: Path) -> None:
    """Settings of both kinds of arms, or a diversity; without any it is arms.yaml's."""
    plans = candidates(choose, folder).plans
    arms = choose.ARMS
    slow = plans["independent", "slow"].config(arms["independent"], 0)
    usual = plans["independent", "as in arms.yaml"].config(arms["independent"], 0)
    assert usual == choose.Plan(folder, []).config(arms["independent"], 0)
    rates = [config.cohort.peers[0].optimizer.lr for config in (slow, usual)]
    assert rates == [0.001, PARTS["independent"]["cohort.base.optimizer.lr"]]
    other = plans["mutual + all", "other views"].config(arms["mutual + all"], 0)
    assert [peer.view for peer in other.cohort.peers] == ["strong", "weak"]
    assert [peer.update_interval for peer in other.cohort.peers] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"typo": {}}, "must say candidates and held_out"),
        ({"candidates": {"indpendent": {"a": {}}}}, "no arm 'indpendent'"),
        ({"candidates": {"mutual": {"a": {"train.steps": 16}}}}, "not train.steps"),
        ({"candidates": {"mutual": {"a": {"loss.relational.distanc": 1}}}}, "distanc"),
        ({"candidates": {"mutual": {"a": {"view": [{}]}}}}, "one of each of 4 peers"),
        ({"candidates": {}}, "has no candidates"),
        ({"held_out": {"a": {"prefix": "dog"}}}, "0 of .* classes begin with 'dog'"),
        ({"held_out": {"a": {"prefx": "apple"}}}, "must say prefix, or fraction and fold"),
        ({"held_out": {}}, "has no held_out"),
    ],
)
def test_a_wrong_file_is_refused(
    choose: ModuleType, folder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        found = candidates(choose, folder, changes)
        found.splits(found.images(*next(iter(found.plans))).train, "a")


def test_rows_are_kept_and_their_figures_are_of_the_held_out_classes(
    choose: ModuleType, folder: Path
) -> None:
    """On a private Ray: a row each; a second run adds what is missing only; the table's means are the rows'."""
    few = {"candidates": {"mutual + all": CANDIDATES["candidates"]["mutual + all"]}}
    found = candidates(choose, folder, few)
    line = [sys.executable, EXPERIMENTS / "choose.py", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*line, *arguments], capture_output=True, text=True, env=environment)

    ended = run("--seeds", "1")
    assert ended.returncode == 0, ended.stderr
    file = folder / "candidates.jsonl"
    first = file.read_text()
    rows = [json.loads(text) for text in first.splitlines()]
    assert sorted(row["held_out"] for row in rows) == ["apples", "some"]
    assert all("test" not in row[at] for row in rows for at in ("last", "best"))

    # The figures are those of a plain run on the other training classes.
    row = next(row for row in rows if row["held_out"] == "apples")
    plan = found.plans["mutual + all", "other views"]
    splits = found.splits(found.images("mutual + all", "other views").train, "apples")
    cohort = LocalCohort(plan.config(choose.ARMS["mutual + all"], 0), splits)
    cohort.run(0, STEPS, lambda finished: None)
    for peer, judged in zip(cohort.peers, row["last"]["validation"]["peers"], strict=True):
        held = splits.validation
        expected = retrieval_metrics(peer.embed_images(held, 16), held.labels, recall_at=[1])
        assert judged["recall@1"] == pytest.approx(expected["recall@1"], abs=1e-5)
    cohort.close()

    ended = run("--seeds", "2")
    assert ended.returncode == 0, ended.stderr
    assert file.read_text().startswith(first)
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    assert sorted((row["held_out"], row["seed"]) for row in rows) == [
        *(("apples", 0), ("apples", 1), ("some", 0), ("some", 1))
    ]
    (printed,) = [text for text in ended.stdout.splitlines() if "other views |" in text]
    cells = [cell.strip() for cell in printed.strip("|").split("|")]
    of_all = [row["last"]["validation"]["ensemble"]["map@r"] for row in rows]
    assert cells[2] == "4" and cells[-1] == f"{100 * np.mean(of_all):.1f}"
    assert run("--seeds", "2", "--report").stdout.splitlines()[-1] == printed
