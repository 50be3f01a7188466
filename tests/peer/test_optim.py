"""Which parameters learn, at which rate, and which shrink."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from test_peer import PROXIES, build, settings, train

from ray_dmml.errors import UserError
from ray_dmml.peer.optim import build_optimizer, set_learning_rates


def rates(**given: Any) -> dict[str, float]:
    """The base rate of every parameter that the optimizer has, by name."""
    peer = build(settings(**given), metric=PROXIES)
    names = {id(p): f"net.{name}" for name, p in peer.net.named_parameters()}
    names |= {id(p): f"metric.{name}" for name, p in peer.metric.named_parameters()}
    return {names[id(p)]: group["base_lr"] for group in peer.optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_only_weights_decay(backbone: str, name: str) -> None:
    """An update without a gradient shrinks what decays: matrices and filters, and no bias, no normalisation, no
    position embedding and no class token."""
    peer = build(settings(backbone=backbone, optimizer={"name": name, "lr": 0.1, "weight_decay": 0.5}))
    with torch.no_grad():
        for parameter in peer.net.parameters():
            parameter.fill_(1.0)
    for parameter in peer.net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rates(peer.optimizer, peer.config.schedule, 0)
    peer.optimizer.step()
    shrunk = {key for key, p in peer.net.named_parameters() if (p < 1).all()}
    unchanged = {key for key, p in peer.net.named_parameters() if (p == 1).all()}
    matrices = {key for key, p in peer.net.named_parameters() if p.ndim > 1}
    assert shrunk == matrices - {"backbone.cls_token", "backbone.pos_embed"}
    assert unchanged == {key for key, _ in peer.net.named_parameters()} - shrunk and len(unchanged) > 5


def test_rates_fall_from_the_head_to_the_stem() -> None:
    """By the factor at each of the 6 blocks; head and proxies keep theirs."""
    found = rates(backbone="test_vit", optimizer={"lr": 0.1, "layer_decay": 0.5, "head_lr": 0.3, "loss_lr": 7})
    for name, rate in found.items():
        if name.startswith("net.backbone.blocks."):
            expected = 0.1 * 0.5 ** (6 - int(name.split(".")[3]))
        elif name.startswith("net.backbone.norm"):  # of the last block
            expected = 0.1 * 0.5
        elif name.startswith("net.backbone.fc_norm"):  # after the pooling
            expected = 0.1
        elif name.startswith("net.backbone."):  # patch and position embeddings, class token
            expected = 0.1 * 0.5**7
        else:
            expected = 0.3 if name.startswith("net.head") else 7
        assert rate == pytest.approx(expected), name
    assert found.keys() == rates(backbone="test_vit").keys()
    assert set(rates(backbone="test_vit", optimizer={"lr": 0.1}).values()) == {0.1, 10.0}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit2"])
def test_rates_are_those_of_timm(backbone: str) -> None:
    """As timm gives them to the same net with a classifier."""
    whole = timm.create_model(backbone, num_classes=5)
    names = {id(p): name for name, p in whole.named_parameters()}
    scales = {
        names[id(p)]: group["lr_scale"]
        for group in timm.optim.param_groups_layer_decay(whole, layer_decay=0.7)
        for p in group["params"]
    }
    found = rates(backbone=backbone, optimizer={"lr": 0.1, "layer_decay": 0.7})
    for name, rate in found.items():
        if name.startswith("net.backbone."):
            assert rate == pytest.approx(0.1 * scales[name.removeprefix("net.backbone.")]), name
    assert min(found.values()) < 0.04


def test_the_schedule_multiplies_all_rates() -> None:
    """A rate is a function of the step, whatever happened before."""
    peer = build(settings(optimizer={"lr": 0.1, "layer_decay": 0.5}, schedule={"name": "cosine", "steps": 10}))
    for step, factor in ((5, 0.5), (0, 1.0), (10, 0.0)):
        set_learning_rates(peer.optimizer, peer.config.schedule, step)
        for group in peer.optimizer.param_groups:
            assert group["lr"] == pytest.approx(factor * group["base_lr"], abs=1e-12)


def test_layer_decay_needs_the_blocks_of_timm() -> None:
    peer = build()
    peer.net.backbone = torch.nn.Sequential(torch.nn.Linear(3, 3))
    config = settings(optimizer={"layer_decay": 0.5})
    with pytest.raises(UserError, match=r"^peer0: optimizer.layer_decay needs a backbone whose .* Sequential has none"):
        build_optimizer(config, peer.net, peer.metric)


@pytest.mark.parametrize("blocks", [2, "all"])
def test_frozen_blocks_stay_the_same_and_the_rest_learns(blocks: int | str) -> None:
    """To the bit, BatchNorm's statistics and averaged weights included; the optimizer does not have them."""
    peer = build(settings(freeze_blocks=blocks, ema={"decay": 0.5}, optimizer={"lr": 0.01, "weight_decay": 0.1}))
    before = {key: tensor.clone() for key, tensor in peer.net.state_dict().items()}
    train(peer, 0, 4, 8)
    inside = ("conv1", "bn1", "layer1", "layer2") if blocks == 2 else ("",)
    frozen = tuple(f"backbone.{name}" for name in inside)
    assert peer.ema is not None
    for net in (peer.net, peer.ema.net):
        for key, tensor in net.state_dict().items():
            assert torch.equal(tensor, before[key]) == key.startswith(frozen), key
    trained = {id(p) for group in peer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for key, p in peer.net.named_parameters() if not key.startswith(frozen)}
