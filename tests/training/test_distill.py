"""Distillation: the config it makes, and a run whose student learns from the frozen peers of another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny, unlike_peers
from test_runs import figures, metrics

from ray_dmml import Config, UserError, compare, distill, evaluate, load_cohort, train
from ray_dmml.checkpoint.peer_files import PeerFiles
from ray_dmml.checkpoint.store import CheckpointStore
from ray_dmml.training.distill import distillation_config, require_images_of

SHORT = {"train.steps": 2, "train.evaluate_every": 1, "evaluation.untrained": False}


@pytest.fixture(scope="module")
def cohort(noisy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three unlike peers; not to be written into."""
    out = tmp_path_factory.mktemp("distill") / "cohort"
    config = unlike_peers(noisy_folder, train={"steps": 3, "evaluate_every": 0, "tensorboard": False})
    train(config, out, local=True)
    return out


@pytest.fixture(scope="module")
def student(cohort: Path) -> Path:
    """A finished distillation of it."""
    out = cohort.with_name("student")
    distill(cohort, "test_resnet", out, local=True, progress=False, overrides=SHORT)
    return out


@pytest.fixture
def copied(cohort: Path, tmp_path: Path) -> Path:
    return shutil.copytree(cohort, tmp_path / "run")


def set_config(run: Path, **sections: dict[str, Any]) -> None:
    raw = yaml.safe_load((run / "config.yaml").read_text())
    for name, entries in sections.items():
        raw[name] |= entries
    (run / "config.yaml").write_text(yaml.safe_dump(raw))


def test_results_have_the_student_its_teachers_and_both_ensembles(cohort: Path, student: Path) -> None:
    """The teachers and their ensemble have the figures of the run that they are from, to the bit: each has its own
    backbone, pooling and weights."""
    before, after = (json.loads((run / "results.json").read_text()) for run in (cohort, student))
    assert list(after["peers"]) == ["student", "peer0", "peer1", "peer2"]
    assert {name: after["peers"][name] for name in before["peers"]} == before["peers"]
    assert after["teachers_ensemble"] == before["ensemble"]
    assert "teachers_ensemble" not in before
    assert figures(evaluate(student)) == figures(after)
    assert {*metrics(student)[0]["peers"]["student"]} == {"loss", "metric", "distance", "angle"}


def test_the_best_checkpoint_is_that_of_the_student(student: Path) -> None:
    """The teachers, whose figures do not change, do not count."""
    evaluations = [row["validation"]["peers"] for row in metrics(student) if "validation" in row]
    best = max(peers["student"]["recall@1"] for peers in evaluations)
    assert best != evaluations[0]["peer0"]["recall@1"], "the mean of all peers could have the same maximum"
    assert CheckpointStore(student / "checkpoints").load("best").meta["best"] == best


def test_the_mean_peer_of_a_comparison_is_of_those_that_learn(cohort: Path, student: Path) -> None:
    """Teachers do not count; without any, it is the mean of all peers."""
    [found] = compare([cohort, student], num_resamples=10)["comparisons"]
    row = found["systems"]["mean_peer"]["recall@1"]
    before, after = (json.loads((run / "results.json").read_text())["peers"] for run in (cohort, student))
    assert row["first"] == pytest.approx(sum(peer["recall@1"] for peer in before.values()) / 3)
    assert row["second"] == pytest.approx(after["student"]["recall@1"])


def drop_peer1(store: CheckpointStore) -> None:
    """As if the run had gone on without it: another checkpoint of its last step says so."""
    last = store.load("last")

    def copy(folder: Path) -> dict[str, PeerFiles]:
        return {name: files.copy_to(folder / name) for name, files in last.peers.items()}

    store.save(last.step, copy, {**last.meta, "dropped": {"peer1": 2}}, best=False)


def test_a_peer_that_was_dropped_is_not_evaluated(student: Path, tmp_path: Path) -> None:
    """Nor are its weights of the best checkpoint, which is older."""
    run = shutil.copytree(student, tmp_path / "run")
    store = CheckpointStore(run / "checkpoints")
    drop_peer1(store)
    for weights in ("last", "best"):
        assert list(evaluate(run, weights)["peers"]) == ["student", "peer0", "peer2"]


