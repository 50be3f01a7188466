"""The ablation: its arms are what they are called, its figures are those of a run, its rows are kept."""

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

import numpy as np
import pytest
import torch
import yaml
from conftest import EXPERIMENTS, Refused, tiny
from safetensors.torch import load_file
from scipy import stats

from ray_dmml.checkpoint.peer_state import decode_peer
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError
from ray_dmml.models.pretrained import OFFLINE_BACKBONES
from ray_dmml.training.run_dir import RunDir
from ray_dmml.training.trainer import train

STEPS = 8
PARTS: dict[str, Any] = {
    "independent": {"cohort.base.optimizer.lr": 0.002},
    "mutual": {"loss.relational.distance_weight": 3, "loss.relational.normalize": "raw"},
    "model": [{}, {"init_seed": 1}, {"init_seed": 2}, {"init_seed": 3}],
    "view": [{"view": "weak"}, {"view": "standard"}, {"view": "weak"}, {"view": "strong"}],
    "temporal": [{}, {"update_interval": 2}, {}, {"update_interval": 2}],
    "ema": {"cohort.base.ema": {"decay": 0.5}},
}


@pytest.fixture
def folder(tmp_path: Path, image_folder: Path) -> Path:
    """Of an ablation that takes seconds."""
    raw = tiny(image_folder)
    raw["data"] |= {"validation_fraction": 0.4}
    base = raw["cohort"].get("base", {})
    raw["cohort"] = {"base": {**base, "init_seed": 0}, "peers": [{}, {}]}
    raw["train"] = {"steps": STEPS, "evaluate_every": 2, "tensorboard": False}
    found = tmp_path / "mine"
    found.mkdir()
    (found / "config.yaml").write_text(yaml.safe_dump(raw))
    (found / "arms.yaml").write_text(yaml.safe_dump(PARTS))
    return found


def plan(ablations: Any, folder: Path) -> Any:
    return ablations.arms.Plan(folder, [])


def test_arms_differ_in_what_they_are_called_and_in_nothing_else(
    ablations: Any, folder: Path
) -> None:
    """Weights of the mutual term, initial weights, views and intervals, of every arm of two peers."""
    arms, made = ablations.arms.ARMS, plan(ablations, folder)
    for name, arm in arms.items():
        config = made.config(arm, seed=3)
        relational, peers = config.loss.relational, config.cohort.peers
        assert config.seed == 3 and config.train.steps == STEPS
        assert (relational.distance_weight > 0) == (relational.angle_weight > 0) == arm.mutual
        assert len(peers) == arm.num_peers
        same_start = len({peer.init_seed for peer in peers}) == 1
        assert same_start == ("model" not in arm.diversities), name
        assert len({peer.seed for peer in peers}) == len(peers)  # own draws of the recipe
        if len(peers) == 2:
            assert (peers[0].view == peers[1].view) == ("view" not in arm.diversities)
            assert [peer.update_interval for peer in peers] == (
                [1, 2] if "temporal" in arm.diversities else [1, 1]
            )
        assert all((peer.ema is not None) == arm.ema for peer in peers)
        if arm.mutual:
            assert (relational.normalize == "unit") == name.endswith(", unit length")
        else:
            assert peers[0].optimizer.lr == 0.002
    both = arms["mutual + all"]
    assert (
        len(made.config(both, 0).cohort.peers) == 2 and arms["mutual + all, M = 4"].num_peers == 4
    )


@pytest.mark.parametrize(
    ("name", "judged_at"),
    [("mutual + all", ("last", "best")), ("mutual + all + ema", ("ema",))],
)
def test_an_arm_s_figures_are_those_of_a_run_of_its_config(
    ablations: Any, folder: Path, tmp_path: Path, name: str, judged_at: tuple[str, ...]
) -> None:
    """At the last step and at the best on validation classes, of weights or their averages: what `train`
    gives."""
    made, arm = plan(ablations, folder), ablations.arms.ARMS[name]
    config = made.config(arm, seed=1)
    row = ablations.measure.measure(made, arm, 1, load_splits(config.data))
    row["ema"] = row["last"]
    for at in judged_at:
        evaluation = config.evaluation.model_copy(update={"weights": at, "untrained": False})
        judged = config.model_copy(update={"evaluation": evaluation})
        results = train(judged, tmp_path / at, local=True)
        assert results["step"] == row[at]["step"]
        for mine, theirs in [
            *zip(row[at]["test"]["peers"], results["peers"].values(), strict=True),
            (row[at]["test"]["ensemble"], results["ensemble"]),
        ]:
            for metric in ("recall@1", "map@r"):
                assert mine[metric] == pytest.approx(theirs[metric], abs=1e-5)
    assert [point["step"] for point in row["curve"]] == [2, 4, 6, 8]
    best = max(row["curve"], key=lambda point: point["ensemble"])
    assert row["best"]["step"] == best["step"]


