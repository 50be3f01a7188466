"""`data fetch --address` copies the images to every node of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from ray_dmml.config.schema import DataConfig
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.data_staging import prepare_everywhere


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_each_node_reports(two_nodes: None, image_folder: Path, tmp_path: Path) -> None:
    """Both nodes of this test write to the same folder, and one waits for the other."""
    config = DataConfig(name="imagefolder", source=str(image_folder), root=tmp_path / "copy")
    results = list(prepare_everywhere(config))
    assert len(results) == 2
    for _, result in results:
        assert isinstance(result, str) and f"in {tmp_path / 'copy'}" in result
    assert len(list((tmp_path / "copy").glob("*/*.png"))) == len(list(image_folder.glob("*/*.png")))


def test_each_node_that_fails_reports_why(two_nodes: None, tmp_path: Path) -> None:
    results = list(prepare_everywhere(DataConfig(name="imagefolder", root=tmp_path / "missing")))
    assert len(results) == 2
    for _, result in results:
        assert isinstance(result, UserError) and "missing" in str(result)
