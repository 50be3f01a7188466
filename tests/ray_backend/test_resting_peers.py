"""The peers of a trial process rest between its runs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import ray
from conftest import assert_same, tiny
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_dmml.checkpoint.peer_state import decode_peer
from ray_dmml.cohort.local import LocalCohort
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.ray_backend.ray_cohort import RayCohort

pytestmark = pytest.mark.ray


def test_the_next_run_has_the_same_processes(ray_start_4_cpus: None, image_folder: Path) -> None:
    """And the bits of a run of its own, though it has other nets. A dead one is replaced."""

    def outcome(cohort: Any) -> dict[str, Any]:
        rows = cohort.run(0, 3, lambda finished: None)
        with TemporaryDirectory(prefix="ray-dmml-tests-") as folder:
            state = {name: decode_peer(files) for name, files in cohort.save(Path(folder)).items()}
        return {"rows": rows, "state": state}

    class TrialProcess:
        """What Ray Tune keeps for several trials. It is a local class because Ray sends those by value."""

        def run(self, config: Config, killed: bool = False) -> tuple[dict[str, int], dict[str, Any]]:
            with closing(RayCohort(config, load_splits(config.data))) as cohort:
                pids = {name: place.pid for name, place in cohort.places.items()}
                found = outcome(cohort)
                if killed:
                    ray.kill(cohort.actors["peer1"])
            return pids, found

    raw = tiny(image_folder)
    raw["cohort"]["threads_per_peer"] = 1
    first = Config.parse(raw)
    other = Config.parse({**raw, "seed": 9, "cohort": {**raw["cohort"], "peers": [{"embedding_size": 9}, {"ema": {}}]}})
    group = placement_group([{"CPU": 1}] * 3)
    try:
        strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        trial = ray.remote(TrialProcess).options(num_cpus=1, scheduling_strategy=strategy).remote()
        seen = []
        for config, killed in ((first, False), (other, True), (first, False)):
            pids, found = ray.get(trial.run.remote(config, killed))
            seen.append(pids)
            with closing(LocalCohort(config, load_splits(config.data))) as cohort:
                assert_same(found, outcome(cohort))
    finally:
        remove_placement_group(group)
    assert seen[0] == seen[1]
    assert seen[2]["peer0"] == seen[0]["peer0"] and seen[2]["peer1"] != seen[0]["peer1"]
