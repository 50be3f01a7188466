"""Runs: what they leave behind, and that interrupted, extended and repeated ones are the same."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import yaml
from conftest import as_in_training, assert_same, tiny

from ray_dmml import Config, UserError, evaluate, train
from ray_dmml.checkpoint.peer_state import decode_peer
from ray_dmml.checkpoint.store import CheckpointStore
from ray_dmml.cohort.local import LocalCohort
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import Interrupted, PeerLostError
from ray_dmml.loggers.logger import Logger
from ray_dmml.training.run_dir import RunDir

EVERY_TWO = {"steps": 6, "evaluate_every": 2, "log_every": 3}


def figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a run found out, without how fast it was and what it said about its images."""
    return {key: value for key, value in results.items() if key not in ("images_per_second", "seconds", "notes")}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stored(run: Path, which: str = "last") -> dict[str, Any]:
    peers = CheckpointStore(run / "checkpoints").load(which).peers
    return {name: decode_peer(files) for name, files in peers.items()}


def assert_same_run(found: Path, expected: Path) -> None:
    """Two run folders hold the same weights, optimisers, metrics and results."""
    for which in CheckpointStore(expected / "checkpoints").index():
        assert_same(stored(found, which), stored(expected, which), which)
    assert (found / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
    results = [json.loads((run / "results.json").read_text()) for run in (found, expected)]
    assert figures(results[0]) == figures(results[1])


@pytest.fixture(scope="module")
def settings(image_folder: Path) -> dict[str, Any]:
    """2 peers, one averaged, evaluated and stored at every second of 6 steps."""
    raw = tiny(image_folder, train=EVERY_TWO)
    raw["cohort"]["peers"][1]["ema"] = {"decay": 0.5}
    return raw


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be written into."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(Config.parse(settings), out, local=True)
    return out


def changed(raw: dict[str, Any], **sections: dict[str, Any]) -> Config:
    return Config.parse({**raw, **{name: {**raw[name], **new} for name, new in sections.items()}})


# --- the run folder -------------------------------------------------------------------------


def test_a_run_folder_holds_what_was_promised(run: Path, settings: dict[str, Any]) -> None:
    """Config, a row a step, results, checkpoints, environment and TensorBoard events."""
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "images.csv.gz",
        "metrics.jsonl",
        "results.json",
        "run.json",
        "tensorboard",
    ]
    assert Config.load(run / "config.yaml") == Config.parse(settings)
    rows = metrics(run)
    steps = [row for row in rows if "peers" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for row in steps:
        assert list(row["peers"]) == ["peer0", "peer1"]
        for terms in row["peers"].values():
            assert list(terms) == ["loss", "metric", "distance", "angle"]
            mutual = terms["distance"] + 2 * terms["angle"]
            assert terms["loss"] == pytest.approx(terms["metric"] + mutual, rel=1e-5)
    evaluations = [row for row in rows if "validation" in row]
    assert [row["step"] for row in evaluations] == [2, 4, 6]
    assert set(evaluations[0]["validation"]) == {"peers", "ensemble", "agreement"}
    environment = json.loads((run / "run.json").read_text())
    assert environment["threads"] == [1, 1] and environment["versions"]["torch"]
    assert list((run / "tensorboard").iterdir())


def test_results_have_their_form(run: Path) -> None:
    """Fractions for each peer untrained and trained and for the ensemble, and what they are of."""
    results = json.loads((run / "results.json").read_text())
    assert list(results["untrained"]) == list(results["peers"]) == ["peer0", "peer1"]
    rows = [*results["untrained"].values(), *results["peers"].values()]
    for found in [*rows, results["untrained_ensemble"], results["ensemble"]]:
        assert list(found)[:4] == ["recall@1", "recall@2", "map@r", "r_precision"]
        assert all(0 <= value <= 1 for value in found.values())
        assert found["recall@1"] <= found["recall@2"]
    assert results["untrained"] != results["peers"]
    assert (results["num_classes"], results["num_images"]) == (8, 40)
    assert results["weights"] == "best" and results["images_per_second"] > 0
    assert results["seconds"]["run"]["training"] > 0 and list(results["seconds"]["peers"]) == ["peer0", "peer1"]


def test_training_learns(image_folder: Path, tmp_path: Path) -> None:
    """Every peer is better on unseen classes after 40 steps than before, and its loss has fallen."""
    raw = tiny(image_folder, train={"steps": 40, "evaluate_every": 0}, checkpoint={"every_steps": 0})
    raw["data"]["validation_fraction"] = 0
    results = train(Config.parse(raw), tmp_path / "run", local=True)
    rows = metrics(tmp_path / "run")
    for name in ("peer0", "peer1"):
        assert results["peers"][name]["map@r"] > results["untrained"][name]["map@r"] + 0.05
        loss = [row["peers"][name]["metric"] for row in rows]
        assert np.mean(loss[-5:]) < 0.8 * np.mean(loss[:5])


def test_validation_classes_are_disjoint(settings: dict[str, Any]) -> None:
    """No class is in two of train, validation and test."""
    splits = load_splits(Config.parse(settings).data)
    assert splits.validation is not None
    sets = [set(s.class_names) for s in (splits.train, splits.validation, splits.test)]
    assert [len(names) for names in sets] == [6, 2, 8] and len(set.union(*sets)) == 16


def test_the_last_two_checkpoints_and_the_best_are_kept(run: Path) -> None:
    """Of the checkpoints at 0, 2, 4 and 6 the last two and the best are left."""
    index = CheckpointStore(run / "checkpoints").index()
    folders = {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()}
    assert index["last"] == "step-00000006" and folders == {*index.values(), "step-00000004"}


def test_of_equal_evaluations_the_first_is_the_best(run: Path) -> None:
    """On easy images the ensemble is perfect early; later ones that are no better do not count."""
    values = [row["validation"]["ensemble"]["recall@1"] for row in metrics(run) if "validation" in row]
    assert values == [1.0, 1.0, 1.0], "the test needs equal evaluations"
    assert CheckpointStore(run / "checkpoints").index()["best"] == "step-00000002"


def noisy_settings(folder: Path, steps: int, monitor: str) -> Config:
    raw = tiny(folder, train={"steps": steps, "evaluate_every": 1, "monitor": monitor}, checkpoint={"every_steps": 4})
    raw["data"]["validation_fraction"] = 0.5
    raw["cohort"]["base"]["optimizer"] = {"lr": 0.003}
    return Config.parse(raw)


@pytest.fixture(scope="module")
def noisy_run(noisy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 steps, evaluated after each."""
    out = tmp_path_factory.mktemp("noisy run") / "run"
    train(noisy_settings(noisy_folder, 9, "ensemble"), out, local=True)
    return out


@pytest.mark.parametrize("monitor", ["ensemble", "mean_peer"])
def test_the_best_is_kept_when_later_ones_are_worse(
    noisy_folder: Path, noisy_run: Path, tmp_path: Path, monitor: str
) -> None:
    """A run that ends worse than it was: the evaluated checkpoint is that of the best validation
    Recall@1 of what `monitor` names."""

    def monitored(run: Path) -> dict[int, float]:
        values = {}
        for row in metrics(run):
            if "validation" in row:
                peers = [found["recall@1"] for found in row["validation"]["peers"].values()]
                ensemble = row["validation"]["ensemble"]["recall@1"]
                values[row["step"]] = ensemble if monitor == "ensemble" else float(np.mean(peers))
        return values

    values = monitored(noisy_run)
    # The first step that is worse than one before it: there the run is to end.
    stop = next(step for step in range(2, 10) if values[step] < max(values[i] for i in range(1, step)))
    results = train(noisy_settings(noisy_folder, stop, monitor), tmp_path / "run", local=True)
    values = monitored(tmp_path / "run")
    best = max(values, key=lambda step: (values[step], -step))
    assert best < stop and (results["weights"], results["step"]) == ("best", best)
    assert CheckpointStore(tmp_path / "run" / "checkpoints").load("best").step == best
    assert figures(evaluate(tmp_path / "run")) == figures(results)
    assert evaluate(tmp_path / "run", "last")["peers"] != results["peers"]


def test_without_validation_classes_the_last_weights_count(image_folder: Path, tmp_path: Path) -> None:
    """No `best` is made or chosen on the test classes; untrained figures can be left out."""
    raw = tiny(image_folder, evaluation={"untrained": False}, train={"steps": 2})
    raw["data"]["validation_fraction"] = 0
    results = train(Config.parse(raw), tmp_path / "run", local=True)
    assert (results["weights"], results["step"], results["untrained"]) == ("last", 2, {})
    assert figures(evaluate(tmp_path / "run")) == figures(results)
    with pytest.raises(UserError, match="there are no weights 'best'; there are last"):
        evaluate(tmp_path / "run", "best")


def test_without_test_the_test_classes_are_never_read(image_folder: Path, tmp_path: Path) -> None:
    """Their files are garbage, which nobody meets; the result is that of the validation classes."""
    root = shutil.copytree(image_folder, tmp_path / "images")
    for file in (f for label in range(8, 16) for f in (root / f"class{label:02d}").iterdir()):
        file.write_bytes(b"no image")
    raw = tiny(root, data={"check_images": False}, evaluation={"split": "validation"})
    results = train(Config.parse(raw), tmp_path / "run", local=True)
    assert (results["split"], results["num_classes"]) == ("validation", 2)
    assert list(results["untrained"]) == list(results["peers"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    validation = {row["step"]: row["validation"] for row in rows if "validation" in row}
    at_step = {key: validation[results["step"]][key] for key in ("peers", "ensemble")}
    assert as_in_training({key: results[key] for key in ("peers", "ensemble")}) == at_step
    raw["data"]["validation_fraction"] = 0
    with pytest.raises(UserError, match=r"evaluation\.split is validation"):
        Config.parse(raw)


# --- evaluate -------------------------------------------------------------------------------


def test_evaluate_gives_the_runs_own_figures(run: Path) -> None:
    """Exactly, from the checkpoint alone."""
    assert figures(evaluate(run)) == figures(json.loads((run / "results.json").read_text()))


@pytest.mark.parametrize("weights", ["last", "ema"])
def test_other_weights_can_be_evaluated(run: Path, settings: dict[str, Any], tmp_path: Path, weights: str) -> None:
    """`evaluate RUN --weights W` is what a run with `evaluation.weights: W` reports."""
    config = changed(settings, evaluation={"weights": weights})
    results = train(config, tmp_path / "run", local=True)
    assert (results["weights"], results["step"]) == (weights, 6)
    assert figures(evaluate(run, weights)) == figures(results)


def test_averaged_weights_are_those_of_the_peers_that_keep_them(run: Path) -> None:
    """peer1 is averaged and is evaluated with that; peer0 is not, and is evaluated with its last weights."""
    last, averaged = evaluate(run, "last"), evaluate(run, "ema")
    assert averaged["peers"]["peer0"] == last["peers"]["peer0"]
    folder = run / "checkpoints" / "step-00000006"
    live = safetensors.torch.load_file(folder / "peer1" / "weights.safetensors")
    mean = safetensors.torch.load_file(folder / "peer1" / "ema.safetensors")
    assert not any((live[key] == mean[key]).all() for key in live if key.endswith("head.weight"))
    assert not (folder / "peer0" / "ema.safetensors").exists()


# --- again, further, from elsewhere ---------------------------------------------------------


def test_a_run_can_be_repeated_from_its_own_config(run: Path, tmp_path: Path) -> None:
    """config.yaml alone gives the same run again, to the bit."""
    config = tmp_path / "config.yaml"
    shutil.copy(run / "config.yaml", config)
    train(Config.load(config), tmp_path / "again", local=True)
    assert_same_run(tmp_path / "again", run)


def test_another_seed_is_another_run(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """The first step's losses differ already."""
    train(Config.parse({**settings, "seed": 1}), tmp_path / "run", local=True)
    assert metrics(tmp_path / "run")[0] != metrics(run)[0]


@pytest.mark.ray
def test_a_killed_run_goes_on_as_if_nothing_had_been(settings: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL at an arbitrary moment, then --resume: weights, optimisers, metrics.jsonl and results
    of a run that was never disturbed."""
    endless = {**settings, "train": {**EVERY_TWO, "steps": 1_000_000}}
    (tmp_path / "endless.yaml").write_text(yaml.safe_dump(endless))
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "ray_dmml.cli", "train", "--local"]
    process = subprocess.Popen(
        [*command, "--config", str(tmp_path / "endless.yaml"), "--out", str(killed)],
        stdout=subprocess.DEVNULL,
    )
    store = CheckpointStore(killed / "checkpoints")
    while store.index().get("last", "") < "step-00000004" and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "results.json").exists()

    last = store.load("last").step
    config = changed(settings, train={"steps": last + 3})
    train(config, resume=killed, local=True)
    train(config, tmp_path / "undisturbed", local=True)
    assert_same_run(killed, tmp_path / "undisturbed")
    assert Config.load(killed / "config.yaml") == config


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    run: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Its folder holds the config and perhaps a few rows; --resume makes the whole run of it."""
    (tmp_path / "run").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "peers": {}}\n')
    train(resume=tmp_path / "run", local=True)
    assert_same_run(tmp_path / "run", run)


def test_a_run_can_be_extended(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """4 steps and 2 more are 6 steps; rows after the last checkpoint and a line cut short, as a
    crash leaves them, are dropped."""
    train(changed(settings, train={"steps": 4}), tmp_path / "run", local=True)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "peers": {"peer0": {"loss": 99.0}}}\n{"step": 6, "pee')
    train(changed(settings, train={"steps": 6}), resume=tmp_path / "run", local=True)
    assert_same_run(tmp_path / "run", run)


def test_a_run_can_be_asked_to_stop(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """It ends after a step, with a checkpoint of it, and goes on to the same bits."""
    reached = [0]

    class Steps(Logger):
        def log(self, metrics: Mapping[str, Any], step: int) -> None:
            reached[0] = step

    stop, out = changed(settings, checkpoint={"every_steps": 4}), tmp_path / "run"
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        train(stop, out, loggers=[Steps()], should_stop=lambda: reached[0] >= 3, local=True)
    assert RunDir.open(out).checkpoints.load("last").step == 3
    train(resume=out, local=True)
    assert_same(stored(out), stored(run))
    assert (out / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


def test_a_changed_byte_costs_the_steps_since_the_checkpoint_before(
    run: Path, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The peer that reads its file finds out, and all peers go back further, to the same end."""
    out = tmp_path / "run"
    train(changed(settings, train={"steps": 4}), out, local=True)
    file = CheckpointStore(out / "checkpoints").path("last") / "peer1" / "training.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with caplog.at_level("WARNING", "ray_dmml"):
        train(changed(settings, train={"steps": 6}), resume=out, local=True)
    assert re.search(f"{file} is damaged: .*step-00000002 of step 2 is used instead", caplog.text)
    assert_same_run(out, run)


def test_a_finished_run_can_be_resumed(run: Path, tmp_path: Path) -> None:
    """Nothing is trained; the same results are written again."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    train(resume=tmp_path / "run", local=True)
    assert_same_run(tmp_path / "run", run)


def test_weights_alone_after_the_end(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """With checkpoint.final: weights a run ends with the same weights and results, and with no other state. It can be
    evaluated and started from, but not resumed; a finished run can be reduced to that later."""
    config = changed(settings, checkpoint={"final": "weights"})
    before = json.loads((run / "results.json").read_text())
    direct, later = tmp_path / "direct", tmp_path / "later"
    train(config, direct, local=True)
    shutil.copytree(run, later)
    train(config, resume=later, local=True)
    for reduced in (direct, later):
        files = {file.name for file in (reduced / "checkpoints").rglob("*") if file.is_file()}
        assert files == {"index.json", "manifest.json", "weights.safetensors", "ema.safetensors"}
        assert figures(json.loads((reduced / "results.json").read_text())) == figures(before)
        for which in ("last", "best"):
            found, expected = (CheckpointStore(of / "checkpoints").load(which) for of in (reduced, run))
            for peer, content in found.peers.items():
                assert content == {file: expected.peers[peer][file] for file in content}
    for weights in ("best", "ema"):
        assert figures(evaluate(direct, weights)) == figures(evaluate(run, weights))
    for again in (None, changed(settings, train={"steps": 8})):
        with pytest.raises(UserError, match=r"kept only its weights \(checkpoint\.final: weights\).*train\.init_from="):
            train(again, resume=direct, local=True)
    started = train(changed(settings, train={"init_from": direct, "steps": 1}), tmp_path / "started", local=True)
    assert started["untrained"] == as_in_training(before["peers"])


def test_only_the_number_of_steps_and_what_is_written_may_change(
    run: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Another rate is refused by name, with the way that is open; so are fewer steps."""
    shutil.copytree(run, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    other = Config.parse({**settings, "loss": {"relational": {"angle_weight": 9.0}}})
    with pytest.raises(UserError, match=r"loss\.relational\.angle_weight was 2.0 and is 9.0.*train\.init_from="):
        train(other, resume=tmp_path / "run", local=True)
    with pytest.raises(UserError, match=r"finished 6 steps already, and train\.steps is 5"):
        train(changed(settings, train={"steps": 5}), resume=tmp_path / "run", local=True)
    with pytest.raises(UserError, match="resume continues a run in its own folder: give no out"):
        train(resume=tmp_path / "run", out=tmp_path / "other", local=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    moved = shutil.copytree(settings["data"]["root"], tmp_path / "images")
    config = changed(
        settings,
        data={"root": str(moved)},
        train={"log_every": 1, "tensorboard": False, "steps": 7},
        evaluation={"recall_at": [1, 4]},
    )
    results = train(config, resume=tmp_path / "run", local=True)
    assert "recall@4" in results["ensemble"]
    assert metrics(tmp_path / "run")[-2]["step"] == 7


def test_init_from_starts_from_the_weights_of_another_run(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """What is `untrained` now is what was trained before; the first loss is another; steps count
    from the beginning. Once the run has a checkpoint, the other one may be gone."""
    other = shutil.copytree(run, tmp_path / "other")
    results = train(changed(settings, train={"init_from": other}), tmp_path / "run", local=True)
    shutil.rmtree(other)
    assert figures(train(resume=tmp_path / "run", local=True)) == figures(results)
    before = json.loads((run / "results.json").read_text())
    assert results["untrained"] == as_in_training(before["peers"])
    assert results["untrained_ensemble"] == as_in_training(before["ensemble"])
    rows = metrics(tmp_path / "run")
    assert rows[0]["step"] == 1
    for name in ("peer0", "peer1"):
        assert rows[0]["peers"][name]["loss"] != metrics(run)[0]["peers"][name]["loss"]


def test_init_from_what_does_not_fit_leaves_nothing(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """Other peers or other nets are refused before a folder is made."""
    start = {"init_from": run}
    renamed = changed(settings, train=start, cohort={"peers": [{"name": "x"}, {}]})
    with pytest.raises(UserError, match="has no peer x; it has peer0, peer1"):
        train(renamed, tmp_path / "run", local=True)
    larger = changed(settings, train=start, cohort={"peers": [{"embedding_size": 17}, {}]})
    with pytest.raises(UserError, match=r"for peer0 do not fit: head\.weight is"):
        train(larger, tmp_path / "run", local=True)
    assert not (tmp_path / "run").exists()


# --- on Ray ---------------------------------------------------------------------------------


def test_a_run_on_ray_is_the_same_run(
    ray_start_4_cpus: None, run: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Half in this process, then resumed on Ray actors: the run folder of one in this process."""
    train(changed(settings, train={"steps": 2}), tmp_path / "run", local=True)
    train(Config.parse(settings), resume=tmp_path / "run")
    assert_same_run(tmp_path / "run", run)
    environment = json.loads((tmp_path / "run" / "run.json").read_text())
    assert environment["transport"] == "direct" and environment["devices"] == ["cpu", "cpu"]
    assert figures(evaluate(tmp_path / "run")) == figures(evaluate(run))


# --- loggers --------------------------------------------------------------------------------


class Recorder(Logger):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.events.append((next(iter(metrics), "progress"), step))

    def rewind(self, step: int) -> None:
        self.events.append(("rewind", step))

    def close(self) -> None:
        self.events.append(("close", 0))


def test_a_logger_gets_everything_in_order(settings: dict[str, Any], tmp_path: Path) -> None:
    """The start, untrained figures, each step, speed, evaluations, checkpoints, the end."""
    recorder = Recorder()
    config = changed(settings, train={"steps": 2, "log_every": 1})
    train(config, tmp_path / "run", local=True, loggers=[recorder])
    assert recorder.events == [
        ("rewind", 0),
        ("checkpoint", 0),
        ("untrained", 0),
        ("progress", 1),
        ("peers", 1),
        ("images_per_second", 1),
        ("progress", 2),
        ("peers", 2),
        ("images_per_second", 2),
        ("validation", 2),
        ("checkpoint", 2),
        ("final", 2),
        ("close", 0),
    ]


def test_sentences_go_through_logging(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """INFO describes the run, DEBUG names what takes the time."""
    with caplog.at_level(logging.DEBUG, "ray_dmml"):
        train(changed(settings, train={"steps": 2}), tmp_path / "run", local=True)
    by_level: dict[int, list[str]] = {logging.INFO: [], logging.DEBUG: []}
    for record in caplog.records:
        by_level.setdefault(record.levelno, []).append(record.getMessage())
    assert any(line.startswith("data      imagefolder: train 30") for line in by_level[logging.INFO])
    activities = by_level[logging.DEBUG]
    assert "training" in activities and "saving a checkpoint" in activities
    assert activities.index("starting the peers") < activities.index("training")


def test_one_process_a_run_folder(image_folder: Path, tmp_path: Path) -> None:
    """Neither a second resume nor a new run gets in while one trains; its files are as they were."""
    out = tmp_path / "run"
    config = Config.parse(tiny(image_folder, train={"steps": 2, "tensorboard": False}))

    class Second(Logger):
        refused: ClassVar[list[str]] = []

        def log(self, metrics: Mapping[str, Any], step: int) -> None:
            for arguments in ({"resume": out}, {"config": config, "out": out}):
                with pytest.raises(UserError) as error:
                    train(**arguments, local=True)  # type: ignore[arg-type]
                self.refused.append(str(error.value))

    train(config, out, local=True, loggers=[Second()])
    assert "another process is training in" in Second.refused[0]
    assert "already exists" in Second.refused[1]
    train(resume=out, local=True)


def test_a_folder_that_is_taken_while_the_peers_start(image_folder: Path, tmp_path: Path) -> None:
    """Of two new runs in one folder the second ends, and the files of the first are as they were."""
    out = tmp_path / "run"
    config = Config.parse(tiny(image_folder, train={"steps": 2, "tensorboard": False}))

    def start_late(*arguments: Any, **named: Any) -> LocalCohort:
        train(config, out, local=True)
        return LocalCohort(*arguments, **named)

    with pytest.raises(UserError, match="already exists"):
        train(config, out, cohort_factory=start_late)
    train(config, tmp_path / "alone", local=True)
    assert_same_run(out, tmp_path / "alone")


def test_a_peer_lost_while_a_resumed_run_starts(image_folder: Path, tmp_path: Path) -> None:
    """All peers start again, and the longer config is written."""
    out = tmp_path / "run"
    config = Config.parse(tiny(image_folder, train={"steps": 2, "tensorboard": False}))
    train(config, out, local=True)
    lost: list[str] = []
    told: list[str] = []

    class Told(Logger):
        def log(self, metrics: Mapping[str, Any], step: int) -> None:
            told.extend([metrics["lost"]] if "lost" in metrics else [])

    class LosesOne(LocalCohort):
        def load(self, state: Mapping[str, Mapping[str, bytes]]) -> None:
            if not lost:
                lost.append("peer1")
                raise PeerLostError("peer1 died")
            super().load(state)

    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    train(longer, resume=out, cohort_factory=LosesOne, loggers=[Told()])
    assert lost == ["peer1"] and told == ["peer1 died"] and RunDir.open(out).config().train.steps == 4
    train(longer, tmp_path / "whole", local=True)
    assert_same(stored(out), stored(tmp_path / "whole"))
