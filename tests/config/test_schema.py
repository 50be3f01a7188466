"""The models: shipped configs, a base and differences, defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import EXPERIMENTS
from pydantic import ValidationError

from ray_dmml.config.schema import Config, MetricLossConfig, MinerConfig
from ray_dmml.errors import UserError

SHIPPED = sorted((EXPERIMENTS / "configs").glob("*.yaml"))


def test_configs_are_shipped() -> None:
    """The next test covers more than the quickstart."""
    assert SHIPPED


@pytest.mark.parametrize("file", [None, *SHIPPED], ids=str)
def test_shipped_configs_are_valid(file: Path | None, tmp_path: Path) -> None:
    """The quickstart and every config of experiments/ load."""
    overrides = [] if file is None else [f"data.root={tmp_path}"]
    config = Config.load(file, overrides)
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


def test_a_list_in_an_entry_replaces_that_of_the_base() -> None:
    """Lists such as a view do not merge."""
    base = {"view": [{"name": "RandomGrayscale"}, {"name": "RandomResizedCrop"}]}
    peers = [{}, {"view": [{"name": "CenterCrop"}]}, {"view": "weak"}]
    first, second, third = Config.parse({"cohort": {"base": base, "peers": peers}}).cohort.peers
    assert [transform.name for transform in first.view] == ["RandomGrayscale", "RandomResizedCrop"]
    assert [transform.name for transform in second.view] == ["CenterCrop"]
    assert third.view == "weak"


def test_a_config_cannot_be_changed() -> None:
    """Every section is frozen."""
    config = Config()
    for section, name in ((config, "seed"), (config.train, "steps"), (config.cohort, "peers")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)


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
