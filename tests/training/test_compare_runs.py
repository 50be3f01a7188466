"""`ray-dmml compare`: two seeds, and independent peers against peers that learn from each other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Refused, tiny
from typer.testing import CliRunner

from ray_dmml import compare, train
from ray_dmml.cli.main import app
from ray_dmml.config.schema import Config
from ray_dmml.training.evaluate import RunEmbeddings, embed_run

INDEPENDENT = {"loss.relational.distance_weight": 0.0, "loss.relational.angle_weight": 0.0}


@pytest.fixture(scope="module")
def runs(noisy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 2 seeds of 2 settings: mutual0, mutual1, independent0, independent1."""
    folder = tmp_path_factory.mktemp("compared")
    raw = tiny(
        noisy_folder,
        train={"steps": 3, "evaluate_every": 0, "tensorboard": False},
        data={"validation_fraction": 0},
        evaluation={"untrained": False, "recall_at": [1, 2]},
    )
    for name, changes in (("mutual", {}), ("independent", INDEPENDENT)):
        for seed in (0, 1):
            config = Config.parse(raw).with_overrides({"seed": seed, **changes})
            train(config, folder / f"{name}{seed}", local=True, progress=False)
    return folder


@cache
def embedded_by(run: Path) -> RunEmbeddings:
    return embed_run(run)


def recalled(run: Path) -> dict[str, np.ndarray]:
    """By system, whether each image finds one of its class first."""
    embedded = embedded_by(run)
    peers = {name: vectors @ vectors.T for name, vectors in embedded.embeddings.items()}
    similarities = {**peers, "ensemble": np.mean(list(peers.values()), axis=0)}
    labels, found = embedded.images.labels, {}
    for name, matrix in similarities.items():
        np.fill_diagonal(matrix, -np.inf)
        found[name] = (labels[matrix.argmax(axis=1)] == labels).astype(float)
    return {"mean_peer": (found["peer0"] + found["peer1"]) / 2, **found}


def test_two_seeds(runs: Path) -> None:
    """Seeds of one setting are compared with each other."""
    found = compare([runs / "mutual0", runs / "mutual1"], num_resamples=100)
    assert found["differing"] == {"seed": [0, 1]}
    assert [setting["seeds"] for setting in found["settings"]] == [[0], [1]]
    [comparison] = found["comparisons"]
    one, other = recalled(runs / "mutual0"), recalled(runs / "mutual1")
    names = [embedded_by(runs / "mutual0").images.source.name(i) for i in range(found["num_queries"])]
    assert list(comparison["systems"]) == ["mean_peer", "peer0", "peer1", "ensemble"]
    for system, metrics in comparison["systems"].items():
        row = metrics["recall@1"]
        assert row["difference"] == pytest.approx(other[system].mean() - one[system].mean())
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
        assert {"recall@2", "map@r", "r_precision", "mrr"} <= metrics.keys() == comparison["macro"][system].keys()
        only = comparison["found_only_by"][system]
        for which, has, lacks in (("first", one, other), ("second", other, one)):
            expected = (has[system] > 0.5) & (lacks[system] <= 0.5)
            assert only[which] == [names[i] for i in np.flatnonzero(expected)]


