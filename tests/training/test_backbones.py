"""The frozen backbone in a run's results: what it retrieves before the head, and who ends below it."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import tiny
from PIL import Image
from rich.console import Console
from torch.nn import functional as F

from ray_dmml import Config, evaluate, train
from ray_dmml.data.datasets import load_splits
from ray_dmml.loggers.results_tables import results_table


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of the backbone."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), path)
    return path


def settings(root: Path, *peers: dict[str, Any], **base: Any) -> Config:
    raw = tiny(root, train={"steps": 2, "evaluate_every": 0}, checkpoint={"every_steps": 0})
    raw["data"] |= {"validation_fraction": 0, "decode_size": 32}
    raw["cohort"]["base"] |= {"eval_crop": 1.0, **base}
    raw["cohort"]["peers"] = [*peers]
    return Config.parse(raw)


def naive_recall(root: Path, config: Config, weights: Path) -> float:
    """Recall@1 of the net's pooled features, with timm, Pillow and a loop."""
    net = timm.create_model("test_resnet", num_classes=0).eval()
    net.load_state_dict(safetensors.torch.load_file(weights))
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    test, features = load_splits(config.data).test, []
    for i in range(len(test)):
        image = Image.open(root / test.source.name(i)).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        with torch.no_grad():
            features.append(F.normalize(net((pixels - mean)[None] / std))[0])
    hits = 0
    for i, query in enumerate(features):
        others = [float(query @ other) if j != i else -2 for j, other in enumerate(features)]
        hits += test.labels[int(np.argmax(others))] == test.labels[i]
    return hits / len(features)


def rows(results: dict[str, Any]) -> list[str]:
    """The first column of the printed table."""
    results_table(results, Console(file=(text := io.StringIO()), width=100))
    return [line.split("│")[1].strip() for line in text.getvalue().splitlines() if line.startswith("│")]


def test_it_is_the_backbone_before_the_head(image_folder: Path, weights: Path, tmp_path: Path) -> None:
    """Peers that start with the same backbone have the same figures, in one row of the table; `evaluate` has them."""
    config = settings(image_folder, {}, {"embedding_size": 5, "view": "weak"}, weights=str(weights))
    results = train(config, tmp_path / "run", local=True)
    frozen = results["frozen_backbones"]
    assert list(frozen) == ["peer0", "peer1"] and frozen["peer0"] == frozen["peer1"]
    assert frozen["peer0"]["recall@1"] == pytest.approx(naive_recall(image_folder, config, weights), abs=1 / 40)
    assert list(frozen["peer0"]) == ["recall@1", "recall@2", "map@r", "r_precision"]
    assert rows(results)[:2] == ["frozen backbone", "peer0, untrained"]
    assert evaluate(tmp_path / "run")["frozen_backbones"] == frozen
    assert json.loads((tmp_path / "run" / "results.json").read_text())["frozen_backbones"] == frozen


def test_backbones_that_differ_have_a_row_each(image_folder: Path, weights: Path, tmp_path: Path) -> None:
    """Random ones differ by their seed, others by the image they get. A peer that never trains has one row, and an
    ensemble with it is not untrained."""
    teacher = tmp_path / "teacher"
    train(settings(image_folder, {"name": "t"}), teacher, local=True)
    [file] = teacher.glob("checkpoints/step-*2/t/weights.safetensors")
    config = settings(
        image_folder,
        {"init_seed": 1},
        {"init_seed": 1, "view": "weak", "embedding_size": 5},
        {"init_seed": 2},
        {"weights": str(weights), "input_size": 24},
        {"weights": str(file), "frozen": True},
    )
    results = train(config, tmp_path / "run", local=True)
    frozen = results["frozen_backbones"]
    assert list(frozen) == ["peer0", "peer1", "peer2", "peer3"]
    assert frozen["peer0"] == frozen["peer1"] != frozen["peer2"] != frozen["peer3"]
    learners = ["peer0", "peer1", "peer2", "peer3"]
    names = ["peer0, peer1, frozen backbone", "peer2, frozen backbone", "peer3, frozen backbone"]
    names += [f"{name}, untrained" for name in learners]
    assert rows(results) == [*names, *learners, "peer4", "ensemble"]


def test_a_peer_that_ends_below_its_backbone_is_named(
    image_folder: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The one that a learning rate without measure has ruined, and none that started from random weights."""
    ruin = {"optimizer": {"name": "sgd", "lr": 1e6}, "embedding_size": 1}
    config = settings(
        image_folder,
        {"weights": str(weights), "optimizer": {"lr": 0.0}, "embedding_size": 400},
        {"weights": str(weights), **ruin},
        ruin,
    ).with_overrides({"loss.relational.normalize": True})  # raw relations overflow
    with caplog.at_level(logging.WARNING, "ray_dmml"):
        results = train(config, tmp_path / "run", local=True)
    worse = [
        name
        for name, row in results["peers"].items()
        if row["recall@1"] < results["frozen_backbones"][name]["recall@1"]
    ]
    assert {"peer1", "peer2"} <= set(worse)
    after, before = (100 * results[key]["peer1"]["recall@1"] for key in ("peers", "frozen_backbones"))
    message = f"peer1 ends below its frozen backbone: Recall@1 is {after:.1f} % and was {before:.1f} %"
    assert message in caplog.text
    assert "peer2 ends below" not in caplog.text
    assert ("peer0 ends below" in caplog.text) == ("peer0" in worse)


def test_figures_can_be_left_out(image_folder: Path, tmp_path: Path) -> None:
    config = settings(image_folder, {})
    evaluation = config.evaluation.model_copy(update={"untrained": False})
    results = train(config.model_copy(update={"evaluation": evaluation}), tmp_path / "run", local=True)
    assert results["frozen_backbones"] == {} and rows(results) == ["peer0", "ensemble"]
