"""What a run gives to Ray's Prometheus endpoint, and the Grafana dashboard of it."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from ray_dmml.ray_backend.metrics import COUNTERS, GAUGES, RayMetricsLogger

DASHBOARD = Path(__file__).parents[2] / "deploy/grafana/ray-dmml.json"


def names_in_dashboard() -> set[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {name for panel in panels for each in panel["targets"] for name in re.findall(r"\bray_\w+", each["expr"])}


def test_the_dashboard_shows_what_is_exported() -> None:
    exported = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}
    assert names_in_dashboard() == exported


@pytest.mark.ray
def test_ray_exports_the_metrics(ray_start_4_cpus: None) -> None:
    """With the run and the peer as labels. The endpoint has them some seconds later."""
    import ray

    logger = RayMetricsLogger("photos", 10)
    logger.rewind(0)
    figures = {"peers": {"peer0": {"recall@1": 0.25}}, "ensemble": {"recall@1": 0.5}}
    logger.log({"peers": {"peer0": {"loss": 0.75}, "peer1": {}}}, 4)
    logger.log({"images_per_second": 80.0, "step_s": 0.125, "waited_s": {"peer0": 1.5, "peer1": 0.0}}, 4)
    logger.log({"images_per_second": 40.0, "step_s": 0.25, "waited_s": {"peer0": 2.0, "peer1": 0.0}}, 5)
    logger.log({"validation": figures}, 5)
    logger.log({}, 5)
    logger.log({"lost": "peer1: its process died"}, 5)
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    until = time.monotonic() + 60
    lines: list[str] = []
    while not any("ray_dmml_restarts" in line for line in lines) and time.monotonic() < until:
        time.sleep(0.5)
        lines = urllib.request.urlopen(url, timeout=10).read().decode().splitlines()
    values = {
        (match[1], match[2]): float(match[4])
        for line in lines
        if (match := re.match(r'(ray_dmml_\w+)\{(?=.*run="photos")(?:.*peer="(\w+)")?(.*)\} (\S+)$', line))
    }
    assert values == {
        ("ray_dmml_step", None): 5,
        ("ray_dmml_steps", None): 10,
        ("ray_dmml_step_seconds", None): 0.25,
        ("ray_dmml_images_per_second", None): 40,
        ("ray_dmml_loss", "peer0"): 0.75,
        ("ray_dmml_exchange_wait_seconds_total", "peer0"): 2.0,
        ("ray_dmml_validation_recall_at_1", "peer0"): 0.25,
        ("ray_dmml_validation_recall_at_1", "ensemble"): 0.5,
        ("ray_dmml_restarts_total", None): 1,
    }
    assert names_in_dashboard() == {name for name, _ in values}
