"""A run that waits for room in a full cluster says so, and gives up in time."""

from __future__ import annotations

import logging

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.ray_backend import reservation
from ray_dmml.ray_backend.reservation import Reservation


def test_waiting_for_room(
    ray_start_4_cpus: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every now and then a line names what is asked for and what is free."""
    monkeypatch.setattr(reservation, "NOTICE_S", 0.5)
    others = placement_group([{"CPU": 3}])
    ray.get(others.ready(), timeout=60)
    config = Config.parse({"cohort": {"base": {"num_cpus": 2}, "peers": [{}, {}], "placement_timeout_s": 1.8}})
    with caplog.at_level(logging.INFO, "ray_dmml"), pytest.raises(UserError, match=r"did not grant .* within 1.8 s"):
        Reservation(config)
    assert 2 <= len(caplog.messages) <= 4
    assert "waiting for room for [{'CPU': 2.0}, {'CPU': 2.0}]" in caplog.messages[0]
    assert "the cluster has 4 CPUs and 0 GPUs, and 1 CPUs and 0 GPUs are free" in caplog.messages[0]
    remove_placement_group(others)
    Reservation(config).release()
