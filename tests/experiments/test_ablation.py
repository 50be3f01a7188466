"""The ablation: arms have what their names say, figures are those of a run, and rows are kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import EXPERIMENTS, Refused, tiny
from scipy import stats

from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError
from ray_dmml.training.run import train

pytestmark = pytest.mark.ray  # one test starts Ray, and matplotlib starts fc-list when it is imported


STEPS = 4
PARTS: dict[str, Any] = {
    "mutual": {"loss.relational.distance_weight": 4, "loss.relational.angle_weight": 8},
    "model": [{}, {"init_seed": 1}, {"init_seed": 2}, {"init_seed": 3}],
    "view": [{"view": "weak"}, {"view": "standard"}, {"view": "weak"}, {"view": "strong"}],
    "temporal": [{}, {"update_interval": 2}, {}, {"update_interval": 2}],
}
DATA = sorted(file.parent.name for file in (EXPERIMENTS / "ablations").glob("*/arms.yaml"))


@pytest.fixture
def folder(tmp_path: Path, image_folder: Path) -> Path:
    """The folder of an ablation that takes seconds."""
    raw = tiny(image_folder, train={"steps": STEPS, "tensorboard": False})
    raw["cohort"] = {"base": {**raw["cohort"]["base"], "init_seed": 0}, "peers": [{}, {}]}
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


def made(ablations: Any, folder: Path, *overrides: str, **parts: Any) -> Any:
    """The plan of a folder whose arms.yaml has these parts; None leaves one out."""
    kept = {key: value for key, value in {**PARTS, **parts}.items() if value is not None}
    (folder / "arms.yaml").write_text(yaml.safe_dump(kept))
    return ablations.plan.Plan(folder, list(overrides))


def test_arms_differ_in_what_their_names_say_and_in_nothing_else(ablations: Any, folder: Path) -> None:
    plan = made(ablations, folder)
    assert list(plan.arms) == ["independent", "independent + all", "mutual + all"]
    for name, arm in plan.arms.items():
        config, diverse = plan.config(arm, seed=3), "all" in name
        relational, peers = config.loss.relational, config.cohort.peers
        mutual = (4, 8) if "mutual" in name else (0, 0)
        assert (relational.distance_weight, relational.angle_weight) == mutual
        assert config.seed == 3 and len(peers) == 2 and peers[0].seed != peers[1].seed
        for key in ("init_seed", "view", "update_interval"):
            assert (getattr(peers[0], key) != getattr(peers[1], key)) == diverse
        other = plan.config(plan.arms["independent"], 3)
        assert (config.data, config.train, peers[0].optimizer) == (
            other.data,
            other.train,
            other.cohort.peers[0].optimizer,
        )


def test_each_seed_holds_out_other_classes(ablations: Any, folder: Path) -> None:
    """The four folds of a quarter hold out each class once. Of larger folds each leaves others to train on."""
    for fraction, part in ((0.25, "validation"), (0.75, "train")):
        plan = made(ablations, folder, f"data.validation_fraction={fraction}")
        splits = [load_splits(plan.config(plan.arms["independent"], seed).data) for seed in range(4)]
        classes = [set(getattr(each, part).class_names) for each in splits]
        assert len(set.union(*classes)) == sum(map(len, classes)) == 8


def test_candidates_are_those_of_their_stage(ablations: Any, folder: Path) -> None:
    """What a stage chose changes the stages after it, and no rows of those before it."""
    chosen = {"loss.relational.distance_weight": 2, "loss.relational.angle_weight": 4}
    more = {**chosen, "loss.relational.teacher": "ensemble", "loss.similarity.weight": 0.1}
    plan = made(ablations, folder, mutual=chosen, rate=2)
    rates = {name: plan.config(arm, 0).cohort.peers[1].optimizer.lr for name, arm in plan.stages["rate"].items()}
    assert [rates[f"independent + all, {factor} x rate"] for factor in ("0.5", "1", "2")] == [5e-4, 1e-3, 2e-3]
    weights = {name: plan.config(arm, 0) for name, arm in plan.stages["weights"].items()}
    assert {config.cohort.peers[0].optimizer.lr for config in weights.values()} == {2e-3}
    forms = {
        (r.distance_weight, r.angle_weight, r.normalize, r.decay_until)
        for r in (config.loss.relational for config in weights.values())
    }
    each = {(w, 2 * w, n, until) for w in (0.5, 1, 2, 4, 8, 16) for n in (False, True) for until in (None, STEPS)}
    assert forms == {*each, (0, 0, False, None)} and len(weights) == 26
    for name, arm in plan.stages["teachers"].items():
        config = plan.config(arm, 0)
        assert len(config.cohort.peers) == int(name.partition("M = ")[2] or 2)
        assert ("ensemble" in name) == (config.loss.relational.teacher == "ensemble")
        assert ("similarity" in name) == (config.loss.similarity.weight > 0)
        assert ("contrastive" in name) == (config.loss.relaxed_contrastive.weight > 0)
        assert config.loss.relational.distance_weight == (0 if "alone" in name or "independent" in name else 2)

    relaxed = {"loss.relaxed_contrastive.weight": 1}
    plans = (
        plan,
        made(ablations, folder, mutual=more, rate=2),
        made(ablations, folder, mutual=relaxed, weights=chosen, rate=2),
    )
    digests = [[plan.digest(arm) for arm in stage.values()] for plan in plans for stage in plan.stages.values()]
    assert digests[:3] == digests[3:6] == digests[6:]
    shared = plan.stages["rate"]["independent, 2 x rate"], plan.stages["weights"]["independent"]
    assert plan.digest(shared[0]) == plan.digest(shared[1]) == plan.digest(plan.arms["independent"])
    assert len({digest for stage in digests[:3] for digest in stage}) == 6 + 24 + 12  # two rows are of two stages each


def test_an_arm_s_figures_are_those_of_a_run_of_its_config(ablations: Any, folder: Path, tmp_path: Path) -> None:
    plan = made(ablations, folder)
    config = plan.config(plan.arms["mutual + all"], seed=1)
    row = ablations.measure.measure(config, load_splits(config.data), "validation")
    evaluation = config.evaluation.model_copy(update={"weights": "last", "split": "validation", "untrained": False})
    results = train(config.model_copy(update={"evaluation": evaluation}), tmp_path / "run", local=True)
    for mine, theirs in [
        *zip(row["peers"], results["peers"].values(), strict=True),
        (row["ensemble"], results["ensemble"]),
    ]:
        for metric in ("recall@1", "map@r"):
            assert mine[metric] == pytest.approx(theirs[metric], abs=1e-5)
    assert row["seed"] == 1


def test_agreement_is_that_of_a_naive_loop(ablations: Any) -> None:
    """Three members have embeddings of different sizes."""
    rng, count = np.random.default_rng(0), 30
    members = [rng.standard_normal((count, size)).astype(np.float32) for size in (4, 8, 16)]
    members = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in members]
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    cosines = [[float(m[i] @ m[j]) for i, j in pairs] for m in members]
    naive = [stats.pearsonr(cosines[a], cosines[b])[0] for a, b in [(0, 1), (0, 2), (1, 2)]]
    assert ablations.measure.agreement(members) == pytest.approx(np.mean(naive), abs=1e-5)
    assert ablations.measure.agreement(members[:1] * 2) == pytest.approx(1)


def row(plan: Any, arm: Any, seed: int, recall: float) -> dict[str, Any]:
    """A row whose peers have this Recall@1, and whose ensemble has 0.1 more."""
    peer, together = ({"recall@1": value, "map@r": value / 2} for value in (recall, recall + 0.1))
    known = {"settings": plan.digest(arm), "seed": seed, "device": "CPU", "commit": "abc", "seconds": 36.0}
    return {"arm": "-", **known, "peers": [peer, peer], "ensemble": together, "agreement": 0.5}


def test_the_report_compares_seed_by_seed(ablations: Any, folder: Path) -> None:
    """Intervals are those of a paired t-test over the seeds that both arms have; fewer than three give none. The best
    candidate has the highest mean over all seeds, and one with fewer seeds is never the best."""
    plan, report = made(ablations, folder), ablations.report
    recalls = {"independent": [0.5, 0.6, 0.5], "independent + all": [0.55, 0.6], "mutual + all": [0.6, 0.62, 0.61, 0.7]}
    tested = [row(plan, plan.arms[name], seed, each) for name in recalls for seed, each in enumerate(recalls[name])]
    stage = plan.stages["weights"]
    candidates = {"independent + all": [0.5] * 3, "raw, weights 4 and 8": [0.6] * 3, "raw, weights 8 and 16": [0.9]}
    chosen = [row(plan, stage[name], seed, each) for name in candidates for seed, each in enumerate(candidates[name])]
    page = report.write_report(plan, tested, chosen, folder).read_text()
    cells = next(line for line in page.splitlines() if line.startswith("| mutual + all |")).strip("| ").split(" | ")
    interval = stats.ttest_rel([60, 62, 61], [50, 60, 50]).confidence_interval(0.95)
    assert cells[1:4] == ["4", f"63.2 ± {np.std([60, 62, 61, 70], ddof=1):.1f}", "73.2 ± 4.6"]
    assert cells[8] == f"+7.7 [{interval.low:+.1f}, {interval.high:+.1f}]" and cells[10] == "+3.5"
    assert "Best: raw, weights 4 and 8: 60.0 / 70.0 (mean peer / ensemble, 3 seeds); +10.0" in page
    assert page.index("| raw, weights 4 and 8 |") < page.index("| raw, weights 8 and 16 |")
    assert "Stage teachers" not in page and "9 rows, 0.1 hours" in page
    assert (folder / "differences.png").stat().st_size > 5000 and "(differences.png)" in page


def test_a_wrong_plan_is_refused(ablations: Any, folder: Path) -> None:
    """The message names a missing part, an unknown setting, and a setting without effect."""
    changes: list[tuple[dict[str, Any], str]] = [
        ({"temporal": None}, "must have"),
        ({"independent": {}}, "must have .* nothing else"),
        ({"mutual": {"loss.relational.distanc": 1}}, "distance"),
        ({"mutual": {"train.steps": 16}}, "mutual must be settings of the loss"),
        ({"weights": {"train.steps": 16}}, "weights must be settings of the loss"),
        ({"view": [{"view": "mild"}, {}, {}, {}]}, "view"),
        ({"model": [{}, {"init_seed": 1}]}, "one entry for each of 4 peers"),
        ({"rate": 0}, "rate must be a number above 0"),
    ]
    for parts, message in changes:
        with pytest.raises(UserError, match=f"arms.yaml: .*{message}"):
            made(ablations, folder, **parts)
    for setting, message in [
        ("cohort.peers.1.view=weak", "cohort.peers must be equal"),
        ("train.init_from=runs/a", "train.init_from"),
        ("data.validation_fraction=0", "data.validation_fraction must be above 0"),
    ]:
        with pytest.raises(UserError, match=message):
            made(ablations, folder, setting)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rows_are_kept_and_finished_ones_are_not_run_again(
    ablation: ModuleType,
    private_ray: None,
    folder: Path,
    image_folder: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each arm and seed has one row, also where stages share it. An arm that fails is named, and the others are
    finished. Rows of other settings or images are refused."""
    file, tested = folder / "candidates.jsonl", folder / "rows.jsonl"
    ablation.main(str(folder), choose="rate", arm=["independent, 1 x rate"], seeds=2, workers=1)
    first = file.read_text()
    assert sorted(each["seed"] for each in read(file)) == [0, 1] and not tested.exists()
    file.write_text(first + first[:40])  # what a killed process leaves
    ablation.main(str(folder), choose="weights", arm=["independent", "raw, weights 4 and 8"], seeds=1)
    assert file.read_text().startswith(first)
    assert [each["arm"] for each in read(file)[2:]] == ["raw, weights 4 and 8"]
    assert "raw, weights 4 and 8: " in capsys.readouterr().out

    broken = {**PARTS, "mutual": {"loss.relational.distance_weight": 1e38}}
    (folder / "arms.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(SystemExit, match="1 runs failed"):
        ablation.main(str(folder), arm=["mutual + all", "independent"], seeds=1)
    assert "mutual + all, seed 0: " in capsys.readouterr().out
    assert [each["arm"] for each in read(tested)] == ["independent"]

    with refused("rows of other settings"):
        ablation.main(str(folder), settings=["cohort.base.embedding_size=24"])
    fewer = folder.parent / "fewer"
    shutil.copytree(image_folder, fewer)
    next(fewer.rglob("*.png")).unlink()
    with refused("rows of other images"):
        ablation.main(str(folder), settings=[f"data.root={fewer}"])
    ablation.main(str(folder), settings=["data.root=/gone"], report=True)
    assert len(read(tested)) == 1


def test_a_folder_without_arms_is_refused(ablation: ModuleType, folder: Path, tmp_path: Path, refused: Refused) -> None:
    """An unknown stage or arm, and a report without rows, are refused, too."""
    with refused(r"arms\.yaml"):
        ablation.main(str(tmp_path))
    with refused("no stage rates; the stages are: rate, weights, teachers"):
        ablation.main(str(folder), choose="rates")
    with refused("no arm mutal; the arms are: independent; "):
        ablation.main(str(folder), arm=["mutal"])
    with refused("no arm has been run"):
        ablation.main(str(folder), report=True)


@pytest.mark.parametrize("name", DATA)
def test_the_arms_of_the_experiments_are_valid(ablations: Any, tmp_path: Path, name: str) -> None:
    """Each diversity makes all peers different, and no peer has a larger net. Rows have the settings of today."""
    folder = EXPERIMENTS / "ablations" / name
    plan = ablations.plan.Plan(folder, [f"data.root={tmp_path}"])
    peers = plan.config(plan.stages["teachers"]["teacher each, M = 4"], 0).cohort.peers
    assert len({peer.init_seed for peer in peers}) == 4 and len({peer.backbone for peer in peers}) == 1
    assert peers[0].view != peers[1].view and peers[0].update_interval != peers[1].update_interval
    stages = [arm for arms in plan.stages.values() for arm in arms.values()]
    for file, arms in (("rows.jsonl", plan.arms.values()), ("candidates.jsonl", stages)):
        settings = {each["settings"] for each in read(folder / file)}
        assert settings <= {plan.digest(arm) for arm in arms}
