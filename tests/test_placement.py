"""What each peer's actor asks of the cluster: a pure function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_dmml import yamlio
from ray_dmml.cohort import placement
from ray_dmml.cohort.placement import plan_bundles
from ray_dmml.config import Config
from ray_dmml.errors import UserError


def plan(num_peers: int, *nodes: dict[str, float], **first: Any) -> list[dict[str, float]]:
    """The bundles of a cohort whose first peer has settings of its own."""
    peers = [first, *({} for _ in range(num_peers - 1))]
    return plan_bundles(Config.parse({"cohort": {"peers": peers}}), nodes)


@pytest.mark.parametrize(
    ("num_peers", "cpus", "share"), [(2, 4, 2), (3, 4, 1), (2, 5, 2), (4, 2, 0.5), (3, 1, 1 / 3)]
)
def test_cpus_are_shared_evenly(num_peers: int, cpus: int, share: float) -> None:
    """Whole cores each where there are enough, fractions of them where not."""
    bundles = plan(num_peers, {"CPU": cpus})
    assert bundles == [{"CPU": pytest.approx(share)}] * num_peers
    assert sum(bundle["CPU"] for bundle in bundles) <= cpus + 1e-9


def test_no_peer_asks_for_more_than_a_node_has() -> None:
    """2 peers on 4 nodes of 2 cores each take 2."""
    assert plan(2, *[{"CPU": 2}] * 4) == [{"CPU": 2}, {"CPU": 2}]


@pytest.mark.parametrize(
    ("num_peers", "gpus", "share"),
    [
        (2, 2, 1),
        (2, 8, 1),
        (3, 2, 1 / 2),
        (2, 1, 1 / 2),
        (5, 2, 1 / 3),
        (4, 3, 1 / 2),
        (9, 2, 1 / 5),
    ],
)
def test_gpus_are_shared_so_that_whole_peers_fit(num_peers: int, gpus: int, share: float) -> None:
    """Peers that outnumber the GPUs take 1/2, 1/3, ...: shares that fill whole GPUs."""
    bundles = plan(num_peers, {"CPU": 16, "GPU": gpus})
    assert [bundle["GPU"] for bundle in bundles] == [pytest.approx(share)] * num_peers
    assert num_peers <= gpus * round(1 / bundles[0]["GPU"])


def test_without_gpus_none_are_asked() -> None:
    """Ray takes a bundle with 0 GPUs for a mistake."""
    for cluster in ({"CPU": 4.0}, {"CPU": 4.0, "GPU": 0.0}):
        assert all("GPU" not in bundle for bundle in plan(2, cluster))


def test_settings_of_a_peer_come_first() -> None:
    """What a peer asks for it gets; the others share what is left."""
    bundles = plan(3, {"CPU": 8, "GPU": 2}, num_cpus=4, num_gpus=1)
    assert bundles[0] == {"CPU": 4, "GPU": 1}
    assert plan(4, {"CPU": 4, "GPU": 2}, num_gpus=1)[1]["GPU"] == pytest.approx(1 / 3)
    assert plan(2, {"CPU": 2}, num_cpus=1.5)[1] == {"CPU": 0.5}
    assert bundles[1] == bundles[2] == {"CPU": 2, "GPU": 0.5}
    assert "GPU" not in plan(2, {"CPU": 8, "GPU": 2}, num_gpus=0)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_gpus": 3}, r"ask for .* GPUs .*num_gpus.*cluster has 1"),
        ({"num_cpus": 9}, r"ask for .* CPUs .*num_cpus.*cluster has 4"),
        ({"num_cpus": 3}, r"a peer asks for 3 CPUs .*largest node has 2"),
        ({"num_cpus": 2, "num_gpus": 0}, None),
    ],
)
def test_more_than_there_is_is_told(settings: dict[str, Any], message: str | None) -> None:
    """What is asked for stands beside what the cluster, or its largest node, has."""
    nodes = [{"CPU": 2, "GPU": 1}, {"CPU": 2}]
    if message is None:
        assert plan(2, *nodes, **settings)[0] == {"CPU": 2}
    else:
        with pytest.raises(UserError, match=message):
            plan(2, *nodes, **settings)


def test_nothing_left_for_the_others_is_told() -> None:
    """A peer that takes every core leaves none for one that does not say what it needs."""
    with pytest.raises(UserError, match="take all 2 CPUs"):
        plan(2, {"CPU": 2}, num_cpus=2)


GPU_NODE = {"CPU": 48.0, "GPU": 4.0, "memory": 1e11}


@pytest.mark.parametrize(
    ("num_peers", "alive", "growth", "bundle"),
    [
        (3, [{"CPU": 0.0}], [GPU_NODE] * 4, {"CPU": 16, "GPU": 1}),  # one node serves
        (4, [GPU_NODE], [GPU_NODE] * 4, {"CPU": 12, "GPU": 1}),  # what is there serves
        (6, [GPU_NODE], [GPU_NODE] * 4, {"CPU": 16, "GPU": 1}),  # one more
        (3, [{"CPU": 0.0}], [{"CPU": 2.0}] * 3, {"CPU": 1}),  # no GPUs anywhere
        (6, [{"CPU": 0.0}], [GPU_NODE], {"CPU": 8, "GPU": 1 / 2}),  # all there will ever be
    ],
)
def test_a_cluster_that_can_grow_is_planned_grown(
    num_peers: int,
    alive: list[dict[str, float]],
    growth: list[dict[str, float]],
    bundle: dict[str, float],
) -> None:
    """By as few nodes as give every peer a GPU, or a CPU where no node has one."""
    config = Config.parse({"cohort": {"peers": [{}] * num_peers}})
    found = placement.plan(config, alive, growth)
    assert found == [pytest.approx(bundle)] * num_peers


def test_more_than_the_cluster_can_grow_to_is_told() -> None:
    """Counted with the nodes that may come."""
    config = Config.parse({"cohort": {"base": {"num_gpus": 4}, "peers": [{}] * 3}})
    with pytest.raises(UserError, match=r"ask for 12 GPUs .*cluster has 8"):
        placement.plan(config, [{"CPU": 0.0}], [GPU_NODE] * 2)


def test_what_the_cluster_file_allows(tmp_path: Path) -> None:
    """The workers of all types, no more than all together may be, and not the head."""
    file = tmp_path / "ray_bootstrap_config.yaml"
    assert placement.growth_of(file) == []
    cluster = {
        "max_workers": 3,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 4}},
            "small": {"resources": {"CPU": 8}, "max_workers": 5},
            "large": {"resources": {"CPU": 48, "GPU": 4}, "max_workers": 2},
        },
    }
    file.write_text(yamlio.dump(cluster))
    assert placement.growth_of(file) == [{"CPU": 48, "GPU": 4}] * 2 + [{"CPU": 8}]
    file.write_text("provider: [")
    assert placement.growth_of(file) == []


def test_a_peer_of_several_gpus_has_a_process_for_each() -> None:
    """Whole GPUs of one node; what is said of replicas alone asks for as many where there are GPUs."""
    nodes = {"CPU": 8.0, "GPU": 4.0}
    assert plan(2, nodes, num_gpus=2) == [{"CPU": 4, "GPU": 2}, {"CPU": 4, "GPU": 1}]
    assert plan(2, nodes, replicas=3) == [{"CPU": 4, "GPU": 3}, {"CPU": 4, "GPU": 1}]
    assert plan(2, {"CPU": 8.0}, replicas=3) == [{"CPU": 4}, {"CPU": 4}]
    config = Config.parse({"cohort": {"peers": [{"num_gpus": 2}, {}, {"num_gpus": 0.5}]}})
    assert [peer.num_replicas for peer in config.cohort.peers] == [2, 1, 1]
    with pytest.raises(UserError, match=r"a peer asks for 2 GPUs .* largest node has 1"):
        plan(2, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}, num_gpus=2)
    for wrong in ({"num_gpus": 1.5}, {"num_gpus": 3, "replicas": 2}):
        with pytest.raises(UserError, match="each uses one GPU or a part of one"):
            Config.parse({"cohort": {"peers": [wrong, {}]}})


def test_what_a_node_must_have_besides() -> None:
    """Resources become part of the bundle; what no node has is told at once."""
    small, large = {"CPU": 4.0}, {"CPU": 4.0, "accelerator_type:A100": 1.0}
    asked = {"accelerator_type:A100": 0.001}
    first, second = plan(2, small, large, resources=asked)
    assert first == {"CPU": 4, **asked} and second == {"CPU": 4}
    with pytest.raises(
        UserError, match=r"peer0 asks for 0.001 of 'accelerator_type:A100' \(cohort"
    ):
        plan(2, small, resources=asked)
    config = Config.parse({"cohort": {"peers": [{"labels": {"zone": "a"}}, {}]}})
    placement.require_labels(config, [{"zone": "b"}, {"zone": "a", "disk": "ssd"}])
    with pytest.raises(UserError, match=r"no node has the labels .* of peer0 .* zone: b"):
        placement.require_labels(config, [{"zone": "b", placement.NODE_ID: "1"}])
