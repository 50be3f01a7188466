"""The ablation: arms have what their names say, figures are those of a run, and rows are kept."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
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
from ray_dmml.training.run import train
from ray_dmml.training.run_dir import RunDir

pytestmark = pytest.mark.ray


STEPS = 8
PARTS: dict[str, Any] = {
    "independent": {"cohort.base.optimizer.lr": 0.002},
    "mutual": {"loss.relational.distance_weight": 3, "loss.relational.normalize": False},
    "model": [{}, {"init_seed": 1}, {"init_seed": 2}, {"init_seed": 3}],
    "view": [{"view": "weak"}, {"view": "standard"}, {"view": "weak"}, {"view": "strong"}],
    "temporal": [{}, {"update_interval": 2}, {}, {"update_interval": 2}],
    "ema": {"cohort.base.ema": {"decay": 0.5}},
}


@pytest.fixture
def folder(tmp_path: Path, image_folder: Path) -> Path:
    """The folder of an ablation that takes seconds."""
    raw = tiny(image_folder)
    raw["data"] |= {"validation_fraction": 0.4}
    base = raw["cohort"].get("base", {})
    raw["cohort"] = {"base": {**base, "init_seed": 0}, "peers": [{}, {}]}
    raw["train"] = {"steps": STEPS, "evaluate_every": 2, "tensorboard": False}
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    (folder / "arms.yaml").write_text(yaml.safe_dump(PARTS))
    return folder


@pytest.fixture
def ablation(ablations: Any) -> ModuleType:
    """The command's module."""
    import ablation

    return ablation