def test_snapshots_are_the_net_at_the_end_of_each_cycle(ablations: Any, folder: Path) -> None:
    """Two members, the second of which is the net at the last step; its rate fell twice."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["train"]["evaluate_every"] = 4
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    made, arm = plan(ablations, folder), ablations.arms.ARMS["snapshots"]
    config = made.config(arm, 0)
    schedule = config.cohort.peers[0].schedule
    assert (schedule.name, schedule.steps, schedule.cycles) == ("cosine", STEPS, 2)
    row = ablations.measure.measure(made, arm, 0, load_splits(config.data))
    first, second = row["last"]["validation"]["peers"]
    assert [point["mean_peer"] for point in row["curve"]] == [first["recall@1"], second["recall@1"]]
    assert len(row["last"]["test"]["peers"]) == 2 and "only_one" in row["last"]


def test_self_distillation_learns_from_a_finished_frozen_net(ablations: Any, folder: Path) -> None:
    """The student alone is judged, and but for its teacher it would be the net that learns alone."""
    (folder / "arms.yaml").write_text(yaml.safe_dump({**PARTS, "independent": {}, "mutual": {}}))
    made, arms = plan(ablations, folder), ablations.arms.ARMS
    splits = load_splits(made.config(arms["single net"], 0).data)
    rows = [
        ablations.measure.measure(made, arms[name], 0, splits)
        for name in ("single net", "self-distillation")
    ]
    assert all(len(row["last"]["test"]["peers"]) == 1 for row in rows)
    assert rows[0]["curve"][-1]["metric_loss"] != rows[1]["curve"][-1]["metric_loss"]
    alone = made.config(arms["self-distillation"], 0).model_copy(
        update={"loss": made.config(arms["single net"], 0).loss}
    )
    assert alone == made.config(arms["single net"], 0)
    config = made.config(arms["self-distillation"], 0, folder / "weights.safetensors")
    assert [peer.frozen for peer in config.cohort.peers] == [False, True]


def test_the_teacher_of_self_distillation_is_the_single_net_at_its_end(
    ablations: Any, folder: Path, tmp_path: Path
) -> None:
    """Its last weights, to the bit; and a change of how it was trained is one of the arm."""
    made, arms, measure = plan(ablations, folder), ablations.arms.ARMS, ablations.measure
    config = made.config(arms["single net"], measure.TEACHER_SEED)
    splits = load_splits(config.data)
    measure._train_teacher(config, splits, tmp_path / "teacher.safetensors")
    train(config, tmp_path / "alone", local=True)
    state = RunDir.open(tmp_path / "alone").checkpoints.load("last").peers
    (alone,) = (decode_peer(files)["net"] for files in state.values())
    kept = load_file(tmp_path / "teacher.safetensors")
    assert kept.keys() == alone.keys()
    assert all(torch.equal(kept[name], alone[name]) for name in kept)

    before = {name: made.digest(arm) for name, arm in arms.items()}
    changed = {**PARTS, "independent": {"cohort.base.optimizer.lr": 0.003}}
    (folder / "arms.yaml").write_text(yaml.safe_dump(changed))
    after = {name: plan(ablations, folder).digest(arm) for name, arm in arms.items()}
    differ = {name for name in arms if before[name] != after[name]}
    alike = {name for name in arms if name.startswith("mutual")}
    assert differ == set(arms) - alike


def test_agreement_and_overlap_are_those_of_a_naive_loop(
    ablations: Any, image_folder: Path
) -> None:
    """Three members with embeddings of different sizes, query against gallery and all against all."""
    rng = np.random.default_rng(0)
    images = load_splits(Config.parse(tiny(image_folder)).data).test
    members = []
    for size in (4, 8, 16):
        drawn = rng.standard_normal((len(images), size)).astype(np.float32)
        members.append(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
    count = len(images)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    cosines = [[float(m[i] @ m[j]) for i, j in pairs] for m in members]
    naive = [stats.pearsonr(cosines[a], cosines[b])[0] for a, b in [(0, 1), (0, 2), (1, 2)]]
    assert ablations.measure.agreement(members) == pytest.approx(np.mean(naive), abs=1e-5)
    assert ablations.measure.agreement(members[:1] * 2) == pytest.approx(1)

    for query, gallery in [(None, None), (np.arange(0, count, 2), np.arange(1, count))]:
        judged = type(images)(images.source, images.labels, images.class_names, query, gallery)
        one = 0
        asked = range(count) if query is None else query.tolist()
        found = range(count) if gallery is None else gallery.tolist()
        for i in asked:
            right = 0
            for m in members:
                nearest = max((j for j in found if j != i), key=lambda j: float(m[i] @ m[j]))
                right += images.labels[nearest] == images.labels[i]
            one += right == 1
        assert ablations.measure.only_one(members, judged) == pytest.approx(
            one / len(asked), abs=1e-5
        )


def test_the_interval_is_that_of_a_paired_t_test(ablations: Any) -> None:
    """Seeds that one arm lacks are left out; with one or two in common there is no interval."""
    paired = ablations.report.paired
    mine, theirs = {0: 81.0, 1: 83.5, 2: 80.5, 3: 99.0}, {0: 79.0, 1: 80.0, 2: 80.0}
    found = paired(mine, theirs)
    test = stats.ttest_rel([81.0, 83.5, 80.5], [79.0, 80.0, 80.0])
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(2.0) and found.seeds == 3
    assert str(paired({0: 2.0}, theirs)) == "-77.0" and str(paired({7: 2.0}, theirs)) == "-"
    # Two seeds that happen to differ by as much are no certainty.
    assert str(paired({0: 81.0, 1: 82.0}, theirs)) == "+2.0"


def test_mutual_learning_over_all_diversities(ablations: Any) -> None:
    """Is the paired t-test of each seed's mean over the five pairs, of the seeds that all ten arms have."""
    random = np.random.default_rng(0)
    ends = ("", " + model", " + view", " + temporal", " + all")
    arms = [f"{kind}{end}" for kind in ("mutual", "independent") for end in ends]
    # Kind, diversities, seed; two peers and their ensemble.
    right = random.uniform(size=(2, 5, 4, 3))
    rows = []
    for place, arm in enumerate(arms):
        for seed in range(3 if arm == "mutual + view" else 4):
            *peers, together = ({"recall@1": x} for x in right.reshape(10, 4, 3)[place, seed])
            found = {"test": {"peers": peers, "ensemble": together}}
            rows.append({"arm": arm, "seed": seed, "device": "CPU", "last": found})
    told = ablations.report.mutual_learning(rows, "last")
    for who, figures in (("mean peer", right[..., :2].mean(-1)), ("ensemble", right[..., 2])):
        mutual, independent = 100 * figures[:, :, :3].mean(1)
        low, high = stats.ttest_rel(mutual, independent).confidence_interval(0.95)
        assert f"{who} R@1 {np.mean(mutual - independent):+.1f} [{low:+.1f}, {high:+.1f}]" in told
    assert "3 seeds" in told and "†" not in told
    rows[-1]["device"] = "GPU"
    assert ablations.report.mutual_learning(rows, "last") == told  # a seed that is not compared
    rows[-2]["device"] = "GPU"
    assert ablations.report.mutual_learning(rows, "last").count("†") == 2
    others = [row for row in rows if row["arm"] != "mutual + view"]
    assert ablations.report.mutual_learning(others, "last") == ""


