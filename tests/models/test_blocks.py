"""Blocks of a backbone that do not learn, in nets of several families."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import UserError
from ray_dmml.models.blocks import freeze_blocks, layer_numbers
from ray_dmml.models.embedding_net import build_embedding_net

STEM_AND_TWO_BLOCKS = {
    "test_resnet": ("conv1", "bn1", "layer1", "layer2"),
    "test_efficientnet": ("conv_stem", "bn1", "blocks.0", "blocks.1"),
    "test_convnext": ("stem", "stages.0", "stages.1"),
    "test_vit": ("cls_token", "pos_embed", "patch_embed", "blocks.0", "blocks.1"),
}


def peer(**settings: Any) -> PeerConfig:
    small = {"backbone": "test_resnet", "embedding_size": 8, "input_size": 32, "batch_norm": "train"}
    return PeerConfig.model_validate({"name": "peer0", **small, **settings})


@pytest.mark.parametrize("backbone", STEM_AND_TWO_BLOCKS)
def test_the_stem_and_the_first_blocks_do_not_learn(backbone: str) -> None:
    net = build_embedding_net(peer(backbone=backbone, freeze_blocks=2), 0)
    inside = tuple(f"{name}." for name in STEM_AND_TWO_BLOCKS[backbone])
    frozen = {name for name, _ in net.backbone.named_parameters() if f"{name}.".startswith(inside)}
    assert {name for name, p in net.backbone.named_parameters() if not p.requires_grad} == frozen
    assert 0 < len(frozen) < len(list(net.backbone.parameters()))
    assert all(p.requires_grad for p in net.head.parameters())


def test_zero_blocks_are_the_stem_and_all_is_the_backbone() -> None:
    stem = build_embedding_net(peer(freeze_blocks=0), 0)
    frozen = {name.split(".")[0] for name, p in stem.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1"}
    everything = build_embedding_net(peer(freeze_blocks="all"), 0)
    assert not any(p.requires_grad for p in everything.backbone.parameters())
    assert all(p.requires_grad for p in everything.head.parameters())


@pytest.mark.parametrize(("blocks", "modules"), [(1, ("conv1", "bn1", "layer1")), ("all", ("",))])
def test_batch_norm_and_dropout_of_frozen_blocks_stay_in_evaluation_mode(
    blocks: int | str, modules: tuple[str, ...]
) -> None:
    """Also with `batch_norm: train`, and after an evaluation. Those of the other blocks train."""
    net = build_embedding_net(peer(freeze_blocks=blocks), 0)
    net.backbone.layer1[0].add_module("dropout", nn.Dropout(0.5))
    net.eval()
    net.train()
    for name, module in net.backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            assert module.training != name.startswith(modules), name
    assert net.head.training


@pytest.mark.parametrize(("backbone", "count"), [("test_resnet", 4), ("test_vit", 6), ("test_efficientnet", 5)])
def test_more_blocks_than_there_are(backbone: str, count: int) -> None:
    build_embedding_net(peer(backbone=backbone, freeze_blocks=count), 0)
    message = f"peer0: freeze_blocks is {count + 1}, and {backbone} has {count} blocks"
    with pytest.raises(UserError, match=message):
        build_embedding_net(peer(backbone=backbone, freeze_blocks=count + 1), 0)


def test_a_backbone_that_is_not_from_timm() -> None:
    """It has no group_matcher, so only the whole of it can be frozen."""
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    with pytest.raises(UserError, match=r"peer0: freeze_blocks 1 needs a backbone .* Sequential has none"):
        freeze_blocks(backbone, peer(freeze_blocks=1))
    freeze_blocks(backbone, peer(freeze_blocks="all"))
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_vit2", "test_convnext", "vit_tiny_patch16_224"])
def test_layers_are_those_of_timm(name: str) -> None:
    """Of the same net with timm's own classifier, which is in the layer of our head."""
    with torch.device("meta"):
        backbone, whole = timm.create_model(name, num_classes=0), timm.create_model(name, num_classes=5)
    expected = timm.models.group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
    layers, head = layer_numbers(backbone, "this", coarse=False)
    assert head == max(expected.values())
    assert layers and all(layers[key] == expected[key] for key in layers)
