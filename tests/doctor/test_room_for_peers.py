"""Whether a config's peers have room on a machine that the test describes."""

from __future__ import annotations

from pathlib import Path

from conftest import tiny

from ray_dmml.config.schema import Config
from ray_dmml.doctor.placement import fits


def test_peers_that_fit(image_folder: Path) -> None:
    """Each gets its share, as it would in a run; peers that share a core are a note."""
    config = Config.parse(tiny(image_folder, cohort={"threads_per_peer": None}))
    check = fits(config, {"CPU": 8.0, "GPU": 1.0})
    assert check.state == "ok"
    assert check.facts["peer0"] == {"CPU": 4.0, "GPU": 0.5, "view_workers": 3, "threads": 4}
    assert check.message == "2 peers have room: each 4 CPU, 0.5 GPU, 4 torch threads, 3 view workers"
    assert fits(config, {"CPU": 1.0}).state == "note"


def test_peers_that_do_not_fit(image_folder: Path) -> None:
    """The message is that of a run, which would fail with it."""
    raw = tiny(image_folder)
    raw["cohort"]["peers"] = [{"num_gpus": 1}, {"num_gpus": 1}]
    check = fits(Config.parse(raw), {"CPU": 8.0, "GPU": 1.0})
    assert check.state == "problem" and "the nodes have no room for all peers" in check.message
    raw["data"]["root"] = str(image_folder / "missing")
    assert "missing is not an existing folder" in fits(Config.parse(raw), {"CPU": 8.0}).message