def test_differences_of_two_devices_are_marked(ablations: Any) -> None:
    """Where one pair of the seeds that both arms have is of two, and nowhere else."""

    def row(arm: str, seed: int, device: str) -> dict[str, Any]:
        figures = {"recall@1": 0.5 + seed / 100, "map@r": 0.4}
        found = {"peers": [figures, figures], "ensemble": figures}
        at = {"test": found, "validation": found}
        return {"arm": arm, "seed": seed, "device": device, "last": at, "best": at}

    rows = [row("independent", seed, "CPU") for seed in range(3)]
    rows += [row("independent + all", seed, "GPU" if seed == 2 else "CPU") for seed in range(3)]
    rows += [row("mutual + all", seed, "GPU" if seed == 2 else "CPU") for seed in range(3)]
    rows += [row("mutual", seed, "GPU" if seed == 3 else "CPU") for seed in range(4)]
    lines = ablations.report.table(rows, "last").splitlines()
    marked = {
        (name, place): cell.endswith(ablations.report.TWO_DEVICES)
        for name, *cells in (line.strip("| ").split(" | ") for line in lines[2:])
        for place, cell in enumerate(cells[6:])
        if name != "independent"
    }
    both = {"independent + all", "mutual + all"}
    assert len(marked) == 10 and {where for where, is_marked in marked.items() if is_marked} == {
        (name, place) for name in both for place in (0, 1)
    }