def test_the_run_needs_the_other_no_more(cohort: Path, student: Path, tmp_path: Path) -> None:
    """Interrupted after a step, it is resumed, evaluated and used without the folder of its teachers."""
    teachers, run = shutil.copytree(cohort, tmp_path / "teachers"), tmp_path / "run"
    distill(teachers, "test_resnet", run, local=True, progress=False, overrides={**SHORT, "train.steps": 1})
    shutil.rmtree(teachers)
    config = Config.load(run / "config.yaml", {"train.steps": 2})
    results = train(config, resume=run, local=True, progress=False)
    assert figures(results) == figures(json.loads((student / "results.json").read_text()))
    assert list(load_cohort(run).peers) == ["student", "peer0", "peer1", "peer2"]


def test_the_config(cohort: Path) -> None:
    """The student has the settings of the first peer and the size of the largest, and nothing of diversity. The
    teachers have what their embeddings depend on."""
    own = Config.load(cohort / "config.yaml")
    made = distillation_config(cohort, "test_convnext", overrides={"loss.relational.angle_weight": 3})
    assert made.data == own.data and made.loss.metric == own.loss.metric and made.evaluation == own.evaluation
    relational = made.loss.relational
    assert (relational.teacher, relational.normalize) == ("others", False)
    assert (relational.distance_weight, relational.angle_weight) == (4, 3)
    assert made.train.monitor == "mean_peer" and made.train.steps == own.train.steps
    learner, *teachers = made.cohort.peers
    first = own.cohort.peers[0]
    assert (learner.backbone, learner.weights, learner.embedding_size) == ("test_convnext", "none", 23)
    assert (learner.seed, learner.frozen) == (3, False)
    same = ("optimizer", "schedule", "ema", "input_size", "batch_norm", "view")
    assert all(getattr(learner, key) == getattr(first, key) for key in same)
    for teacher, peer in zip(teachers, own.cohort.peers, strict=True):
        assert teacher.frozen and teacher.teacher_view == "evaluation"
        assert all(getattr(teacher, key) == getattr(peer, key) for key in ("name", "backbone", "pooling", "input_size"))
        assert Path(teacher.weights).is_file() and teacher.view == "standard"


def test_a_schedule_ends_with_the_run(copied: Path) -> None:
    """The student's cosine follows `train.steps` if that of the run ended with the run. A change of its own counts."""

    def end(steps: int, *overrides: str) -> int | None:
        peers = yaml.safe_load((copied / "config.yaml").read_text())["cohort"]["peers"]
        peers[0]["schedule"] = {"name": "cosine", "steps": steps}
        set_config(copied, cohort={"peers": peers})
        return distillation_config(copied, "test_vit", overrides=iter(overrides)).cohort.peers[0].schedule.steps

    assert (end(3), end(3, "train.steps=60")) == (3, 60)
    assert end(20, "train.steps=60") == 20
    assert end(3, "train.steps=60", "cohort.peers.0.schedule.steps=3") == 3


def test_what_belongs_to_a_backbone_stays_with_it(copied: Path) -> None:
    """Pooling, frozen blocks and a file of weights; update intervals are left out in any case."""
    file = str(copied / "w.safetensors")
    first = {"pooling": "avg", "freeze_blocks": 1, "weights": file, "update_interval": 2, "embedding_size": 99}
    raw = yaml.safe_load((copied / "config.yaml").read_text())
    peers = [{**peer, **(first if n == 0 else {})} for n, peer in enumerate(raw["cohort"]["peers"])]
    set_config(copied, cohort={"peers": peers, "max_teachers": 1})
    (same, *_), (other, *_) = (distillation_config(copied, name).cohort.peers for name in ("test_resnet", "test_vit"))
    assert (same.pooling, same.freeze_blocks, same.weights) == ("avg", 1, file)
    assert (other.pooling, other.freeze_blocks, other.weights) == ("native", None, "pretrained")
    assert same.update_interval == other.update_interval == 1 and same.embedding_size == 99
    made = distillation_config(copied, "test_vit", weights="none", teacher_view="own")
    assert made.cohort.peers[0].weights == "none" and made.cohort.max_teachers is None
    assert [peer.view for peer in made.cohort.peers[1:]] == [peer["view"] for peer in peers]
    assert {peer.teacher_view for peer in made.cohort.peers[1:]} == {"own"}


