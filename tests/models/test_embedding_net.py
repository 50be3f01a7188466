"""EmbeddingNet: what it computes, its random initial weights, and which backbones it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import UserError
from ray_dmml.models.embedding_net import (
    EmbeddingNet,
    autocast,
    build_embedding_net,
    compiled,
    input_of,
    standardize,
)


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


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_vit"])
def test_it_is_backbone_head_and_normalisation(images: Tensor, backbone: str) -> None:
    """Bytes scaled by the backbone's mean and deviation, a linear head, rows of length 1."""
    net = EmbeddingNet(peer(backbone=backbone)).eval()
    embeddings = net(images)
    assert embeddings.shape == (4, 8) and embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(4), atol=1e-6)
    config = timm.get_pretrained_cfg(backbone)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    features = net.backbone((images / 255 - mean) / std)
    raw = features @ net.head.weight.T + net.head.bias
    assert torch.allclose(net.forward_unnormalized(images), raw, atol=1e-5)
    expected = raw / raw.norm(dim=1, keepdim=True)
    assert torch.allclose(embeddings, expected, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_standardize_keeps_images_and_layout(images: Tensor, layout: torch.memory_format) -> None:
    """The bytes stay what they were; the result is float32 with their memory layout."""
    images = images.contiguous(memory_format=layout)
    before = images.clone()
    mean, std = torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1), torch.tensor(5.0).view(1, 1, 1, 1)
    scaled = standardize(images, mean, std)
    assert torch.equal(images, before)
    assert torch.equal(scaled, (before.float() - mean) / std)
    assert scaled.is_contiguous(memory_format=layout)


def test_avgmax_is_the_mean_of_average_and_maximum(images: Tensor) -> None:
    """The two poolings share a head and see the same feature map."""
    images = images.repeat(1, 1, 3, 3)  # large enough for a feature map of several places
    avg, avgmax = (build_embedding_net(peer(pooling=pooling, input_size=96), 0).eval() for pooling in ("avg", "avgmax"))
    scaled = (images - avg.mean) / avg.std
    feature_map = avg.backbone.forward_features(scaled)  # (B, F, h, w)
    assert feature_map.shape[2:] != (1, 1)
    pooled = (feature_map.mean(dim=(2, 3)) + feature_map.amax(dim=(2, 3))) / 2
    assert torch.allclose(avgmax.backbone(scaled), pooled, atol=1e-5)
    assert not torch.allclose(pooled, avg.backbone(scaled), atol=1e-3)


def test_batch_norm_is_frozen_or_trains(images: Tensor) -> None:
    """`frozen`: training mode uses and keeps the loaded statistics. `train`: it updates them."""
    frozen = build_embedding_net(peer(batch_norm="frozen"), 0)
    before = copy.deepcopy(frozen.state_dict())
    assert torch.equal(frozen.train()(images), frozen.eval()(images))
    assert same(frozen.state_dict(), before)
    training = build_embedding_net(peer(batch_norm="train"), 0)
    assert not torch.equal(training.train()(images), training.eval()(images))
    changed = {key for key in before if not torch.equal(training.state_dict()[key], before[key])}
    assert changed and all("running_" in key or "num_batches" in key for key in changed)
    assert all(parameter.requires_grad for parameter in frozen.parameters())


def test_initial_weights_follow_the_init_seed() -> None:
    """The same run seed and init_seed give the same net, whatever the peer's seed. With another of either
    no number of the head or the first layer is the same."""
    state = build_embedding_net(peer(init_seed=1, seed=5), 0).state_dict()
    torch.rand(7)
    assert same(build_embedding_net(peer(init_seed=1, seed=6), 0).state_dict(), state)
    for other in (
        build_embedding_net(peer(init_seed=2), 0),
        build_embedding_net(peer(init_seed=1), 1),
    ):
        for key in ("head.weight", "backbone.conv1.0.weight"):
            assert not torch.isclose(other.state_dict()[key], state[key]).all()


def test_the_head_does_not_depend_on_the_backbone() -> None:
    """Two backbones with features of the same size get the same head."""
    heads = [
        build_embedding_net(peer(backbone=backbone), 0).head for backbone in ("test_resnet", "resnet18", "resnet34")
    ]
    assert heads[0].weight.shape != heads[1].weight.shape
    assert torch.equal(heads[1].weight, heads[2].weight)


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast_of_a_setting(amp: str, dtype: torch.dtype) -> None:
    """The backbone computes in the dtype, and the embedding is float32."""
    net = build_embedding_net(peer(), 0).eval()
    dtypes = []
    net.head.register_forward_hook(lambda head, inputs, output: dtypes.append(output.dtype))
    with autocast(amp, torch.device("cpu")):
        embeddings = net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert dtypes == [dtype] and embeddings.dtype == torch.float32


def test_compiling_for_a_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    net = build_embedding_net(peer(), 0)
    message = "peer7: compile: true needs a C.. compiler on a CPU, and no-such-compiler is not"
    with pytest.raises(UserError, match=message):
        compiled(net, "peer7", torch.device("cpu"))


# --- refused --------------------------------------------------------------------------------


def test_unknown_backbones_are_refused_with_the_nearest_name() -> None:
    """A typing mistake is answered with timm's name."""
    with pytest.raises(UserError, match=r"unknown backbone 'resnet5': .*did you mean .*resnet50"):
        EmbeddingNet(peer(backbone="resnet5"))
    with pytest.raises(UserError, match=r"unknown backbone '@@@': .*timm.list_models"):
        EmbeddingNet(peer(backbone="@@@"))


def require(backbone: str) -> None:
    """Skips the test if this timm is older than one of its small nets for tests."""
    if backbone.startswith("test_") and not timm.is_model(backbone):
        pytest.skip(f"timm {timm.__version__} has no {backbone}")


def test_sizes_that_the_backbone_does_not_support() -> None:
    """Too small for its windows."""
    require("test_maxvit")
    with pytest.raises(UserError, match=r"backbone test_maxvit (cannot be built|does not take).* 40"):
        EmbeddingNet(peer(backbone="test_maxvit", input_size=40))


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "tf_efficientnet_lite0", "resnet10t.c3_in1k"])
def test_the_size_of_a_net_is_known_before_it_is_built(backbone: str) -> None:
    for size in (None, 64):
        config = peer(backbone=backbone, input_size=size)
        net = EmbeddingNet(config)
        assert input_of(config) == (net.input_size, net.eval_crop)
    with pytest.raises(UserError, match=r"unknown backbone 'resnt': .* did you mean"):
        input_of(peer(backbone="resnt"))
