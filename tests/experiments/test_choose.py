"""Candidates for an ablation's settings: judged on held-out training classes alone, each row kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from conftest import EXPERIMENTS, Refused
from test_ablation import PARTS, STEPS
from test_ablation import folder as ablation

from ray_dmml.cohort.local import LocalCohort
from ray_dmml.errors import UserError
from ray_dmml.evaluation.metrics import retrieval_metrics

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
def choose(ablations: Any) -> ModuleType:
    """The experiment's own module."""
    import choose

    return choose


def candidates(choose: ModuleType, folder: Path, changes: dict[str, Any] | None = None) -> Any:
    written = {**CANDIDATES, **(changes or {})}
    (folder / "candidates.yaml").write_text(yaml.safe_dump(written))
    return choose.Candidates(folder, [])


def test_only_training_classes_are_held_out(choose: ModuleType, folder: Path) -> None:
    """Those of the prefix, or as many as the fraction says, other ones in each fold; no class is in two parts,
    and no test class in any."""
    more = {"first": {"fraction": 0.25}, **CANDIDATES["held_out"]}
    found = candidates(choose, folder, {"held_out": more})
    data = found.data()
    names = set(data.train.class_names)
    apples = {name for name in names if name.startswith("apple")}
    assert data.validation is None and len(apples) == 3
    held = {}
    for held_out in more:
        splits = found.splits(data.train, held_out)
        trained, held[held_out] = set(splits.train.class_names), set(splits.test.class_names)
        assert splits.validation is splits.test
        assert trained | held[held_out] == names and not trained & held[held_out]
        assert not names & set(data.test.class_names)
        assert len(splits.train) + len(splits.test) == len(data.train)
    assert held["apples"] == apples
    assert len(held["first"]) == len(held["some"]) == 2 and not held["first"] & held["some"]


def test_a_candidate_changes_its_arm_and_no_other_setting(choose: ModuleType, folder: Path) -> None:
    """Settings of its arm, or a diversity; without any it is arms.yaml's, with the same seeds."""
    plans = candidates(choose, folder).plans
    made = {
        key: plan.config(choose.ARMS[key[0]], 1).model_dump(mode="json")
        for key, plan in plans.items()
    }
    usual = made["independent", "as in arms.yaml"]
    for peer in usual["cohort"]["peers"]:
        assert peer["optimizer"]["lr"] == PARTS["independent"]["cohort.base.optimizer.lr"]
        peer["optimizer"]["lr"] = 0.001
    assert made["independent", "slow"] == usual
    other = made["mutual + all", "other views"]
    (folder / "candidates.yaml").unlink()
    parts = {**PARTS, **CANDIDATES["candidates"]["mutual + all"]["other views"]}
    (folder / "arms.yaml").write_text(yaml.safe_dump(parts))
    plan = choose.ARMS["mutual + all"], ablation_plan(folder)
    expected = plan[1].config(plan[0], 1).model_dump(mode="json")
    assert [peer["view"] for peer in other["cohort"]["peers"]] == ["strong", "weak"]
    for config in (other, expected):  # which classes are held out is not the config's to say here
        for key in ("validation_fraction", "validation_seed", "validation_fold"):
            del config["data"][key]
    assert other == expected