def test_the_twin_alone(cohort: Path) -> None:
    """The same student, without teachers. Changes may name them."""
    changes = {"cohort.peers.3.amp": "bfloat16", "cohort.peers.0.view": "weak"}
    taught = distillation_config(cohort, "test_resnet", overrides=changes)
    alone = distillation_config(cohort, "test_resnet", overrides=changes, alone=True)
    assert alone.cohort.peers == taught.cohort.peers[:1] and alone.cohort.peers[0].view == "weak"
    assert alone.model_copy(update={"cohort": taught.cohort}) == taught


def test_teachers_have_the_weights_of_the_results(copied: Path) -> None:
    """Averaged ones, of the peers that have them. A peer that the run has dropped does not teach."""
    set_config(copied, evaluation={"weights": "ema"})
    made = distillation_config(copied, "test_resnet")
    names = ["ema.safetensors", "weights.safetensors", "weights.safetensors"]
    assert [Path(peer.weights).name for peer in made.cohort.peers[1:]] == names
    assert made.evaluation.weights == "ema"
    set_config(copied, evaluation={"weights": "last"})
    store = CheckpointStore(copied / "checkpoints")
    drop_peer1(store)
    teachers = distillation_config(copied, "test_resnet").cohort.peers[1:]
    assert [peer.name for peer in teachers] == ["peer0", "peer2"]


def test_a_student_of_a_student(student: Path) -> None:
    """All peers of the run teach, also those that were frozen there; names stay apart."""
    made = distillation_config(student, "test_convnext")
    assert [peer.name for peer in made.cohort.peers] == ["student1", "student", "peer0", "peer1", "peer2"]
    assert len({peer.seed for peer in made.cohort.peers}) == 5
    assert [peer.backbone for peer in made.cohort.peers[2:]] == ["test_resnet", "test_efficientnet", "test_convnext"]


def test_a_teacher_of_timm(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the place of a run. A relative path is that of the current folder."""
    monkeypatch.chdir(tmp_path)
    config = Config.parse(tiny(image_folder))
    made = distillation_config(None, "test_resnet", teacher="test_vit", teacher_weights="vit.pth", config=config)
    learner, teacher = made.cohort.peers
    assert (learner.name, learner.embedding_size, learner.optimizer.lr) == ("student", 16, 1e-3)
    assert (teacher.name, teacher.backbone, teacher.frozen) == ("teacher", "test_vit", True)
    assert teacher.weights == str(tmp_path / "vit.pth") and teacher.teacher_view == "evaluation"
    assert teacher.input_size is None  # the backbone's own


def test_mistakes(cohort: Path, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the folder of a run"):
        distillation_config(tmp_path, "test_resnet")
    with pytest.raises(UserError, match="give one of the two"):
        distillation_config(None, "test_resnet")
    with pytest.raises(UserError, match="needs a config"):
        distillation_config(None, "test_resnet", teacher="test_vit")
    with pytest.raises(UserError, match="has the config of the run"):
        distillation_config(cohort, "test_resnet", config=Config())
    with pytest.raises(UserError, match="the peers of a run have their own"):
        distillation_config(cohort, "test_resnet", teacher_weights="offline")
    set_config(copied, train={"steps": 9})
    with pytest.raises(UserError, match=r"has not finished: it has made 3 of 9 steps; ray-dmml train --resume"):
        distillation_config(copied, "test_resnet")
    set_config(copied, train={"steps": 3})
    file = next((copied / "checkpoints").glob("step-00000003*/peer1/weights.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"peer1/weights.safetensors is damaged"):
        distillation_config(copied, "test_resnet")
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(UserError, match="has made 0 of 3 steps"):
        distillation_config(copied, "test_resnet")


def test_the_images_must_be_those_of_the_teachers(cohort: Path, noisy_folder: Path, tmp_path: Path) -> None:
    """Their folder may move. A missing one, and another split, are refused by name."""
    moved = shutil.copytree(noisy_folder, tmp_path / "images")
    config = distillation_config(cohort, "test_resnet", overrides={"data.root": moved})
    require_images_of(cohort, config)
    (moved / "class03" / "2.png").unlink()
    with pytest.raises(UserError, match=r"images of .*cohort have changed: 1 missing or unreadable \(class03/2.png\)"):
        require_images_of(cohort, config)
    other = distillation_config(cohort, "test_resnet", overrides={"data.validation_seed": 1})
    with pytest.raises(UserError, match="in another split"):
        require_images_of(cohort, other)
    gone = distillation_config(cohort, "test_resnet", overrides={"data.root": tmp_path / "gone"})
    with pytest.raises(UserError, match="gone is not an existing folder"):
        require_images_of(cohort, gone)
