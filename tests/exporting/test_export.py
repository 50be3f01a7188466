"""Exported files: what is in them, that they compute what PyTorch computes, and what becomes of those that do not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from typer.testing import CliRunner

from ray_dmml import Config, UserError, export, load_cohort, train
from ray_dmml.cli.main import app

TRAINING_CLASSES = 6

OTHERWISE = """
import torch
from torch import nn


class Otherwise(nn.Module):
    pretrained_cfg = {"input_size": (3, 16, 16)}

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, images):
        features = self.layer(images).relu().mean(dim=(2, 3))
        return features.flip(1) if torch.compiler.is_compiling() else features
"""
"""An own backbone that computes something else once it is traced."""


@pytest.fixture(scope="module")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two families, whose images are resized, and a backbone of one's own."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "otherwise.py").write_text(OTHERWISE)
    raw = tiny(image_folder, train={"steps": 1, "evaluate_every": 1}, evaluation={"untrained": False})
    raw["code"] = [str(folder / "otherwise.py")]
    raw["data"] |= {"decode_size": 50}
    raw["cohort"]["peers"] = [
        {},
        {"backbone": "test_vit2", "embedding_size": 12, "input_size": 64},
        {"backbone": "otherwise:Otherwise", "name": "own", "embedding_size": 8},
    ]
    train(Config.parse(raw), folder / "run", local=True)
    return folder / "run"


def noise(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size, 3, 50, 50), dtype=torch.uint8)


def test_onnx_of_a_peer(run: Path, tmp_path: Path) -> None:
    """Batches of any size have PyTorch's embeddings in onnxruntime; the metadata are readable without this package."""
    import onnxruntime

    out = tmp_path / "peer.onnx"
    report = export(run, out, peer="peer0", license="CC-BY-4.0", trust_code=True)
    session = onnxruntime.InferenceSession(out)
    peer = load_cohort(run, trust_code=True).peers["peer0"]
    for size in (1, 5):
        images = noise(size)
        (embeddings,) = session.run(["embeddings"], {"images": images.numpy()})
        assert embeddings.dtype == np.float32
        assert np.allclose(embeddings, peer.embed(images).numpy(), atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert (facts["license"], facts["fingerprint"], facts["peer"]) == ("CC-BY-4.0", peer.fingerprint, "peer0")
    assert len(json.loads(facts["classes"])) == TRAINING_CLASSES
    assert json.loads(facts["preprocessing"])["decode_size"] == 50
    assert {"ray-dmml", "torch", "timm", "onnxruntime"} <= json.loads(facts["versions"]).keys()
    assert str(Path(torch.__file__).parents[1]).encode() not in out.read_bytes()  # whoever gets it learns no paths

    assert report["largest_difference"] <= 1e-5 and report["num_images"] == 40
    assert report["recall@1"]["file"] == report["recall@1"]["pytorch"]
    assert report["bytes"] == out.stat().st_size
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(UserError, match=r"peer\.onnx already exists"):
        export(run, out, peer="peer0")


def test_torch_file_of_a_peer(run: Path, tmp_path: Path) -> None:
    """The same for torch.export, of a transformer."""
    out = tmp_path / "peer.pt2"
    export(run, out, peer="peer1", format="torch", trust_code=True)
    files = {"metadata.json": ""}
    module = torch.export.load(out, extra_files=files).module()
    peer = load_cohort(run, trust_code=True).peers["peer1"]
    for size in (1, 5):
        images = noise(size)
        assert torch.allclose(module(images), peer.embed(images), atol=1e-5)
    facts = json.loads(files["metadata.json"])
    assert facts["fingerprint"] == peer.fingerprint and len(facts["classes"]) == TRAINING_CLASSES
    assert facts["preprocessing"]["peers"][0]["center_crop"] == 64


def test_a_file_that_differs_is_not_left(run: Path, tmp_path: Path) -> None:
    """The command names the figures, and the folder is as before."""
    options = ["--out", str(tmp_path / "own.pt2"), "--peer", "own", "--format", "torch"]
    refused = CliRunner().invoke(app, ["export", str(run), *options])
    assert refused.exit_code == 2 and "--trust-code" in refused.stderr
    ended = CliRunner().invoke(app, ["export", str(run), *options, "--trust-code"])
    assert ended.exit_code == 2
    assert "own.pt2 is not exported" in ended.stderr and "40 test images" in ended.stderr, ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused in one sentence, before anything is computed."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("no peer 'peer7'; it has peer0, peer1, own, and ensemble", {"peer": "peer7"}),
        ("format must be one of onnx, torch, not 'tflite'", {"format": "tflite"}),
        ("int8 is onnxruntime's dynamic quantisation", {"format": "torch", "precision": "int8"}),
        ("is not an existing folder", {"out": tmp_path / "nowhere" / "a.onnx"}),
        ("compared with PyTorch on images, and the images to evaluate, .* do not exist", {"images": tmp_path / "no"}),
    ]
    for message, args in cases:
        with pytest.raises(UserError, match=message):
            export(run, **{"out": tmp_path / "a.onnx", "trust_code": True, **args})
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    config = Config.load(run / "config.yaml", {"data.root": str(tmp_path / "gone")})
    (moved / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(UserError, match=r"gone is not an existing folder; other images: --images"):
        export(moved, tmp_path / "a.onnx", trust_code=True)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'ray-dmml\[export\]'"):
        export(run, tmp_path / "a.onnx", trust_code=True)
    assert not (tmp_path / "a.onnx").exists()
