"""Poolings: what they compute, and that no trained layer is lost by them."""

from __future__ import annotations

import pytest
import torch
from test_embedding_net import peer
from torch import Tensor
from torch.nn import functional as F

from ray_dmml.errors import UserError
from ray_dmml.models.embedding_net import build_embedding_net

POOLINGS = ("avg", "max", "avgmax", "gem")


def naive(rows: Tensor, pooling: str) -> Tensor:
    """(B, N, C) -> (B, C)."""
    if pooling == "gem":
        positive = torch.where(rows > 0, rows, 0)
        return ((positive**3).sum(1) / rows.shape[1]) ** (1 / 3)
    avg, largest = rows.sum(1) / rows.shape[1], rows.sort(dim=1).values[:, -1]
    return {"avg": avg, "max": largest, "avgmax": (avg + largest) / 2}[pooling]


@pytest.fixture
def images() -> Tensor:
    """(2, 3, 96, 96), standardized."""
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_of_a_feature_map(images: Tensor, pooling: str) -> None:
    net = build_embedding_net(peer(pooling=pooling, input_size=96), 0).eval()
    feature_map = net.backbone.forward_features(images)
    assert feature_map.shape[2:] == (3, 3)
    expected = naive(feature_map.flatten(2).transpose(1, 2), pooling)
    torch.testing.assert_close(net.features(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_layers_after_the_pooling_stay(images: Tensor, pooling: str) -> None:
    """ConvNeXt has its last norm there."""
    net = build_embedding_net(peer(backbone="test_convnext", pooling=pooling, input_size=96), 0).eval()
    norm = net.backbone.head.norm
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    pooled = naive(net.backbone.forward_features(images).flatten(2).transpose(1, 2), pooling)
    expected = F.layer_norm(pooled, pooled.shape[1:], norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(net.features(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "pooling", "size"),
    [
        *(("test_vit", pooling, 96) for pooling in ("token", *POOLINGS)),
        *(("test_vit4", pooling, 96) for pooling in POOLINGS),
        ("eva02_tiny_patch14_224", "token", 56),
    ],
)
def test_of_tokens(images: Tensor, backbone: str, pooling: str, size: int) -> None:
    """The last norm stays: before the pooling, or after it where the net was trained so. Class token and registers
    are not averaged."""
    images = images[..., :size, :size]
    net = build_embedding_net(peer(backbone=backbone, pooling=pooling, input_size=size), 0).eval()
    norms = [p for module in (net.backbone.norm, net.backbone.fc_norm) for p in module.parameters()]
    assert norms
    for parameter in norms:
        torch.nn.init.normal_(parameter)
    tokens = net.backbone.forward_features(images)
    num_prefix = tokens.shape[1] - net.backbone.patch_embed.num_patches
    assert num_prefix == 1
    pooled = tokens[:, 0] if pooling == "token" else naive(tokens[:, num_prefix:], pooling)
    torch.testing.assert_close(net.features(images), net.backbone.fc_norm(pooled), atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_every_pooling(images: Tensor) -> None:
    for pooling in POOLINGS:
        for backbone in ("test_resnet", "test_vit"):
            net = build_embedding_net(peer(backbone=backbone, pooling=pooling, input_size=96), 0)
            net.features(images).sum().backward()
            gradients = [p.grad for p in net.backbone.parameters() if p.grad is not None]
            assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("backbone", "pooling", "why"),
    [
        ("test_resnet", "token", "it has a feature map and no class token"),
        ("test_vit3", "avg", "its trained layer attn_pool.* would be lost; use native"),
        ("test_vit4", "token", "it has no class token"),
    ],
)
def test_poolings_that_would_lose_something(backbone: str, pooling: str, why: str) -> None:
    with pytest.raises(UserError, match=rf"backbone {backbone} cannot have pooling: {pooling}: {why}"):
        build_embedding_net(peer(backbone=backbone, pooling=pooling, input_size=96), 0)
