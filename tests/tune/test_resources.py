"""The resources of a trial, on a private Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny
from tune_helpers import make_search

from ray_dmml.config import yamlio
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.ray_backend import placement
from ray_dmml.tune.resources import (
    known_nodes,
    require_resources,
    require_room,
    trial_resources,
)


def trial(peers: list[dict[str, Any]], *nodes: dict[str, float], gpus: float | None = None) -> list[dict[str, float]]:
    """The peers' bundles of a trial, on these nodes beside this process's own."""
    import ray

    here = {kind: 1.0 for kind in ray.nodes()[0]["Resources"] if kind.startswith("node:")}
    config = Config.parse({"cohort": {"peers": peers}})
    _, *bundles = trial_resources(config, [here | {"CPU": 0.0}, *nodes], gpus).bundles
    return bundles


def test_a_trial_is_planned_on_the_nodes_that_may_come(
    ray_start_4_cpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search on a cluster that has only its head by now: of `ray up`'s file."""
    cluster = {
        "max_workers": 2,
        "head_node_type": "head",
        "available_node_types": {"head": {}, "gpu": {"resources": {"CPU": 48, "GPU": 4}}},
    }
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [node["CPU"] for node in known_nodes()] == [4]
    (tmp_path / placement.BOOTSTRAP_FILE).write_text(yamlio.dump(cluster))
    assert known_nodes()[1:] == [{"CPU": 48, "GPU": 4}] * 2
    assert trial([{}, {}], *known_nodes()[1:]) == [{"CPU": 6, "GPU": 0.5}] * 2


def test_a_trial_on_a_cluster_of_which_nothing_is_known(ray_start_4_cpus: None) -> None:
    """No CPU is made up where nobody said that there will be GPUs either."""
    with pytest.raises(UserError, match=r"no CPUs and no GPUs.*--gpus-per-trial"):
        trial([{}, {}])
    with pytest.raises(UserError, match="--gpus-per-trial"):
        trial([{}, {}], gpus=0)
    assert trial([{}, {}], gpus=2) == [{"CPU": 1, "GPU": 1}] * 2
    assert trial([{"num_cpus": 2}, {"num_cpus": 3}]) == [{"CPU": 2}, {"CPU": 3}]


def test_a_trial_finds_places_on_the_nodes_as_they_are(ray_start_4_cpus: None) -> None:
    """The CPUs of a node without GPUs are no part of what goes with a GPU, and shares leave no rests."""
    gpu_node = {"CPU": 8.0, "GPU": 2.0}
    assert trial([{}, {}], {"CPU": 64.0}, gpu_node) == [{"CPU": 2, "GPU": 0.5}] * 2
    assert trial([{}] * 3, {"CPU": 1.0}, {"CPU": 1.0}) == [{"CPU": 0.5}] * 3
    assert trial([{}, {}], {"CPU": 64.0}, {"CPU": 1.0, "GPU": 8.0}) == [{"CPU": 0.5, "GPU": 0.5}] * 2
    assert trial([{}, {}], {"CPU": 4.0}) == [{"CPU": 1}] * 2


def test_each_replica_of_a_trial_has_a_gpu(ray_start_4_cpus: None) -> None:
    """NCCL takes no two processes on one; without GPUs they are processes on CPUs."""
    node = {"CPU": 48.0, "GPU": 4.0}
    first, second = trial([{"replicas": 2}, {}], node)
    assert (first["GPU"], second["GPU"]) == (2, 0.5)
    first, second = trial([{"replicas": 3}, {}], node, gpus=4)
    assert (first["GPU"], second["GPU"]) == (3, 1)
    assert all("GPU" not in each for each in trial([{"replicas": 2}, {}], node, gpus=0))
    assert all("GPU" not in each for each in trial([{"replicas": 2}, {}], {"CPU": 8.0}))


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        ({"num_cpus": 3}, r"a trial needs 6 CPUs .* and this machine has 4"),
        ({"labels": {"zone": "a"}}, r"no node has the labels .* of peer0"),
        ({"num_cpus": 5}, "a trial needs 10 CPUs"),
        ({"resources": {"node:__internal_head__": 0.6}}, "a trial needs 1.2 node:__internal"),
    ],
)
def test_a_trial_that_would_wait_without_end_is_refused(
    ray_start_4_cpus: None, image_folder: Path, peer: dict[str, Any], message: str
) -> None:
    """A private Ray does not grow. It is the same if only one value of the space asks for too much."""
    raw = tiny(image_folder)
    require_resources(make_search(raw), known_nodes())
    cohorts = [raw["cohort"]["peers"], [peer, peer]]
    with pytest.raises(UserError, match=message):
        search = make_search(raw, {"cohort.peers": {"choice": cohorts}})
        require_resources(search, known_nodes())
    raw["cohort"]["base"] |= peer
    with pytest.raises(UserError, match=message):
        require_resources(make_search(raw), known_nodes())


def test_fractions_of_several_gpus_are_refused(ray_start_4_cpus: None) -> None:
    """1.8 of 2 GPUs are in use, and still no GPU has 0.6 left for the third peer."""
    config = Config.parse({"cohort": {"base": {"num_gpus": 0.6}, "peers": [{}] * 3}})
    nodes = [{**known_nodes()[0], "GPU": 2.0}]
    message = r"do not fit on this machine.* 4 CPUs and 2 GPUs.*0.6 GPU"
    with pytest.raises(UserError, match=message):
        require_room(trial_resources(config, nodes, None), nodes)
    nodes[0]["GPU"] = 3.0
    require_room(trial_resources(config, nodes, None), nodes)
