"""Errors on a private Ray: a cluster that is too small, and a peer that learns nonsense."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import yaml
from conftest import tiny
from typer.testing import CliRunner

from ray_dmml import Config
from ray_dmml.cli.main import app
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import NonFiniteLossError


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "num_gpus=1",
            "no room for all peers. Peers ask for: peer0, peer1: a share of the CPUs, 1 GPU",
        ),
        ("num_cpus=3", "no room for all peers. Peers ask for: peer0, peer1: 3 CPU"),
        ("weights=/no/file.pth", "weights file /no/file.pth does not exist"),
    ],
)
def test_what_a_cluster_does_not_have(
    ray_start_4_cpus: None,
    image_folder: Path,
    tmp_path: Path,
    setting: str,
    message: str,
) -> None:
    """A cohort that asks for more GPUs or CPUs than there are is refused at once. An error inside an
    actor is reported as if there were no actor."""
    config, out = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(tiny(image_folder)))
    options = ["--config", str(config), "--out", str(out), "--set", f"cohort.base.{setting}"]
    ended = CliRunner().invoke(app, ["train", *options])
    assert ended.exit_code == 2 and not out.exists()
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert message in ended.stderr


def test_a_loss_that_is_not_finite_on_ray(ray_start_4_cpus: None, image_folder: Path) -> None:
    """The error is that of the peer that caused it, not of the one that waited."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    peers = [{}, {"optimizer": {"name": "sgd", "lr": 1e30}}]
    config = Config.parse(tiny(image_folder, cohort={**tiny(image_folder)["cohort"], "peers": peers}))
    with (
        closing(RayCohort(config, load_splits(config.data))) as cohort,
        pytest.raises(NonFiniteLossError, match="peer1: the embedding is not finite at step 2"),
    ):
        cohort.run(0, 10, lambda finished: None)