@pytest.fixture(scope="module")
def private_ray() -> Iterator[None]:
    """A Ray whose workers find the modules of experiments/."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(EXPERIMENTS), prepend=os.pathsep)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def plan(ablations: Any, folder: Path) -> Any:
    return ablations.arms.Plan(folder, [])


def test_arms_differ_in_what_their_names_say_and_in_nothing_else(ablations: Any, folder: Path) -> None:
    """Checks mutual weights, initial weights, views and intervals of every arm."""
    arms, made = ablations.arms.ARMS, plan(ablations, folder)
    for name, arm in arms.items():
        config = made.config(arm, seed=3)
        relational, peers = config.loss.relational, config.cohort.peers
        assert config.seed == 3 and config.train.steps == STEPS
        assert (relational.distance_weight > 0) == (relational.angle_weight > 0) == arm.mutual
        assert len(peers) == arm.num_peers
        same_start = len({peer.init_seed for peer in peers}) == 1
        assert same_start == ("model" not in arm.diversities), name
        assert len({peer.seed for peer in peers}) == len(peers)  # random views of their own
        if len(peers) == 2:
            assert (peers[0].view == peers[1].view) == ("view" not in arm.diversities)
            assert [peer.update_interval for peer in peers] == ([1, 2] if "temporal" in arm.diversities else [1, 1])
        assert all((peer.ema is not None) == arm.ema for peer in peers)
        if arm.mutual:
            assert relational.normalize == name.endswith(", unit length")
        else:
            assert peers[0].optimizer.lr == 0.002
    both = arms["mutual + all"]
    assert len(made.config(both, 0).cohort.peers) == 2 and arms["mutual + all, M = 4"].num_peers == 4


@pytest.mark.parametrize(
    ("name", "weights"),
    [("mutual + all", ("last", "best")), ("mutual + all + ema", ("ema",))],
)
def test_an_arm_s_figures_are_those_of_a_run_of_its_config(
    ablations: Any, folder: Path, tmp_path: Path, name: str, weights: tuple[str, ...]
) -> None:
    """The row has the figures of `train`, at the last and at the best step, with averaged weights or without."""
    made, arm = plan(ablations, folder), ablations.arms.ARMS[name]
    config = made.config(arm, seed=1)
    row = ablations.measure.measure(made, arm, 1, load_splits(config.data))
    row["ema"] = row["last"]
    for at in weights:
        evaluation = config.evaluation.model_copy(update={"weights": at, "untrained": False})
        results = train(config.model_copy(update={"evaluation": evaluation}), tmp_path / at, local=True)
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
    """There are two members, and the second is the net at the last step. The rate fell twice."""
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
    """Only the student is evaluated. Without its teacher it would be the single net."""
    (folder / "arms.yaml").write_text(yaml.safe_dump({**PARTS, "independent": {}, "mutual": {}}))
    made, arms = plan(ablations, folder), ablations.arms.ARMS
    splits = load_splits(made.config(arms["single net"], 0).data)
    rows = [ablations.measure.measure(made, arms[name], 0, splits) for name in ("single net", "self-distillation")]
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
    """Its weights are the single net's to the bit. A change of how it is trained changes the arm's digest."""
    made, arms, measure = plan(ablations, folder), ablations.arms.ARMS, ablations.measure
    config = made.config(arms["single net"], measure.TEACHER_SEED)
    splits = load_splits(config.data)
    measure.train_teacher(config, splits, tmp_path / "teacher.safetensors")
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
    changed_arms = {name for name in arms if before[name] != after[name]}
    assert changed_arms == {name for name in arms if not name.startswith("mutual")}


def test_agreement_and_overlap_are_those_of_a_naive_loop(ablations: Any, image_folder: Path) -> None:
    """Three members have embeddings of different sizes; query against gallery, and all against all."""
    rng = np.random.default_rng(0)
    images = load_splits(Config.parse(tiny(image_folder)).data).test
    members = []
    for size in (4, 8, 16):
        points = rng.standard_normal((len(images), size)).astype(np.float32)
        members.append(points / np.linalg.norm(points, axis=1, keepdims=True))
    count = len(images)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    cosines = [[float(m[i] @ m[j]) for i, j in pairs] for m in members]
    naive = [stats.pearsonr(cosines[a], cosines[b])[0] for a, b in [(0, 1), (0, 2), (1, 2)]]
    assert ablations.measure.agreement(members) == pytest.approx(np.mean(naive), abs=1e-5)
    assert ablations.measure.agreement(members[:1] * 2) == pytest.approx(1)

    for query, gallery in [(None, None), (np.arange(0, count, 2), np.arange(1, count))]:
        subset = type(images)(images.source, images.labels, images.class_names, query, gallery)
        queries = range(count) if query is None else query.tolist()
        searched = range(count) if gallery is None else gallery.tolist()
        expected = 0
        for i in queries:
            correct = 0
            for m in members:
                nearest = max((j for j in searched if j != i), key=lambda j: float(m[i] @ m[j]))
                correct += images.labels[nearest] == images.labels[i]
            expected += correct == 1
        assert ablations.measure.only_one(members, subset) == pytest.approx(expected / len(queries), abs=1e-5)


def test_the_interval_is_that_of_a_paired_t_test(ablations: Any) -> None:
    """Seeds that one arm lacks are left out. With one or two in common there is no interval."""
    paired = ablations.report.paired
    mine, theirs = {0: 81.0, 1: 83.5, 2: 80.5, 3: 99.0}, {0: 79.0, 1: 80.0, 2: 80.0}
    found = paired(mine, theirs)
    test = stats.ttest_rel([81.0, 83.5, 80.5], [79.0, 80.0, 80.0])
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(2.0) and found.seeds == 3
    assert str(paired({0: 2.0}, theirs)) == "-77.0" and str(paired({7: 2.0}, theirs)) == "-"
    # Two seeds with the same difference by chance do not make it certain.
    assert str(paired({0: 81.0, 1: 82.0}, theirs)) == "+2.0"


def test_mutual_learning_over_all_diversities(ablations: Any) -> None:
    """The paired t-test is of each seed's mean over the five pairs, for the seeds that all ten arms have."""
    random = np.random.default_rng(0)
    ends = ("", " + model", " + view", " + temporal", " + all")
    arms = [f"{kind}{end}" for kind in ("mutual", "independent") for end in ends]
    # Axes: kind, diversities, seed, and two peers with their ensemble.
    recall = random.uniform(size=(2, 5, 4, 3))
    rows = []
    for place, arm in enumerate(arms):
        for seed in range(3 if arm == "mutual + view" else 4):
            *peers, together = ({"recall@1": x} for x in recall.reshape(10, 4, 3)[place, seed])
            last = {"test": {"peers": peers, "ensemble": together}}
            rows.append({"arm": arm, "seed": seed, "device": "CPU", "last": last})
    sentence = ablations.report.mutual_learning(rows, "last")
    for who, figures in (("mean peer", recall[..., :2].mean(-1)), ("ensemble", recall[..., 2])):
        mutual, independent = 100 * figures[:, :, :3].mean(1)
        low, high = stats.ttest_rel(mutual, independent).confidence_interval(0.95)
        assert f"{who} R@1 {np.mean(mutual - independent):+.1f} [{low:+.1f}, {high:+.1f}]" in sentence
    assert "3 seeds" in sentence and "†" not in sentence
    rows[-1]["device"] = "GPU"
    assert ablations.report.mutual_learning(rows, "last") == sentence  # a seed that is not compared
    rows[-2]["device"] = "GPU"
    assert ablations.report.mutual_learning(rows, "last").count("†") == 2
    others = [row for row in rows if row["arm"] != "mutual + view"]
    assert ablations.report.mutual_learning(others, "last") == ""


