"""Backbones: their names, their sizes, and weights that were downloaded before, as the hub's client keeps them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import tiny
from test_embedding_net import peer
from torch import nn

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.models.backbone import has_batch_norm
from ray_dmml.models.embedding_net import build_embedding_net
from ray_dmml.training.images import read_images


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of downloads, without network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def repository(cache: Path, name: str) -> Path:
    """The folder of a downloaded repository."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    files = root / "snapshots" / ("0" * 40)
    files.mkdir(parents=True)
    return files


def trained(name: str) -> nn.Module:
    """timm's net with its classifier, none of whose norms has its initial values."""
    net: nn.Module = timm.create_model(name)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return net.eval()


@pytest.mark.parametrize("backbone", ["test_vit", "test_vit.r160_in1k", "test_vit3"])
def test_downloaded_weights_are_all_in_the_net(cache: Path, backbone: str) -> None:
    """With a tag or without, at another input size; the classifier is left out."""
    source = timm.get_pretrained_cfg(backbone)
    net = trained(backbone)
    safetensors.torch.save_file(net.state_dict(), repository(cache, source.hf_hub_id) / "model.safetensors")
    loaded = build_embedding_net(peer(backbone=backbone, weights="pretrained", input_size=96), 0).eval()
    state = net.state_dict()
    own = loaded.backbone.state_dict()
    assert state.keys() - own.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(own[key], state[key]) for key in own if key != "pos_embed")
    images = torch.randn(1, 3, 96, 96)
    theirs = timm.create_model(backbone, pretrained=True, img_size=96).eval()
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        assert torch.equal(loaded.features(images), expected)


def test_a_backbone_of_the_hub(cache: Path) -> None:
    """Somebody's own model of timm, by the name of its repository."""
    net = trained("test_vit")
    timm.models.save_for_hf(net, repository(cache, "somebody/own-vit"), safe_serialization=True)
    loaded = build_embedding_net(peer(backbone="hf-hub:somebody/own-vit", weights="pretrained", input_size=160), 0)
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        expected = net.forward_head(net.forward_features(images), pre_logits=True)
        assert torch.equal(loaded.eval().features(images), expected)
    smaller = build_embedding_net(peer(backbone="hf-hub:somebody/own-vit", weights="pretrained", input_size=64), 0)
    assert smaller.backbone.pos_embed.shape[1] == 17


def test_three_errors_of_downloaded_weights(cache: Path) -> None:
    """The hub, the file, and the fit are at fault; each has a sentence."""

    def build(backbone: str = "test_vit") -> None:
        build_embedding_net(peer(backbone=backbone, weights="pretrained"), 0)

    with pytest.raises(UserError, match=r"^the weights of test_vit could not be downloaded \(.*\); give a file"):
        build()
    with pytest.raises(UserError, match=r"^backbone hf-hub:a/b could not be read from the Hugging Face hub \("):
        build("hf-hub:a/b")
    file = repository(cache, timm.get_pretrained_cfg("test_vit").hf_hub_id) / "model.safetensors"
    file.write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match=r"^the downloaded weights of test_vit cannot be read \(.*\); remove them from"):
        build()
    state = trained("test_vit").state_dict()
    state["fc_norm.weight"] = state.pop("norm.weight")
    safetensors.torch.save_file(state, file)
    with pytest.raises(UserError, match=r"of test_vit do not fit: norm\.weight is missing; fc_norm\.weight is un"):
        build()


def test_a_model_without_pretrained_weights() -> None:
    with pytest.raises(UserError, match="timm has no pretrained weights of backbone test_vit4: give a file"):
        build_embedding_net(peer(backbone="test_vit4", weights="pretrained"), 0)


def test_unknown_tags_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"backbone test_vit has no weights 'in22k'; it has r160_in1k"):
        build_embedding_net(peer(backbone="test_vit.in22k"), 0)


@pytest.mark.parametrize(("backbone", "patch", "near"), [("test_vit", 16, 96), ("eva02_tiny_patch14_224", 14, 98)])
def test_sizes_are_multiples_of_the_patch(backbone: str, patch: int, near: int) -> None:
    """The message gives the nearest size."""
    message = f"patches of {patch} px: input_size must be a multiple of {patch}, such as {near}, not 100"
    with pytest.raises(UserError, match=message):
        build_embedding_net(peer(backbone=backbone, input_size=100), 0)


def test_only_nets_with_batch_norm_are_warned_of_it(image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Frozen statistics of random weights are of no use; a net without BatchNorm has none. An own backbone may have
    loaded its own, and is not built for this."""
    assert has_batch_norm("test_resnet") and not has_batch_norm("test_vit") and not has_batch_norm("test_convnext")
    peers = [{"name": name, "backbone": f"test_{name}", "batch_norm": "frozen"} for name in ("vit", "resnet")]
    peers.append({"name": "own", "backbone": "torch.nn:BatchNorm1d"})
    with caplog.at_level(logging.WARNING):
        read_images(Config.parse(tiny(image_folder, cohort={"peers": peers})))
    warnings = [record.getMessage() for record in caplog.records if "BatchNorm" in record.getMessage()]
    assert len(warnings) == 1 and warnings[0].startswith("resnet starts from random weights")