def test_two_settings_of_two_seeds(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with the same seed are pairs, in whatever order they are given."""
    monkeypatch.setattr("ray_dmml.evaluation.compare.MIN_SEEDS", 2)
    order = ("independent0", "mutual1", "independent1", "mutual0")
    found = compare([runs / name for name in order], num_resamples=100)
    assert [[Path(run).name for run in setting["runs"]] for setting in found["settings"]] == [
        ["independent0", "independent1"],
        ["mutual1", "mutual0"],
    ]
    assert found["differing"] == {key: [0.0, value] for key, value in weights_of(runs / "mutual0").items()}
    [comparison] = found["comparisons"]
    assert comparison["num_pairs"] == 2
    means = {name: recalled(runs / name)["ensemble"].mean() for name in order}
    row = comparison["systems"]["ensemble"]["recall@1"]
    assert row["first"] == pytest.approx((means["independent0"] + means["independent1"]) / 2)
    assert row["second"] == pytest.approx((means["mutual0"] + means["mutual1"]) / 2)
    differences = [means[f"mutual{seed}"] - means[f"independent{seed}"] for seed in (0, 1)]
    half = 12.706 * abs(differences[0] - differences[1]) / 2  # of Student's t with one degree of freedom
    assert row["seeds_interval"] == pytest.approx((np.mean(differences) - half, np.mean(differences) + half), abs=1e-4)
    is_found = [
        (recalled(runs / f"{name}0")["peer0"] + recalled(runs / f"{name}1")["peer0"]) / 2 > 0.5
        for name in ("independent", "mutual")
    ]
    names = [embedded_by(runs / "mutual0").images.source.name(i) for i in range(found["num_queries"])]
    only = comparison["found_only_by"]["peer0"]
    assert only["first"] == [names[i] for i in np.flatnonzero(is_found[0] & ~is_found[1])]
    assert only["second"] == [names[i] for i in np.flatnonzero(is_found[1] & ~is_found[0])]


def changed_copy(run: Path, to: Path, section: str, **changes: Any) -> Path:
    """A copy of a run whose config says something else."""
    shutil.copytree(run, to)
    raw = yaml.safe_load((to / "config.yaml").read_text())
    raw[section] |= changes
    (to / "config.yaml").write_text(yaml.safe_dump(raw))
    return to


def test_other_held_out_classes_are_another_seed(runs: Path, tmp_path: Path) -> None:
    """Runs that differ in no more are one setting, and those that hold out the same classes are a pair."""
    given = [
        changed_copy(runs / f"{name}0", tmp_path / f"{name}-{seed}", "data", validation_seed=seed)
        for name in ("independent", "mutual")
        for seed in (5, 6)
    ]
    found = compare(given, num_resamples=10)
    assert [len(setting["runs"]) for setting in found["settings"]] == [2, 2]
    assert found["comparisons"][0]["num_pairs"] == 2 and found["differing"].keys() == INDEPENDENT.keys()
    assert compare(given[:2], num_resamples=10)["differing"] == {"data.validation_seed": [5, 6]}


def weights_of(run: Path) -> Mapping[str, Any]:
    relational = Config.load(run / "config.yaml").loss.relational
    return {key: getattr(relational, key.rpartition(".")[2]) for key in INDEPENDENT}


def test_the_command(runs: Path) -> None:
    arguments = ["compare", str(runs / "independent0"), str(runs / "mutual0")]
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for text in (f"A: {runs / 'independent0'} (last weights of step 3)", "loss.relational.angle_weight", "B − A"):
        assert text in shown.stdout
    assert "found by the ensemble of A and not of B: " in shown.stdout
    as_json = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(as_json.stdout)["comparisons"][0]["num_pairs"] == 1


def test_runs_that_are_left_out_are_reported(runs: Path) -> None:
    """Those without a run of the same seed."""

    def shown(*names: str) -> str:
        arguments = ["compare", *(str(runs / name) for name in names)]
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments).stdout

    assert "only runs with the same seed are compared: 1 of A and B each" in shown(
        "independent0", "independent1", "mutual0"
    )
    assert "only runs" not in shown("independent0", "mutual0")
    found = compare([runs / name for name in ("independent0", "independent1", "mutual1")], num_resamples=10)
    first = found["comparisons"][0]["systems"]["ensemble"]["recall@1"]["first"]
    means = [recalled(runs / f"independent{seed}")["ensemble"].mean() for seed in (0, 1)]
    assert first == pytest.approx(means[1]) and means[0] != means[1]


def test_what_cannot_be_compared(runs: Path, small_run: Path, tmp_path: Path, refused: Refused) -> None:
    from ray_dmml.cli.compare import compare as command

    first = runs / "mutual0"
    with refused("a comparison needs two or more runs"):
        command([first])
    with refused("mutual0: a run is compared with others, and named once"):
        command([first, runs / "mutual1", first])
    with refused(f"{small_run} is not evaluated on the images of {first}: \\d+ of another size"):
        command([first, small_run])
    other = changed_copy(runs / "mutual1", tmp_path / "other", "data", train_fraction=0.75)
    (other / "images.csv.gz").unlink()  # without it, what is embedded still differs
    with refused("other is not evaluated on the images of .*: there are others, or other queries"):
        command([first, other])
    with refused("gone is not the folder of a run"):
        command([first, runs / "gone"])
    shutil.copytree(runs / "mutual1", tmp_path / "damaged")
    for file in (tmp_path / "damaged/checkpoints").glob("*/peer0/weights.safetensors"):
        file.write_bytes(file.read_bytes()[:-4])
    with refused("damaged"):
        command([first, tmp_path / "damaged"])