def test_the_tables_page_is_whole_in_the_folder_and_between_marks_elsewhere(
    ablation: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """A folder that was copied or renamed has a report.md of its old name, which is written anew. The
    project's page keeps what is outside its marks, and without them it is refused."""
    project = folder.parent / "experiments"
    shutil.copytree(folder, project / "ablations" / "characters")
    shutil.copy(EXPERIMENTS / "ablations" / "characters" / "rows.jsonl", folder)
    shutil.copy(folder / "rows.jsonl", project / "ablations" / "characters")
    ablation.main(str(folder), report=True)
    written = (folder / "report.md").read_text()
    assert "\n| mutual + all, M = 4 | 5 |" in written and "(./differences.png)" in written
    copied = folder.rename(folder.parent / "copied")
    (copied / "report.md").write_text(f"<!-- mine -->\n\n{written}\n<!-- /mine -->\n")
    ablation.main(str(copied), report=True)
    assert (copied / "report.md").read_text() == written

    monkeypatch.setattr(ablation, "EXPERIMENTS", project)
    page = project / "README.md"
    page.write_text("Before.\n<!-- characters -->\nOld.\n<!-- /characters -->\nAfter.\n")
    ablation.main("characters", report=True)
    tables = written.replace("(./", "(ablations/characters/")
    marked = f"<!-- characters -->\n\n{tables}\n<!-- /characters -->\n"
    assert page.read_text() == f"Before.\n{marked}After.\n"
    page.write_text("Before.\n")
    with refused("has no marks <!-- characters -->"):
        ablation.main("characters", report=True)
    assert page.read_text() == "Before.\n"


@pytest.mark.parametrize("name", ["characters", "grocery"])
def test_the_arms_of_the_experiments_are_valid(ablations: Any, tmp_path: Path, name: str) -> None:
    """Every arm parses, and each diversity makes the peers differ."""
    made = ablations.arms.Plan(EXPERIMENTS / "ablations" / name, [f"data.root={tmp_path}"])
    backbones = [
        peer.backbone for peer in made.config(ablations.arms.ARMS["mutual + all"], 0).cohort.peers
    ]
    if name == "grocery":  # whose nets start from ImageNet weights of their own
        assert len(set(backbones)) == 2 and set(backbones) <= set(OFFLINE_BACKBONES)
    else:
        assert len(set(backbones)) == 1
    for arm in ablations.arms.ARMS.values():
        peers = made.config(arm, 0).cohort.peers
        for diversity, key in [
            ("model", "init_seed"),
            ("view", "view"),
            ("temporal", "update_interval"),
        ]:
            differ = any(getattr(p, key) != getattr(peers[0], key) for p in peers)
            assert differ == (diversity in arm.diversities)


def test_a_wrong_plan_is_refused(ablations: Any, folder: Path) -> None:
    """A missing part and an unknown setting, each by name."""
    for change, said in [
        ({"temporal": None}, "must say"),
        ({"mutual": {"loss.relational.distanc": 1}}, "distance"),
        ({"view": [{"view": "mild"}, {}, {}, {}]}, "view"),
        ({"model": [{}, {"init_seed": 1}]}, "one of each of 4 peers"),
        ({"independent": None, "typo": {}}, "must say"),
        ({"independent": {"train.steps": 16}}, "may say .*not train.steps"),
        ({"independent": {"loss.relational.angle_weight": 1}}, "angle would change nothing"),
        (
            {"ema": {"loss.relational.angle_weight": 1}},
            "ema may not say loss.relational.angle_weight",
        ),
        ({"ema": {}}, "yaml: independent . all . ema: ema must give all peers"),
    ]:
        parts = {key: value for key, value in {**PARTS, **change}.items() if value is not None}
        (folder / "arms.yaml").write_text(yaml.safe_dump(parts))
        with pytest.raises(UserError, match=said):
            plan(ablations, folder)
    (folder / "arms.yaml").write_text(yaml.safe_dump(PARTS))
    for setting, said in [
        ("cohort.peers.1.view=weak", "cohort.peers must be equal"),
        ("train.init_from=runs/a", "train.init_from must be null"),
        ("failure.on_nonfinite=skip", 'must be "fail" in an ablation, not skip'),
    ]:
        with pytest.raises(UserError, match=said):
            ablations.arms.Plan(folder, [setting])


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_a_task_takes_a_core_and_its_share_of_a_gpu(ablations: Any, num_gpus: int) -> None:
    """Of a private Ray with a GPU, and without one (to Ray it is a number: no device is touched)."""
    import ray

    ray.init("local", num_cpus=8, num_gpus=num_gpus, include_dashboard=False, log_to_driver=False)
    try:
        taken = ablations.running.resources(0.25)
    finally:
        ray.shutdown()
    assert taken == ({"num_cpus": 1, "num_gpus": 0.25} if num_gpus else {"num_cpus": 1})


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, EXPERIMENTS / "ablation.py", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_rows_are_kept_and_finished_ones_are_not_run_again(
    folder: Path, image_folder: Path
) -> None:
    """On a private Ray: a row a finished arm and seed; a second run adds what is missing only, and
    tables and plots are of all rows. An arm that fails is named and costs no other."""
    arms = ["--arm", "independent", "--arm", "mutual + all", "--arm", "independent"]
    ended = command(folder, *arms, "--seeds", "2")
    assert ended.returncode == 0, ended.stderr
    file = folder / "rows.jsonl"
    first = file.read_text()
    rows = [json.loads(line) for line in first.splitlines()]
    assert sorted((row["arm"], row["seed"]) for row in rows) == [
        *(("independent", 0), ("independent", 1)),
        *(("mutual + all", 0), ("mutual + all", 1)),
    ]
    page = (folder / "report.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| mutual + all |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    mean = np.mean(
        [
            [peer["recall@1"] for peer in row["last"]["test"]["peers"]]
            for row in rows
            if row["arm"] == "mutual + all"
        ]
    )
    assert (
        cells[1] == "2"
        and cells[2].startswith(f"{100 * mean:.1f} ±")
        and all(cell[0] in "+-" and "[" not in cell for cell in cells[-4:-2])
    )
    for plot in ("differences.png", "mechanism.png"):
        assert (folder / plot).stat().st_size > 5000 and plot in page

    # Rows of other settings are not mixed with these.
    ended = command(folder, *arms, "--seeds", "2", "--set", "cohort.base.embedding_size=24")
    assert ended.returncode == 2 and "rows of other settings" in ended.stderr
    assert file.read_text() == first

    # Neither are those of other images.
    fewer = folder.parent / "fewer"
    shutil.copytree(image_folder, fewer)
    next(fewer.rglob("*.png")).unlink()
    ended = command(folder, *arms, "--seeds", "3", "--set", f"data.root={fewer}")
    assert ended.returncode == 2 and "rows of other images" in ended.stderr
    assert file.read_text() == first

    # A learning rate that blows up: that arm fails, the other is finished; the old rows stand, and of
    # a line that was cut off by a kill nothing is left.
    ema = {"cohort.base.optimizer.lr": 1e30, **PARTS["ema"]}
    (folder / "arms.yaml").write_text(yaml.safe_dump({**PARTS, "ema": ema}))
    file.write_text(first + first[:40])
    broken = "mutual + all + ema"
    ended = command(folder, "--arm", broken, "--arm", "single net", *arms, "--seeds", "1")
    assert ended.returncode == 1
    assert f"{broken}, seed 0: " in ended.stdout and "not finite" in ended.stdout
    now = file.read_text()
    assert now.startswith(first)
    assert [json.loads(line)["arm"] for line in now[len(first) :].splitlines()] == ["single net"]


@pytest.fixture
def ablation(ablations: Any) -> ModuleType:
    """The experiment's own module."""
    import ablation

    return ablation


def test_rows_that_were_edited_by_hand_are_kept(ablations: Any, tmp_path: Path) -> None:
    """Without a newline at the end, or with an empty line; what a kill has left of a row is not, once the
    next is written. A line that is none is told with its number."""
    file, rows_of = tmp_path / "rows.jsonl", ablations.running.rows_of
    for before, after in (
        ('{"seed": 0}\n\n{"seed": 1}', '{"seed": 0}\n\n{"seed": 1}\n{"seed": 2}\n'),
        ('{"seed": 0}\n{"seed": 1}\n{"se', '{"seed": 0}\n{"seed": 1}\n{"seed": 2}\n'),
    ):
        file.write_text(before)
        with rows_of(file) as (rows, _):
            assert rows == [{"seed": 0}, {"seed": 1}]
        assert file.read_text() == before
        with rows_of(file) as (rows, add):
            add({"seed": 2})
        assert file.read_text() == after
    file.write_text('{"seed": 0}\n<<<<\n{"seed": 1}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2 is no row: b'<<<<"), rows_of(file):
        pass


def test_a_folder_without_arms_is_refused(
    ablation: ModuleType, folder: Path, tmp_path: Path, refused: Refused
) -> None:
    """As are an arm that is none, and a report of nothing."""
    with refused(r"arms\.yaml"):
        ablation.main(str(tmp_path))
    with refused("no arm mutal; there are: independent; "):
        ablation.main(str(folder), arm=["mutal"])
    with refused(r"rows\.jsonl is not there: no arm has been run"):
        ablation.main(str(folder), report=True)


def test_of_arms_with_the_same_settings_one_is_run(
    ablation: ModuleType, ablations: Any, folder: Path, refused: Refused
) -> None:
    """Where arms.yaml takes relations of unit length anyway, that arm is the mutual one: its rows are copies
    that say so, in the file and in the table, and cost nothing. Arms that differ stay apart."""
    one, other = "mutual + all", "mutual + all, unit length"
    alike = {"loss.relational.distance_weight": 3, "loss.relational.normalize": "unit"}
    (folder / "arms.yaml").write_text(yaml.safe_dump({**PARTS, "mutual": alike}))
    ablation.main(str(folder), arm=["single net", one, other], seeds=2)
    file = folder / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    copies = {row["seed"]: row for row in rows if row["arm"] == other}
    assert len(rows) == 6 and sorted(copies) == [0, 1]
    for run in rows:
        if run["arm"] == one:
            copy = copies[run["seed"]]
            assert copy.pop("same_as") == one and copy.pop("seconds") == 0.0 < run.pop("seconds")
            assert {**copy, "arm": one} == run
        else:
            assert run["arm"] == other or "same_as" not in run
    page = (folder / "report.md").read_text()
    held_out = page.partition("on validation classes, by which")[2]
    line = next(line for line in held_out.splitlines() if line.startswith(f"| {one} |"))
    ensembles = [
        100 * row["last"]["validation"]["ensemble"]["recall@1"] for row in rows if row["arm"] == one
    ]
    assert line.split(" | ")[4].startswith(f"{np.mean(ensembles):.1f} ± ")
    assert f"| {other} (same settings as {one}) | 2 |" in page and "4 rows and 2 copies, " in page

    # Nothing is left to run or to copy; a copy is made of a row that was there before, too.
    left = [row for row in rows if row["arm"] != other]
    file.write_text("".join(json.dumps({"seconds": 1.0, **row}) + "\n" for row in left))
    for _ in range(2):
        ablation.main(str(folder), arm=[one, other], seeds=2, settings=["data.root=/gone"])
        assert len(file.read_text().splitlines()) == 6

    # Of one alike it is the first that is run. A copy whose row is gone is not taken for a row.
    alike = ablation.alike_arms(plan(ablations, folder))
    wanted = [(one, 0), (other, 0), (one, 1)]
    assert ablation.left_to_run([], wanted, alike) == [(one, 0), (one, 1)]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "same_as" in line))
    with refused(f"of rows that are gone: .*{re.escape(other)}"):
        ablation.main(str(folder), arm=[one, other], seeds=2)


def test_averages_of_the_same_settings_are_no_copy(
    ablation: ModuleType, ablations: Any, folder: Path
) -> None:
    """Where the config has all peers average, an arm and the arm "+ ema" are trained alike, and judged
    with other weights."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["cohort"]["base"]["ema"] = {"decay": 0.5}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    made = plan(ablations, folder)
    names = ["independent + all", "independent + all + ema"]
    assert len({made.digest(ablations.arms.ARMS[name]) for name in names}) == 1
    alike = ablation.alike_arms(made)
    wanted = [(name, 0) for name in names]
    assert ablation.left_to_run([], wanted, alike) == wanted
    row = {"arm": names[0], "settings": alike[names[0]][0], "seed": 0, "seconds": 1.0}
    assert ablation.copies([row], wanted, alike) == []
