"""Low-rank adapters: what they compute, what learns, and what a checkpoint and a user of it get."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import as_in_training, assert_same, state_of, tiny
from torch import Tensor, nn

from ray_dmml import Config, UserError, evaluate, load_cohort, train
from ray_dmml.checkpoint.peer_state import decode_peer, encode_peer
from ray_dmml.checkpoint.store import CheckpointStore
from ray_dmml.cohort.local import LocalCohort
from ray_dmml.config.schema import PeerConfig
from ray_dmml.data.datasets import load_splits
from ray_dmml.models.embedding_net import EmbeddingNet, build_embedding_net
from ray_dmml.models.lora import adapter_state, add_adapters, load_adapter_state
from ray_dmml.models.pretrained import load_net_weights
from ray_dmml.training.quick_check import check_quickly

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed: pip install 'ray-dmml[lora]'"
)

LORA: dict[str, Any] = {"rank": 2, "alpha": 6}


def peer(**settings: Any) -> PeerConfig:
    small = {"backbone": "test_vit", "embedding_size": 8, "input_size": 32, "lora": LORA}
    return PeerConfig.model_validate({"name": "peer0", "seed": 0, "init_seed": 0, **small, **settings})


def adapted(config: PeerConfig | None = None) -> EmbeddingNet:
    config = config or peer()
    net = build_embedding_net(config, 0)
    add_adapters(net, config, 0)
    return net


def plain(net: EmbeddingNet, config: PeerConfig) -> EmbeddingNet:
    """The same net without adapters, from the state of the adapted one."""
    other = build_embedding_net(config.model_copy(update={"lora": None}), 1)
    load_net_weights(other, net.state_dict(), "here")
    return other


def disturb(net: EmbeddingNet) -> None:
    """Adapters as after some training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 32, 32), generator=generator).to(torch.uint8)


@needs_peft
def test_a_layer_adds_its_low_rank_product(images: Tensor) -> None:
    """W x + b + alpha/rank * B A x, from the definition; nothing at the start."""
    net, before = adapted(), build_embedding_net(peer(lora=None), 0)
    assert torch.equal(net.eval()(images), before.eval()(images))
    disturb(net)
    layer = net.backbone.get_submodule("blocks.3.mlp.fc1")
    state = adapter_state(net)
    w, a, b = (state[f"blocks.3.mlp.fc1.{part}"] for part in ("weight", "lora_A", "lora_B"))
    assert a.shape == (2, w.shape[1]) and b.shape == (w.shape[0], 2)
    x = torch.randn(5, w.shape[1])
    bias = before.backbone.get_submodule("blocks.3.mlp.fc1").bias
    torch.testing.assert_close(layer(x), x @ w.T + bias + 3 * x @ a.T @ b.T, rtol=1e-5, atol=1e-5)


@needs_peft
def test_only_adapters_and_the_head_learn() -> None:
    """In attention and in the MLP of each of the 6 blocks."""
    net = adapted()
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    parts = [f"backbone.blocks.{i}.{layer}.lora_{x}" for i in range(6) for layer in layers for x in "AB"]
    assert trained == {f"{part}.default.weight" for part in parts} | {"head.weight", "head.bias"}


CONVOLUTIONS = {"backbone": "test_resnet", "lora": {**LORA, "targets": ["conv2"]}}


@needs_peft
@pytest.mark.parametrize(
    "settings", [{}, CONVOLUTIONS, {"backbone": "test_convnext"}], ids=["vit", "resnet", "convnext"]
)
def test_its_state_is_that_of_a_plain_net_with_merged_weights(images: Tensor, settings: dict[str, Any]) -> None:
    """A net without adapters loads it and computes the same. A net with adapters loads it, too, and with the
    adapters' state it is the same to the bit. A copy of a net is independent of it."""
    config = peer(**settings)
    net = adapted(config)
    disturb(net)
    expected = net.eval()(images)
    assert not torch.allclose(expected, build_embedding_net(config, 0).eval()(images), atol=1e-3)
    torch.testing.assert_close(plain(net, config).eval()(images), expected, rtol=1e-4, atol=1e-5)
    other, copied = adapted(config.model_copy(update={"init_seed": 4})), copy.deepcopy(net)
    load_net_weights(other, net.state_dict(), "here")
    torch.testing.assert_close(other.eval()(images), expected, rtol=1e-4, atol=1e-5)
    load_adapter_state(other, adapter_state(net))
    assert torch.equal(other.eval()(images), expected)
    assert_same(other.state_dict(), net.state_dict())
    disturb(net)
    assert torch.equal(copied.eval()(images), expected)
    assert_same(copied.state_dict(), other.state_dict())


@needs_peft
@pytest.mark.parametrize("lora", [{"rank": 3}, {**LORA, "alpha": 2}])
def test_adapters_of_another_rank_or_alpha_are_loaded_as_weights(images: Tensor, lora: dict[str, Any]) -> None:
    net, other = adapted(), adapted(peer(lora=lora))
    disturb(net)
    load_net_weights(other, net.state_dict(), "here")
    load_adapter_state(other, adapter_state(net))
    torch.testing.assert_close(other.eval()(images), net.eval()(images), rtol=1e-4, atol=1e-5)


def settings(root: Path) -> Config:
    """A peer with adapters and averaged weights, and a plain one."""
    raw = tiny(root, train={"steps": 6, "evaluate_every": 2})
    view = {"backbone": "test_vit", "lora": LORA, "ema": {"decay": 0.5}, "update_interval": 2}
    raw["cohort"]["peers"] = [{**view, "optimizer": {"lr": 0.01, "layer_decay": 0.9}}, {}]
    return Config.parse(raw)


