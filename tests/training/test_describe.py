"""The lines that describe a run before it starts."""

from __future__ import annotations

from pathlib import Path

from conftest import tiny

from ray_dmml import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.training.describe import describe_cohort


def test_what_of_a_peer_learns(image_folder: Path) -> None:
    raw = tiny(image_folder)
    raw["cohort"]["peers"] = [{"freeze_blocks": "all"}, {"freeze_blocks": 2}, {"lora": {"rank": 4}}, {"view": "weak"}]
    config = Config.parse(raw)
    facts = {"steps_per_epoch": 1, "devices": ["cpu"], "threads": [1], "transport": "direct"}
    lines = list(describe_cohort(config, load_splits(config.data), facts))
    ends = [line.partition("update every step")[2] for line in lines if line.startswith("peer")]
    assert ends == [", frozen backbone", ", frozen: stem and 2 blocks", ", LoRA of rank 4", ""]