def ablation_plan(folder: Path) -> Any:
    from ablations.arms import Plan

    return Plan(folder, [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"typo": {}}, "typo: unknown setting"),
        ({"candidates": {"indpendent": {"a": {}}}}, "no arm 'indpendent'"),
        ({"candidates": {"mutual": ["a"]}}, "candidates.mutual"),
        ({"candidates": {"mutual": {"a": "fast"}}}, "candidates.mutual.a"),
        ({"candidates": {"mutual": {1e-4: {}}}}, "candidates.mutual"),
        ({"candidates": {"mutual": {"a|b": {}}}}, "candidates.mutual"),
        ({"candidates": {}}, "candidates"),
        ({"candidates": {"mutual": {"a": {"train.steps": 16}}}}, "yaml: mutual: a: .*train.steps"),
        (
            {"candidates": {"mutual": {"a": {"loss.relational.distanc": 1}}}},
            "candidates.yaml: mutual: a: .*distanc",
        ),
        ({"candidates": {"mutual + view": {"a": {"view": [{}]}}}}, "one of each of 4 peers"),
        ({"candidates": {"mutual + view": {"a": {"view": ["weak"] * 4}}}}, "for each peer"),
        (
            {"candidates": {"mutual + view": {"a": {"view": [{}] * 4, "model": [{}] * 4}}}},
            "model would change nothing: the arm has view",
        ),
        (
            {"candidates": {"independent": {"a": {"loss.relational.angle_weight": 1}}}},
            "loss.relational.angle_weight would change nothing: these peers learn alone",
        ),
        (
            {"candidates": {"single net": {"a": {"loss.relational": {"angle_weight": 1}}}}},
            "single net: a: loss.relational would change nothing",
        ),
        (
            {"candidates": {"snapshots": {"a": {"cohort.base.schedule.name": "constant"}}}},
            "schedule.name would change nothing: the arm itself says it",
        ),
        (
            {"candidates": {"snapshots": {"a": {"cohort.base.schedule": {"name": "constant"}}}}},
            "schedule.name would change nothing: the arm itself says it",
        ),
        (
            {"candidates": {"mutual + all + ema": {"a": {"ema": {}}}}},
            "ema: a: arm [^:]*: ema must give all peers",
        ),
        (
            {
                "candidates": {
                    "mutual + all, unit length": {"a": {"loss.relational.normalize": "raw"}}
                }
            },
            "embeddings would change nothing: the arm itself says it",
        ),
        ({"candidates": {"mutual": {"a": {"mutual": {}}}}}, "mutual is no setting"),
        ({"held_out": {"a": {"prefix": "dog"}}}, "held_out.a: 0 of 8 classes begin with 'dog'"),
        ({"held_out": {"a": {"prefix": 3}}}, "held_out.a.prefix"),
        ({"held_out": {"a": {"prefx": "apple"}}}, "prefx: unknown setting"),
        ({"held_out": {"a": {}}}, "must say prefix, or fraction"),
        ({"held_out": {"a": None}}, "held_out.a"),
        ({"held_out": {"a": {"fraction": 0}}}, "held_out.a.fraction"),
        ({"held_out": {"a": {"fraction": 0.5, "fold": 2}}}, "fold 2 would hold out"),
        ({"held_out": {}}, "held_out"),
    ],
)
def test_a_wrong_file_is_refused(
    choose: ModuleType, folder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        found = candidates(choose, folder, changes)
        found.splits(found.data().train, "a")


def test_what_was_run_is_known_by_its_settings(choose: ModuleType, folder: Path) -> None:
    """A row of other settings, or of other held-out classes under the same name, is not that row."""
    found = candidates(choose, folder)
    task = choose.Task("independent", "slow", "apples", 0)
    row = {**task._asdict(), "settings": found.settings(task)}
    assert choose.is_of_now(row, found)
    for part, change in [
        ("held_out", {**CANDIDATES["held_out"], "apples": {"prefix": "class"}}),
        ("candidates", {"independent": {"slow": {"cohort.base.optimizer.lr": 0.0005}}}),
        ("candidates", {"independent": {"other": {"cohort.base.optimizer.lr": 0.001}}}),
    ]:
        assert not choose.is_of_now(row, candidates(choose, folder, {part: change}))
    assert choose.is_of_now(row, candidates(choose, folder))


def test_the_table_s_means_are_over_seeds_then_over_held_out_sets(
    choose: ModuleType, folder: Path
) -> None:
    """Best first; a candidate with fewer rows is last. Further seeds are for the best with seed 0 alone."""

    def row(name: str, held_out: str, seed: int, value: float) -> dict[str, Any]:
        peers = [{"recall@1": value, "map@r": value / 2}, {"recall@1": 0.5, "map@r": 0.25}]
        judged = {"peers": peers, "ensemble": {"recall@1": value + 0.01, "map@r": value / 4}}
        of = {"arm": "independent", "candidate": name, "held_out": held_out, "seed": seed}
        return {**of, "last": {"validation": judged}}

    tasks = [task for task in candidates(choose, folder).tasks(2) if task.arm == "independent"]
    rows = [
        *(row("as in arms.yaml", "apples", 0, 0.3), row("as in arms.yaml", "apples", 1, 0.5)),
        *(row("as in arms.yaml", "some", 0, 0.7), row("as in arms.yaml", "some", 1, 0.9)),
        row("slow", "apples", 0, 0.9),
    ]
    lines = choose.table(rows, tasks).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[1:3] for line in cells[2:]] == [["as in arms.yaml", "4"], ["slow", "1"]]
    named = dict(zip(cells[0], cells[2], strict=True))
    assert named["apples: peer R@1"] == "45.0" and named["some: ensemble R@1"] == "81.0"
    overall = [named[key] for key in ("peer R@1", "ensemble R@1", "peer MAP@R", "ensemble MAP@R")]
    assert overall == ["55.0", "61.0", "27.5", "15.0"]
    assert dict(zip(cells[0], cells[3], strict=True))["some: peer R@1"] == ""

    rows = [*rows, row("slow", "some", 0, 0.6)]  # 0.75 with seed 0, the other 0.5 and 0.6 with both
    for keep, more in [
        (1, {"slow"}),
        (2, {"slow", "as in arms.yaml"}),
        (None, {"slow", "as in arms.yaml"}),
    ]:
        found = choose.kept(rows, tasks, keep)
        assert {task.candidate for task in found if task.seed} == more
        assert sum(task.seed == 0 for task in found) == 4