def test_differences_of_two_devices_are_marked(ablations: Any) -> None:
    """A difference is marked where a seed of both arms ran on two devices, and nowhere else."""

    def row(arm: str, seed: int, device: str) -> dict[str, Any]:
        figures = {"recall@1": 0.5 + seed / 100, "map@r": 0.4}
        evaluated = {"peers": [figures, figures], "ensemble": figures}
        at = {"test": evaluated, "validation": evaluated}
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


def test_the_report_stands_in_the_folder_of_its_rows(ablation: ModuleType, folder: Path) -> None:
    """It is written again as a whole, also after the folder was renamed."""
    shutil.copy(EXPERIMENTS / "ablations" / "characters" / "rows.jsonl", folder)
    ablation.main(str(folder), report=True)
    page = (folder / "report.md").read_text()
    assert "\n| mutual + all, M = 4 | 5 |" in page and "(differences.png)" in page
    renamed = folder.rename(folder.parent / "renamed")
    (renamed / "report.md").write_text("old")
    ablation.main(str(renamed), report=True)
    assert (renamed / "report.md").read_text() == page


@pytest.mark.parametrize("name", ["characters", "grocery"])
def test_the_arms_of_the_experiments_are_valid(ablations: Any, tmp_path: Path, name: str) -> None:
    """Every arm parses, and each diversity makes the peers different."""
    made = ablations.arms.Plan(EXPERIMENTS / "ablations" / name, [f"data.root={tmp_path}"])
    backbones = [peer.backbone for peer in made.config(ablations.arms.ARMS["mutual + all"], 0).cohort.peers]
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


@pytest.mark.parametrize("name", ["characters", "grocery"])
def test_the_rows_of_the_experiments_are_finished(
    ablation: ModuleType, ablations: Any, tmp_path: Path, name: str
) -> None:
    """The rows in the repository have the settings of their arms, the report is theirs, and none is missing."""
    folder = EXPERIMENTS / "ablations" / name
    made = ablations.arms.Plan(folder, [f"data.root={tmp_path}"])
    digests = {arm: made.digest(ablations.arms.ARMS[arm]) for arm in ablations.arms.ARMS}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    ablation.require_same_settings(rows, digests, folder / "rows.jsonl")
    wanted = [(arm, seed) for arm in digests for seed in range(5)]
    assert sorted((row["arm"], row["seed"]) for row in rows) == sorted(wanted)
    assert ablation.left_to_run(rows, wanted, digests) == []
    assert ablations.report.table(rows, "last") in (folder / "report.md").read_text()


def test_a_wrong_plan_is_refused(ablations: Any, folder: Path) -> None:
    """The message names a missing part, an unknown setting, and a setting without effect."""
    for change, message in [
        ({"temporal": None}, "must have"),
        ({"mutual": {"loss.relational.distanc": 1}}, "distance"),
        ({"view": [{"view": "mild"}, {}, {}, {}]}, "view"),
        ({"model": [{}, {"init_seed": 1}]}, "one entry for each of 4 peers"),
        ({"independent": None, "typo": {}}, "must have"),
        ({"independent": {"train.steps": 16}}, "may set .*not train.steps"),
        (
            {"independent": {"loss.relational.angle_weight": 1}},
            "independent may not set loss.relational.angle_weight",
        ),
        (
            {"ema": {"loss.relational.angle_weight": 1}},
            "ema may not set loss.relational.angle_weight",
        ),
        ({"ema": {}}, "yaml: independent . all . ema: ema must give all peers"),
    ]:
        parts = {key: value for key, value in {**PARTS, **change}.items() if value is not None}
        (folder / "arms.yaml").write_text(yaml.safe_dump(parts))
        with pytest.raises(UserError, match=message):
            plan(ablations, folder)
    (folder / "arms.yaml").write_text(yaml.safe_dump(PARTS))
    for setting, message in [
        ("cohort.peers.1.view=weak", "cohort.peers must be equal"),
        ("train.init_from=runs/a", "train.init_from must be null"),
        ("failure.on_nonfinite=skip", 'must be "fail" in an ablation, not skip'),
    ]:
        with pytest.raises(UserError, match=message):
            ablations.arms.Plan(folder, [setting])


