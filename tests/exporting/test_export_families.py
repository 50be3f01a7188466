"""Exported files of nets of real size, one of each family, and of an ensemble of three."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tiny

from ray_dmml import Config, export, train

pytestmark = pytest.mark.slow

PEERS = [
    {"name": "resnet", "backbone": "resnet18", "pooling": "gem"},
    {"name": "lite", "backbone": "tf_efficientnet_lite0", "weights": "offline", "batch_norm": "frozen"},
    {"name": "convnext", "backbone": "convnext_atto"},
    {"name": "vit", "backbone": "vit_tiny_patch16_224", "input_size": 96, "pooling": "avg"},
]


@pytest.fixture(scope="module")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four peers."""
    out = tmp_path_factory.mktemp("runs") / "run"
    raw = tiny(image_folder, train={"steps": 3, "evaluate_every": 3}, evaluation={"untrained": False})
    raw["data"] |= {"decode_size": 80}
    raw["cohort"]["base"] |= {"input_size": 64, "embedding_size": 128, "optimizer": {"lr": 1e-4}}
    raw["cohort"]["peers"] = PEERS
    train(Config.parse(raw), out, local=True)
    return out


@pytest.fixture(scope="module")
def ensemble_of_three(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nets of different sizes, with averaged weights."""
    out = tmp_path_factory.mktemp("runs") / "three"
    raw = tiny(image_folder, train={"steps": 2, "evaluate_every": 2}, evaluation={"untrained": False, "weights": "ema"})
    raw["data"] |= {"decode_size": 90}
    raw["cohort"]["base"] |= {"input_size": 64, "ema": {"decay": 0.9}}
    raw["cohort"]["peers"] = [PEERS[1], {"backbone": "resnet18", "input_size": 96}, PEERS[3] | {"embedding_size": 50}]
    train(Config.parse(raw), out, local=True)
    return out


@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize("peer", [str(peer["name"]) for peer in PEERS])
def test_a_peer(run: Path, tmp_path: Path, peer: str, format: str) -> None:
    report = export(run, tmp_path / "file", peer=peer, format=format)
    print(report)
    assert report["embedding_size"] == 128
    assert report["largest_difference"] <= 1e-5
    assert report["recall@1"]["file"] == report["recall@1"]["pytorch"]


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_an_ensemble(ensemble_of_three: Path, tmp_path: Path, format: str) -> None:
    report = export(ensemble_of_three, tmp_path / "file", format=format)
    print(report)
    assert report["embedding_size"] == 16 + 16 + 50
    assert report["largest_difference"] <= 1e-5


@pytest.mark.parametrize(
    ("format", "precision", "smaller"), [("onnx", "fp16", 1.9), ("torch", "fp16", 1.8), ("onnx", "int8", 2.5)]
)
def test_less_precise_files_of_a_transformer(
    run: Path, tmp_path: Path, format: str, precision: str, smaller: float
) -> None:
    """They are smaller, and retrieve as well."""
    exact = export(run, tmp_path / "exact", peer="vit", format=format)
    report = export(run, tmp_path / "file", peer="vit", format=format, precision=precision)
    print(report)
    assert report["bytes"] * smaller < exact["bytes"]
    assert 1e-5 < report["largest_difference"] < 0.02