def test_rows_are_kept_and_their_figures_are_of_the_held_out_classes(
    choose: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    """On a private Ray: a row each of the candidate that is named, and none of another; a second run adds what is
    missing only; the table's means are the rows'."""
    named, other = "other views", {"slow": {"cohort.base.optimizer.lr": 0.001}}
    few = {"candidates": {"mutual + all": {**other, **CANDIDATES["candidates"]["mutual + all"]}}}
    found = candidates(choose, folder, few)
    asked = ["--seeds", "1", "--candidate", named]
    line = [sys.executable, EXPERIMENTS / "choose.py", folder, *asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    file = folder / "candidates.jsonl"
    first = file.read_text()
    rows = [json.loads(text) for text in first.splitlines()]
    assert sorted(row["held_out"] for row in rows) == ["apples", "some"]
    assert all("test" not in row[at] for row in rows for at in ("last", "best"))

    # The figures are those of a plain run on the other training classes.
    row = next(row for row in rows if row["held_out"] == "apples")
    plan = found.plans["mutual + all", "other views"]
    splits = found.splits(found.data().train, "apples")
    cohort = LocalCohort(plan.config(choose.ARMS["mutual + all"], 0), splits)
    cohort.run(0, STEPS, lambda finished: None)
    for peer, judged in zip(cohort.peers, row["last"]["validation"]["peers"], strict=True):
        held = splits.validation
        expected = retrieval_metrics(peer.embed_images(held, 16), held.labels, recall_at=[1])
        assert judged["recall@1"] == pytest.approx(expected["recall@1"], abs=1e-5)
    cohort.close()

    choose.main(str(folder), seeds=2, candidate=[named])
    output = capsys.readouterr().out
    assert "slow" not in output
    assert file.read_text().startswith(first)
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    assert sorted((row["held_out"], row["seed"]) for row in rows) == [
        *(("apples", 0), ("apples", 1), ("some", 0), ("some", 1))
    ]
    (printed,) = [text for text in output.splitlines() if "other views |" in text]
    assert "| 4 |" in printed and "4 rows, " in output
    # The table needs no word of where the images are.
    config = (folder / "config.yaml").read_text()
    placeless = yaml.safe_load(config)
    del placeless["data"]["root"]
    (folder / "config.yaml").write_text(yaml.safe_dump(placeless))
    choose.main(str(folder), report=True)
    assert printed in capsys.readouterr().out.splitlines()
    choose.main(str(folder), report=True, candidate=["slow"])
    output = capsys.readouterr().out
    assert named not in output and " rows, " not in output
    with refused("no candidate slo; there are: other views; slow"):
        choose.main(str(folder), report=True, candidate=["slo"])
    (folder / "config.yaml").write_text(config)
    # The processor's model, where the system tells; on others anything but nothing.
    about = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", about.read_text() if about.exists() else "", re.M)
    (device,) = {row["device"] for row in rows}
    assert device == model[1].strip() if model else device

    # Other images under the same settings are not mixed with these.
    next((folder / "images").rglob("*.png")).unlink()
    with refused("rows of other images"):
        choose.main(str(folder), seeds=3)
    assert len(file.read_text().splitlines()) == 4
