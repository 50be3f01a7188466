"""Errors on a private Ray: a cluster that is too small, and a peer that is lost or learns nonsense."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny
from typer.testing import CliRunner

from ray_dmml import Config
from ray_dmml.cli.main import app
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import NonFiniteLossError, PeerLostError

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("num_gpus=1", "the peers ask for 2 GPUs (cohort.peers.*.num_gpus), but the cluster has 0"),
        ("num_cpus=3", "the peers ask for 6 CPUs (cohort.peers.*.num_cpus), but the cluster has 4"),
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


def ray_cohort(image_folder: Path, failure: dict[str, Any] | None = None, **cohort: Any) -> Any:
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    changes = {"cohort": {**tiny(image_folder)["cohort"], **cohort}, "failure": failure or {}}
    config = Config.parse(tiny(image_folder, **changes))
    return RayCohort(config, load_splits(config.data))


@pytest.mark.parametrize("transport", ["direct", pytest.param("coordinator", marks=pytest.mark.slow)])
def test_a_killed_peer_is_named(ray_start_4_cpus: None, image_folder: Path, transport: str) -> None:
    """SIGKILL from outside ends the run with the peer's name, long before any deadline."""
    with closing(ray_cohort(image_folder, transport=transport)) as cohort:
        victim = cohort.places["peer1"].pid

        def kill(finished: int) -> None:
            if finished >= 2:
                os.kill(victim, signal.SIGKILL)

        with pytest.raises(PeerLostError, match=r"^peer1 died in step \d+: its process was killed"):
            cohort.run(0, 1_000_000, kill)


@pytest.mark.parametrize("transport", ["direct", pytest.param("coordinator", marks=pytest.mark.slow)])
def test_a_silent_peer_is_named(ray_start_4_cpus: None, image_folder: Path, transport: str) -> None:
    """A peer that hangs reaches the deadline. It is named, and not the peer that waited for it."""
    with closing(ray_cohort(image_folder, {"heartbeat_timeout_s": 6}, transport=transport)) as cohort:
        victim = cohort.places["peer1"].pid

        def stop(finished: int) -> None:
            if finished >= 2:
                os.kill(victim, signal.SIGSTOP)

        cohort.run(0, 1, lambda finished: None)  # the first steps may take as long as the start
        try:
            with pytest.raises(PeerLostError, match=r"^peer1: no sign of life for 6 s"):
                cohort.run(1, 1_000_000, stop)
        finally:
            os.kill(victim, signal.SIGCONT)


def test_a_loss_that_is_not_finite_on_ray(ray_start_4_cpus: None, image_folder: Path) -> None:
    """The error is that of the peer that caused it, not of the one that waited."""
    peers = [{}, {"optimizer": {"name": "sgd", "lr": 1e30}}]
    with (
        closing(ray_cohort(image_folder, peers=peers)) as cohort,
        pytest.raises(NonFiniteLossError, match="peer1: the embedding is not finite at step 2"),
    ):
        cohort.run(0, 10, lambda finished: None)