def test_a_task_takes_a_core_and_its_share_of_a_gpu(ablation: ModuleType) -> None:
    assert ablation.resources(0.25, {"CPU": 8.0}) == {"num_cpus": 1}
    assert ablation.resources(0.25, {"CPU": 8.0, "GPU": 1.0}) == {"num_cpus": 1, "num_gpus": 0.25}


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_rows_are_kept_and_finished_ones_are_not_run_again(
    ablation: ModuleType, private_ray: None, folder: Path, image_folder: Path, refused: Refused
) -> None:
    """Each finished arm and seed has a row, and tables and plots show all rows. Rows of other settings or
    images are refused. An arm that fails is named, and the other arms are finished."""
    file, arms = folder / "rows.jsonl", ["independent", "mutual + all", "independent"]
    ablation.main(str(folder), arm=arms, seeds=2)
    first = file.read_text()
    rows = read(folder)
    assert sorted((row["arm"], row["seed"]) for row in rows) == [
        *(("independent", 0), ("independent", 1)),
        *(("mutual + all", 0), ("mutual + all", 1)),
    ]
    page = (folder / "report.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| mutual + all |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    mean = np.mean(
        [[peer["recall@1"] for peer in row["last"]["test"]["peers"]] for row in rows if row["arm"] == "mutual + all"]
    )
    assert cells[1] == "2" and cells[2].startswith(f"{100 * mean:.1f} ±")
    assert all(cell[0] in "+-" and "[" not in cell for cell in cells[-4:-2])
    for plot in ("differences.png", "mechanism.png"):
        assert (folder / plot).stat().st_size > 5000 and plot in page

    with refused("rows of other settings"):
        ablation.main(str(folder), ["cohort.base.embedding_size=24"], arm=arms, seeds=2)
    fewer = folder.parent / "fewer"
    shutil.copytree(image_folder, fewer)
    next(fewer.rglob("*.png")).unlink()
    with refused("rows of other images"):
        ablation.main(str(folder), [f"data.root={fewer}"], arm=arms, seeds=3)
    assert file.read_text() == first


