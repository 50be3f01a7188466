"""Exported files and docs/how-to/export.md: what is in a file, that it computes what PyTorch computes, and what becomes
of one that does not."""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from ray_dmml import Config, UserError, export, load_cohort, train
from ray_dmml.cli.main import app
from ray_dmml.config.code import use_code
from ray_dmml.models.embedding_net import standardize

PAGE = Path(__file__).parents[2] / "docs/how-to/export.md"
EXPORT, ONNX, CROP, TIMM = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)

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
def here(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page assumes: a run of two families whose images are resized, the exported file of a peer, and a photo
    that lies on its side."""
    folder = tmp_path_factory.mktemp("here")
    raw = tiny(image_folder, train={"steps": 6, "evaluate_every": 6}, evaluation={"untrained": False})
    raw["checkpoint"] = {"every_steps": 6}
    raw["data"] |= {"decode_size": 50}
    raw["cohort"]["peers"] = [{}, {"backbone": "test_vit2", "embedding_size": 12, "input_size": 64}]
    train(Config.parse(raw), folder / "runs/photos", local=True)
    waves = np.sin(np.arange(150)[:, None] / 9 + np.arange(211) / 5 * np.arange(1, 4)[:, None, None]) * 120 + 128
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(waves.transpose(1, 2, 0).astype(np.uint8)).save(folder / "a.jpg", exif=exif)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names: dict[str, Any] = {}
        exec(EXPORT, names)
    (folder / "report.json").write_text(json.dumps(names["report"]))
    return folder


@pytest.fixture
def run(here: Path) -> Path:
    return here / "runs/photos"


def noise(size: int) -> Tensor:
    return torch.randint(0, 256, (size, 3, 50, 50), dtype=torch.uint8)


def test_an_onnx_file(here: Path, run: Path) -> None:
    """Batches of any size have PyTorch's embeddings in onnxruntime; the metadata are readable without this package."""
    import onnxruntime

    out = here / "photos.onnx"
    session = onnxruntime.InferenceSession(out)
    peer = load_cohort(run).peers["peer0"]
    for size in (1, 5):
        images = noise(size)
        (embeddings,) = session.run(["embeddings"], {"images": images.numpy()})
        assert embeddings.dtype == np.float32
        assert np.allclose(embeddings, peer.embed(images).numpy(), atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert (facts["license"], facts["fingerprint"], facts["peer"]) == ("not stated", peer.fingerprint, "peer0")
    assert len(json.loads(facts["classes"])) == TRAINING_CLASSES
    assert [view["center_crop"] for view in json.loads(facts["preprocessing"])["peers"]] == [32]
    assert {"ray-dmml", "torch", "timm", "onnxruntime"} <= json.loads(facts["versions"]).keys()
    assert str(Path(torch.__file__).parents[1]).encode() not in out.read_bytes()  # whoever gets it learns no paths

    report = json.loads((here / "report.json").read_text())
    assert report["largest_difference"] <= 1e-5 and (report["split"], report["num_images"]) == ("test", 40)
    assert report["recall@1"]["file"] == report["recall@1"]["pytorch"]
    assert report["bytes"] == out.stat().st_size
    assert {path.name for path in here.iterdir()} == {"runs", "a.jpg", "photos.onnx", "report.json"}
    with pytest.raises(UserError, match=r"photos\.onnx already exists"):
        export(run, out)


def test_a_torch_file(run: Path, tmp_path: Path) -> None:
    """The same for torch.export, of a transformer, by the command, which prints the comparison."""
    out = tmp_path / "peer.pt2"
    options = ["--peer", "peer1", "--format", "torch", "--license", "CC-BY-4.0"]
    ended = CliRunner().invoke(app, ["export", str(run), "--out", str(out), *options])
    assert ended.exit_code == 0, ended.output
    assert all(text in ended.stdout for text in ("40 test images", "PyTorch", "torch fp32", f"exported to {out}"))
    files = {"metadata.json": ""}
    module = torch.export.load(out, extra_files=files).module()
    peer = load_cohort(run).peers["peer1"]
    for size in (1, 5):
        images = noise(size)
        assert torch.allclose(module(images), peer.embed(images), atol=1e-5)
    facts = json.loads(files["metadata.json"])
    assert (facts["license"], facts["fingerprint"], facts["peer"]) == ("CC-BY-4.0", peer.fingerprint, "peer1")
    assert len(facts["classes"]) == TRAINING_CLASSES
    assert facts["preprocessing"]["decode_size"] == 50
    assert str(Path(torch.__file__).parents[1]).encode() not in out.read_bytes()


def test_the_page_without_pytorch(here: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of docs/how-to/export.md give the embedding of ``embed_files``, with both kinds of resize."""
    monkeypatch.chdir(here)
    peer = load_cohort(run).peers["peer0"]
    names: dict[str, Any] = {}
    exec(ONNX, names)
    assert np.abs(names["embeddings"] - peer.embed_files("a.jpg")).max() < 1e-4

    resizing = "image = resize(resize(image, 1, size), 0, size)  # the width first\n"
    assert resizing in ONNX
    exec(ONNX.replace(resizing, CROP), names)
    peer.resize = "center_crop"
    assert np.abs(names["embeddings"] - peer.embed_files("a.jpg")).max() < 1e-4


def test_the_page_in_plain_pytorch(here: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of docs/how-to/export.md give the embeddings of the peer."""
    monkeypatch.chdir(here)
    peer = load_cohort(run).peers["peer0"]
    decoded = noise(3)
    names: dict[str, Any] = {"images": standardize(peer.view(decoded), peer.net.mean, peer.net.std)}
    with torch.no_grad():
        exec(TIMM, names)
    assert torch.allclose(names["embeddings"], peer.embed(decoded), atol=1e-5)


def test_a_file_that_differs_is_not_left(image_folder: Path, tmp_path: Path) -> None:
    """The command names the figures, and the folder is as before."""
    (tmp_path / "otherwise.py").write_text(OTHERWISE)
    raw = tiny(image_folder, train={"steps": 1, "evaluate_every": 1}, evaluation={"untrained": False})
    raw["code"] = [str(tmp_path / "otherwise.py")]
    raw["cohort"] |= {"base": {"backbone": "otherwise:Otherwise", "embedding_size": 8}, "peers": [{"name": "own"}]}
    train(Config.parse(raw), tmp_path / "run", local=True)
    out = tmp_path / "out"
    out.mkdir()
    command = ["export", str(tmp_path / "run"), "--out", str(out / "own.pt2"), "--peer", "own", "--format", "torch"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "--trust-code" in refused.stderr
    ended = CliRunner().invoke(app, [*command, "--trust-code"])
    assert ended.exit_code == 2
    assert "own.pt2 is not exported" in ended.stderr and "40 test images" in ended.stderr, ended.stderr
    assert list(out.iterdir()) == []
    use_code({})


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_full_disk(run: Path, tmp_path: Path, format: str) -> None:
    """A limit on the size of files stands for it. The folder is as before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"a cannot be written: File too large"):
            export(run, tmp_path / "a", peer="peer0", format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused in one sentence, before anything is computed."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("no peer 'peer7'; it has peer0, peer1, and ensemble", {"peer": "peer7"}),
        ("format must be one of onnx, torch, not 'tflite'", {"format": "tflite"}),
        ("int8 is onnxruntime's dynamic quantisation", {"format": "torch", "precision": "int8"}),
        ("is not an existing folder", {"out": tmp_path / "nowhere" / "a.onnx"}),
        ("compared with PyTorch on images, and the images to evaluate, .* do not exist", {"images": tmp_path / "no"}),
    ]
    for message, args in cases:
        with pytest.raises(UserError, match=message):
            export(run, **{"out": tmp_path / "a.onnx", **args})
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    config = Config.load(run / "config.yaml", {"data.root": str(tmp_path / "gone")})
    (moved / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(UserError, match=r"gone is not an existing folder; other images: --images"):
        export(moved, tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'ray-dmml\[export\]'"):
        export(run, tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()
