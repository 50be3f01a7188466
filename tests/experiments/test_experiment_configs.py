"""The configs of the published settings, on tiny folders with the layout of the real archives."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import EXPERIMENTS
from tiny_archives import MAKE, SMALL

from ray_dmml.config.schema import Config
from ray_dmml.training.run import train

pytestmark = pytest.mark.ray


CONFIGS = EXPERIMENTS / "configs"


@pytest.mark.parametrize(
    ("name", "recall_at"),
    [
        ("cub200", (1, 2, 4, 8)),
        ("cars196", (1, 2, 4, 8)),
        ("sop", (1, 10, 100, 1000)),
        ("inshop", (1, 10, 20, 30)),
    ],
)
def test_a_published_setting_runs(tmp_path: Path, name: str, recall_at: tuple[int, ...]) -> None:
    """The config file leads to test results, with a small net in place of ResNet-50."""
    (tmp_path / "data").mkdir()
    MAKE[name](tmp_path / "data")
    file = CONFIGS / f"{name}.yaml"
    root = f"data.root={tmp_path / 'data'}"
    real = Config.load(file, [root])
    assert {peer.backbone for peer in real.cohort.peers} == {"resnet50"}
    assert {peer.embedding_size for peer in real.cohort.peers} == {512}
    assert len({(str(p.view), p.update_interval) for p in real.cohort.peers}) == 2
    results = train(Config.load(file, [root, *SMALL]), tmp_path / "run", local=True)
    assert results["num_classes"] == 2
    assert set(results["untrained_ensemble"]) == {*(f"recall@{k}" for k in recall_at), "map@r", "r_precision"}
