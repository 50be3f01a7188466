"""The models: shipped configs, a base and differences, defaults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import EXPERIMENTS

from ray_dmml.config.loading import QUICKSTART
from ray_dmml.config.schema import Config, MetricLossConfig, MinerConfig
from ray_dmml.errors import UserError

SHIPPED = sorted((EXPERIMENTS / "configs").glob("*.yaml"))


def test_configs_are_shipped() -> None:
    """The next test covers more than the quickstart."""
    assert SHIPPED


@pytest.mark.parametrize("file", [QUICKSTART, *SHIPPED], ids=str)
def test_shipped_configs_are_valid(file: Path, tmp_path: Path) -> None:
    """The quickstart and every config of experiments/ load."""
    config = Config.load(file, {"data.root": tmp_path})
    assert len(config.cohort.peers) >= 1 and config.train.steps >= 1


def test_peers_are_a_base_and_differences() -> None:
    """An entry states what differs. Nested settings merge. Names and seeds follow the position."""
    config = Config.parse(
        {
            "cohort": {
                "base": {"embedding_size": 32, "optimizer": {"name": "sgd", "lr": 0.1}},
                "peers": [
                    None,
                    {"optimizer": {"lr": 0.2}, "seed": 7},
                    {"name": "c", "init_seed": 0},
                ],
            }
        }
    )
    one, two, three = config.cohort.peers
    assert (one.name, one.seed, one.init_seed, one.embedding_size) == ("peer0", 0, 0, 32)
    assert (two.name, two.seed, two.init_seed) == ("peer1", 7, 7)
    assert (two.optimizer.name, two.optimizer.lr, one.optimizer.lr) == ("sgd", 0.2, 0.1)
    assert (three.name, three.seed, three.init_seed, three.optimizer.lr) == ("c", 2, 0, 0.1)


@pytest.mark.parametrize("name", ["ensemble", "manifest.json", "Manifest.JSON", ".", "..", "a/b", ""])
def test_names_that_a_checkpoint_has_other_uses_for(name: str) -> None:
    """No peer may be named like a file beside the peers, or like a path."""
    with pytest.raises(UserError, match="name"):
        Config.parse({"cohort": {"peers": [{"name": name}, {}]}})


def test_a_list_in_an_entry_replaces_that_of_the_base() -> None:
    """Lists such as a view do not merge."""
    base = {"view": [{"name": "RandomGrayscale"}, {"name": "RandomResizedCrop"}]}
    peers = [{}, {"view": [{"name": "CenterCrop"}]}, {"view": "weak"}]
    first, second, third = Config.parse({"cohort": {"base": base, "peers": peers}}).cohort.peers
    assert [transform.name for transform in first.view] == ["RandomGrayscale", "RandomResizedCrop"]
    assert [transform.name for transform in second.view] == ["CenterCrop"]
    assert third.view == "weak"


@pytest.mark.parametrize(
    ("section", "name", "key"),
    [
        (lambda config: config, "seed", "seed"),
        (lambda config: config.train, "steps", "train.steps"),
        (lambda config: config.cohort.peers[1], "seed", "cohort.peers.0.seed"),
        (lambda config: config.cohort.peers[0].optimizer, "lr", "cohort.peers.0.optimizer.lr"),
    ],
)
def test_a_config_cannot_be_changed_but_a_copy_can(section: Callable[[Config], Any], name: str, key: str) -> None:
    """Every section is frozen. The message contains the call that makes a changed copy, and the call works."""
    config = Config()
    with pytest.raises(UserError) as refused:
        setattr(section(config), name, 7)
    assert config == Config()
    call = f"config.with_overrides({{'{key}': 7}})"
    assert str(refused.value).endswith(f"make a changed copy of the whole config, {call}")
    changed = eval(call, {"config": config})
    assert changed == Config.load(None, [f"{key}=7"]) != config == Config()


def test_a_config_without_a_file_is_the_defaults() -> None:
    """The quickstart has a name of its own, and is the file in the package."""
    assert Config() == Config.load() == Config.parse({}) == Config().with_overrides({})
    assert Config.load(overrides="train.steps=7") == Config.parse({"train": {"steps": 7}})
    assert Config.quickstart() == Config.load(QUICKSTART) != Config()
    assert Config.quickstart({"seed": 3}) == Config.load(QUICKSTART, ["seed=3"])


def test_overrides_of_a_config_are_those_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the file or the config is changed, by texts or by values: the result is the same. Defaults that depend
    on other settings follow them."""
    file = tmp_path / "c.yaml"
    file.write_text("cohort: {peers: [{seed: 4}, {init_seed: 0}]}\nloss: {metric: {args: {margin: 0.2}}}\n")
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {
        "cohort.peers.0.seed": 9,
        "cohort.peers.1.optimizer": {"name": "sgd", "lr": 0.1},
        "loss.metric.name": "ContrastiveLoss",
        "loss.metric.args": {},
        "data.root": Path("images"),
        "evaluation.recall_at": (1, 5),
    }
    texts = [
        "cohort.peers.0.seed=9",
        "cohort.peers.1.optimizer={name: sgd, lr: 0.1}",
        "loss.metric.name=ContrastiveLoss",
        "loss.metric.args={}",
        "data.root=images",
        "evaluation.recall_at=[1, 5]",
    ]
    expected = Config.load(file, texts)
    assert expected.cohort.peers[0].init_seed == 9 and expected.cohort.peers[1].init_seed == 0
    assert expected.loss.metric.miner is None and expected.data.root == tmp_path / "images"
    assert Config.load(file, changes) == expected
    assert Config.load(file).with_overrides(changes) == expected
    assert Config.load(file).with_overrides(texts) == expected
    with pytest.raises(UserError, match=r"config with overrides: train\.epochs: unknown setting; the length is 'train"):
        Config().with_overrides({"train.epochs": 3})
    with pytest.raises(UserError, match=r"every peer of this config states that itself"):
        Config().with_overrides({"cohort.base.embedding_size": 3})


def test_triplet_defaults_belong_to_the_triplet_loss_only() -> None:
    """The default loss has margin 0.2, our miner and the mean reducer, and each can be replaced. Another
    loss has the defaults of its library."""
    default = Config().loss.metric
    assert (default.name, default.args) == ("TripletMarginLoss", {"margin": 0.2})
    assert default.miner == MinerConfig(name="DistanceWeightedNegativeMiner")
    assert default.reducer == "MeanReducer"

    def metric(**given: Any) -> MetricLossConfig:
        return Config.parse({"loss": {"metric": given}}).loss.metric

    assert metric(args={"swap": True}).args == {"margin": 0.2, "swap": True}
    assert metric(args={"margin": 0.1}).args == {"margin": 0.1}
    assert metric(miner=None).miner is None and metric(miner=None).reducer == "MeanReducer"
    other = metric(name="ContrastiveLoss")
    assert (other.args, other.miner, other.reducer) == ({}, None, None)


def test_off_is_a_value_of_amp(tmp_path: Path) -> None:
    """Without quotes too, although YAML reads it as false."""
    file = tmp_path / "c.yaml"
    file.write_text("cohort: {base: {amp: off}}\n")
    config = Config.load(file, ["cohort.peers.1.amp=off"])
    assert [peer.amp for peer in config.cohort.peers] == ["off", "off"]
    with pytest.raises(UserError, match="bfloat16"):
        Config.load(file, ["cohort.peers.1.amp=on"])