@pytest.fixture(scope="module")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "run"
    train(settings(image_folder), out, local=True)
    return out


@needs_peft
def test_interrupted_equals_uninterrupted(image_folder: Path) -> None:
    """In the middle of an interval, with gradients and averaged weights, to the bit."""
    config = settings(image_folder)
    splits = load_splits(config.data)

    def outcome(cohort: LocalCohort) -> Any:
        return [{name: decode_peer(files) for name, files in state_of(cohort).items()}, cohort.embeddings("test")]

    with closing(LocalCohort(config, splits)) as cohort:
        backbone = {key: p.clone() for key, p in cohort.peers[0].net.named_parameters() if not p.requires_grad}
        cohort.run(0, 3, lambda finished: None)
        stored = state_of(cohort)
        cohort.run(3, 6, lambda finished: None)
        expected = outcome(cohort)
        after = dict(cohort.peers[0].net.named_parameters())
        assert backbone and all(torch.equal(after[key], tensor) for key, tensor in backbone.items())
    with closing(LocalCohort(config, splits, initial_weights=False)) as cohort:
        cohort.load(stored)
        cohort.run(3, 6, lambda finished: None)
        assert_same(outcome(cohort), expected)


@needs_peft
@pytest.mark.parametrize("weights", ["best", "last", "ema"])
def test_the_peer_is_used_without_peft(run: Path, weights: str) -> None:
    """`load_cohort` gives a plain net, whose embeddings are those of the run up to rounding."""
    config = Config.load(run / "config.yaml")
    splits = load_splits(config.data)
    with closing(LocalCohort(config, splits)) as cohort:
        cohort.load(CheckpointStore(run / "checkpoints").load("best" if weights == "best" else "last").peers)
        expected = cohort.embeddings("test", ema=weights == "ema")["peer0"]
    with without_peft():
        loaded = load_cohort(run, weights).peers["peer0"]
    assert not any("lora" in name for name, _ in loaded.net.named_parameters())
    images = torch.stack([splits.test.source.read(i) for i in range(len(splits.test))])
    assert np.allclose(loaded.embed(images).numpy(), expected, atol=1e-4)


@needs_peft
def test_another_run_starts_where_this_one_ended(run: Path, image_folder: Path, tmp_path: Path) -> None:
    """With the same adapters, to the bit; `evaluate` gives what the run reported."""
    results = evaluate(run)
    assert results["peers"] == json.loads((run / "results.json").read_text())["peers"]
    raw = settings(image_folder).model_dump(mode="json")
    raw["train"] |= {"init_from": str(run), "steps": 1}
    again = train(Config.parse(raw), tmp_path / "again", local=True)
    assert again["untrained"] == as_in_training(results["peers"])


class without_peft:
    """peft cannot be imported inside the block."""

    def __enter__(self) -> None:
        self._found = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "peft"}
        for name in self._found:
            del sys.modules[name]
        sys.modules["peft"] = None  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        del sys.modules["peft"]
        sys.modules.update(self._found)


def test_without_peft_the_command_is_named(image_folder: Path) -> None:
    """Before anything takes time, and by a peer on a node that lacks it."""
    message = r"peer0: lora needs the extra: pip install 'ray-dmml\[lora\]'"
    with without_peft(), pytest.raises(UserError, match=message):
        check_quickly(settings(image_folder), on_this_machine=True)
    with without_peft(), pytest.raises(UserError, match=message):
        adapted()


@needs_peft
def test_layers_that_are_not_there_are_named() -> None:
    """With the names that there are."""
    with pytest.raises(
        UserError, match=r"peer0: lora.targets query do not fit test_vit: no layer.* named fc1, fc2, proj, qkv$"
    ):
        adapted(peer(lora={**LORA, "targets": ["query"]}))
    with pytest.raises(UserError, match=r"peer0: lora.targets norm1 do not fit test_vit: blocks.0.norm1 is a LayerNo"):
        adapted(peer(lora={**LORA, "targets": ["norm1"]}))


@needs_peft
def test_layers_that_are_never_called_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters beside them would learn nothing."""
    net = build_embedding_net(peer(), 0)
    mlp: Any = net.backbone.get_submodule("blocks.0.mlp")

    def only_its_weight(x: Tensor) -> Tensor:
        return mlp.fc2(mlp.act(nn.functional.linear(x, mlp.fc1.weight, mlp.fc1.bias)))

    monkeypatch.setattr(mlp, "forward", only_its_weight)
    with pytest.raises(UserError, match=r"blocks.0.mlp.fc1 is never called as a layer"):
        add_adapters(net, peer(), 0)


@pytest.mark.parametrize("more", [{"freeze_blocks": 2}, {"frozen": True, "weights": "w.safetensors"}])
def test_settings_that_do_not_go_together(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lora"):
        peer(**more)


@needs_peft
def test_a_peers_files_hold_no_code(image_folder: Path) -> None:
    """The adapters are in training.pt, which is read with tensors only; weights.safetensors has plain names."""
    config = settings(image_folder)
    with closing(LocalCohort(config, load_splits(config.data))) as cohort:
        files = encode_peer(cohort.peers[0].state_dict())
    state = decode_peer(files)
    assert not any("lora" in key or "base_layer" in key for key in (*state["net"], *state["ema"]))
    assert state["adapters"].keys() == state["ema_adapters"].keys() and len(state["adapters"]) == 4 * 24