def test_an_arm_that_fails_costs_no_other(
    ablation: ModuleType, private_ray: None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that diverges fails its arm. The line that a killed process left incomplete is removed."""
    broken = "mutual + all + ema"
    ema = {"cohort.base.optimizer.lr": 1e30, **PARTS["ema"]}
    (folder / "arms.yaml").write_text(yaml.safe_dump({**PARTS, "ema": ema}))
    ablation.main(str(folder), arm=["independent"], seeds=1)
    first = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(first + first[:40])
    with pytest.raises(SystemExit, match="1 arms failed"):
        ablation.main(str(folder), arm=[broken, "single net", "independent"], seeds=1)
    output = capsys.readouterr().out
    assert f"{broken}, seed 0: " in output and "not finite" in output
    assert (folder / "rows.jsonl").read_text().startswith(first)
    assert [row["arm"] for row in read(folder)] == ["independent", "single net"]


def test_rows_that_were_edited_by_hand_are_kept(ablations: Any, tmp_path: Path) -> None:
    """An empty line and a missing last newline are accepted. An incomplete last line is removed when the next
    row is added. The message about another line that is not a row has its number."""
    file, open_rows = tmp_path / "rows.jsonl", ablations.rows.open_rows
    for before, after in (
        ('{"seed": 0}\n\n{"seed": 1}', '{"seed": 0}\n\n{"seed": 1}\n{"seed": 2}\n'),
        ('{"seed": 0}\n{"seed": 1}\n{"se', '{"seed": 0}\n{"seed": 1}\n{"seed": 2}\n'),
    ):
        file.write_text(before)
        with open_rows(file) as (rows, _):
            assert rows == [{"seed": 0}, {"seed": 1}]
        assert file.read_text() == before
        with open_rows(file) as (rows, add):
            add({"seed": 2})
        assert file.read_text() == after
    file.write_text('{"seed": 0}\n<<<<\n{"seed": 1}\n')
    with (
        pytest.raises(UserError, match=r"rows\.jsonl, line 2 is not a row: b'<<<<"),
        open_rows(file),
    ):
        pass


def test_a_folder_without_arms_is_refused(ablation: ModuleType, folder: Path, tmp_path: Path, refused: Refused) -> None:
    """An unknown arm and a report without rows are refused, too."""
    with refused(r"arms\.yaml"):
        ablation.main(str(tmp_path))
    with refused("no arm mutal; the arms are: independent; "):
        ablation.main(str(folder), arm=["mutal"])
    with refused(r"rows\.jsonl does not exist: no arm has been run"):
        ablation.main(str(folder), report=True)


def test_of_arms_with_the_same_settings_one_is_run(
    ablation: ModuleType, ablations: Any, private_ray: None, folder: Path, refused: Refused
) -> None:
    """Where arms.yaml normalises relations anyway, "unit length" is the same arm. Its rows are marked copies, in
    the file and in the table, and take no time."""
    one, other = "mutual + all", "mutual + all, unit length"
    mutual = {"loss.relational.distance_weight": 3, "loss.relational.normalize": True}
    (folder / "arms.yaml").write_text(yaml.safe_dump({**PARTS, "mutual": mutual}))
    ablation.main(str(folder), arm=["single net", one, other], seeds=2)
    file = folder / "rows.jsonl"
    rows = read(folder)
    copies = {row["seed"]: row for row in rows if row["arm"] == other}
    assert len(rows) == 6 and sorted(copies) == [0, 1]
    for row in rows:
        if row["arm"] == one:
            copied = copies[row["seed"]]
            assert copied.pop("same_as") == one
            assert copied.pop("seconds") == 0.0 < row.pop("seconds")
            assert {**copied, "arm": one} == row
        else:
            assert row["arm"] == other or "same_as" not in row
    page = (folder / "report.md").read_text()
    validation = page.partition("At the last step, on validation classes")[2]
    line = next(line for line in validation.splitlines() if line.startswith(f"| {one} |"))
    ensembles = [100 * row["last"]["validation"]["ensemble"]["recall@1"] for row in rows if row["arm"] == one]
    assert line.split(" | ")[4].startswith(f"{np.mean(ensembles):.1f} ± ")
    assert f"| {other} (same settings as {one}) | 2 |" in page and "4 rows and 2 copies, " in page

    # Copies are made of rows that were there before, too. The second time nothing is left to do.
    kept = [row for row in rows if row["arm"] != other]
    file.write_text("".join(json.dumps({"seconds": 1.0, **row}) + "\n" for row in kept))
    for _ in range(2):
        ablation.main(str(folder), ["data.root=/gone"], arm=[one, other], seeds=2)
        assert len(file.read_text().splitlines()) == 6

    # The first of arms with the same settings is run. A copy without its original is refused.
    made = plan(ablations, folder)
    digests = {name: made.digest(arm) for name, arm in ablations.arms.ARMS.items()}
    wanted = [(one, 0), (other, 0), (one, 1)]
    assert ablation.left_to_run([], wanted, digests) == [(one, 0), (one, 1)]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "same_as" in line))
    with refused(f"of rows that no longer exist: .*{re.escape(other)}"):
        ablation.main(str(folder), arm=[one, other], seeds=2)


def test_averaged_weights_of_the_same_settings_are_no_copy(ablation: ModuleType, ablations: Any, folder: Path) -> None:
    """Where config.yaml gives all peers an average, an arm and the arm "+ ema" are trained with the same
    settings, but evaluated with other weights."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["cohort"]["base"]["ema"] = {"decay": 0.5}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    made, arms = plan(ablations, folder), ablations.arms.ARMS
    names = ["independent + all", "independent + all + ema"]
    assert made.config(arms[names[0]], 0) == made.config(arms[names[1]], 0)
    digests = {name: made.digest(arms[name]) for name in names}
    wanted = [(name, 0) for name in names]
    assert ablation.left_to_run([], wanted, digests) == wanted
    row = {"arm": names[0], "settings": digests[names[0]], "seed": 0, "seconds": 1.0}
    assert ablation.copies([row], wanted, digests) == []
