"""A backbone of one's own: built by name, scaled by its own constants, and refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from ray_dmml.config.code import read_code, use_code
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.errors import UserError
from ray_dmml.models.embedding_net import build_embedding_net

OWN = """
import torch
from torch import nn

class Mean(nn.Module):
    def __init__(self, width=4, input_size=None):
        super().__init__()
        self.layer = nn.Conv2d(3, width, 3, stride=2)
        if input_size is None:
            self.pretrained_cfg = {"input_size": (3, 20, 20), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}

    def forward(self, images):
        return self.layer(images).relu().mean(dim=(2, 3))

def sized(input_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * input_size**2, 7))

def maps():
    return nn.Conv2d(3, 4, 3)

def text():
    return "resnet"

class Counting(Mean):
    def get_extra_state(self): return {"count": 1}
    def set_extra_state(self, state): pass

class Broken(nn.Module):
    def forward(self, images):
        return self.layer(images)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path) -> Iterator[None]:
    """The module own_nets."""
    (tmp_path / "own_nets.py").write_text(OWN)
    use_code(read_code([tmp_path / "own_nets.py"]))
    yield
    use_code({})


def settings(**given: Any) -> PeerConfig:
    raw = {"backbone": "own_nets:Mean", "embedding_size": 5, **given}
    other = {"backbone": "test_resnet"}
    return Config.parse({"cohort": {"peers": [{"name": "peer0", **raw}, other]}}).cohort.peers[0]


def test_the_net_is_that_of_the_class() -> None:
    """Its args, its scaling of the images, its size, and initial weights that follow the seed."""
    net = build_embedding_net(settings(backbone_args={"width": 6}), run_seed=3)
    again = build_embedding_net(settings(backbone_args={"width": 6}), run_seed=3)
    assert net.input_size == 20
    images = torch.randint(0, 256, (4, 3, 20, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    features = net.backbone.layer((images / 255 - mean) / std).relu().mean(dim=(2, 3))
    assert features.shape == (4, 6)
    assert torch.allclose(net(images), F.normalize(net.head(features)), atol=1e-5)
    assert torch.equal(net.backbone.layer.weight, again.backbone.layer.weight)
    other = build_embedding_net(settings(init_seed=9, backbone_args={"width": 6}), run_seed=3)
    assert not torch.equal(net.backbone.layer.weight, other.backbone.layer.weight)


def test_a_function_gets_the_size_that_it_requires() -> None:
    net = build_embedding_net(settings(backbone="own_nets:sized", input_size=16), run_seed=0)
    assert net(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 5)


def test_a_frozen_one_has_the_weights_that_it_was_built_with() -> None:
    """It teaches with its features: nothing would train a head."""
    net = build_embedding_net(settings(frozen=True), run_seed=1)
    images = torch.randint(0, 256, (2, 3, 20, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(net.forward_unnormalized(images), net.backbone_features(images))
    assert net.embedding_size == 4


def test_weights_from_a_file(tmp_path: Path) -> None:
    """The state dict of the module, with all of its names."""
    source = build_embedding_net(settings(), run_seed=1).backbone.state_dict()
    safetensors.torch.save_file(source, tmp_path / "weights.safetensors")
    net = build_embedding_net(settings(weights=str(tmp_path / "weights.safetensors")), run_seed=2)
    assert torch.equal(net.backbone.layer.weight, source["layer.weight"])
    safetensors.torch.save_file({"layer.weight": source["layer.weight"]}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"layer.bias"):
        build_embedding_net(settings(weights=str(tmp_path / "part.safetensors")), run_seed=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backbone": "own_nets:Median"}, r"backbone of peer0 'own_nets:Median': module own_nets .* has no Median"),
        (
            {"backbone_args": {"depth": 2}},
            r"own_nets:Mean does not fit its args: .*'depth'; it takes width, input_size",
        ),
        ({"backbone": "own_nets:sized"}, r"own_nets:sized does not fit its args: missing .*input_size"),
        ({"backbone": "own_nets:maps"}, r"own_nets:maps must give features \(B, F\), and gives \(2, 4, 222, 222\)"),
        ({"backbone": "own_nets:text"}, r"own_nets:text must give a torch.nn.Module, and gives a str"),
        (
            {"backbone": "own_nets:Broken"},
            r"own_nets:Broken fails on 224 x 224 px at .*own_nets.py, line 30: Attribute",
        ),
        ({"backbone": "own_nets:Counting"}, r"own_nets:Counting must have a state_dict of tensors only"),
        ({"pooling": "avg"}, r"own_nets:Mean pools itself, so pooling must be native, not avg"),
        ({"weights": "pretrained"}, r"weights: pretrained are those of timm's networks"),
        ({"backbone": "test_resnet", "backbone_args": {"x": 1}}, r"backbone_args are those of a backbone of your own"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_embedding_net(settings(**given), run_seed=0)
