"""Clusters of 1, 2 and 4 nodes give the same results, also for two runs at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from ray_dmml.config import yamlio
from ray_dmml.config.schema import Config
from ray_dmml.training.run import train
from ray_dmml.training.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def settings(root: Path, **changes: Any) -> dict[str, Any]:
    raw = tiny(root, evaluation={"recall_at": [1], "untrained": False}, **changes)
    raw["cohort"] |= {"peers": [{}, {"view": "weak"}, {"view": "strong"}, {}]}
    raw["cohort"]["base"]["num_cpus"] = 0.5
    return raw


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    """As many nodes as the parameter says, each with its own processes and object store."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        for _ in range(request.param - 1):
            cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def start(cluster: Any, config: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ray_dmml.cli", "train", "--address", cluster.address]
    return subprocess.Popen(
        [*command, "--config", str(config), "--out", str(out)],
        env={**os.environ, "RAY_ADDRESS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def results_of(run: Path) -> tuple[Any, str]:
    folder = RunDir.open(run)
    return folder.checkpoints.load("last").peers, folder.metrics_file.read_text()


@pytest.mark.parametrize("cluster", [1, 2, 4], indirect=True)
def test_any_number_of_nodes_gives_the_same_bits(cluster: Any, image_folder: Path, tmp_path: Path) -> None:
    """Peers that are spread over all nodes end with the weights and metrics of one process."""
    raw = settings(image_folder)
    raw["cohort"]["placement_strategy"] = "spread"
    config = tmp_path / "config.yaml"
    config.write_text(yamlio.dump(raw))
    run = start(cluster, config, tmp_path / "run")
    output = run.communicate(timeout=240)[0]
    assert run.returncode == 0, output
    train(Config.parse(raw), tmp_path / "local", local=True)
    assert results_of(tmp_path / "run") == results_of(tmp_path / "local")


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_two_runs_at_once_on_one_cluster(cluster: Any, image_folder: Path, tmp_path: Path) -> None:
    """They share no names, ports or files."""
    raws = [settings(image_folder, seed=seed) for seed in (0, 1)]
    runs = []
    for seed, raw in enumerate(raws):
        config = tmp_path / f"{seed}.yaml"
        config.write_text(yamlio.dump(raw))
        runs.append(start(cluster, config, tmp_path / f"run{seed}"))
    for seed, (raw, run) in enumerate(zip(raws, runs, strict=True)):
        output = run.communicate(timeout=240)[0]
        assert run.returncode == 0, output
        train(Config.parse(raw), tmp_path / f"local{seed}", local=True)
        assert results_of(tmp_path / f"run{seed}") == results_of(tmp_path / f"local{seed}")
