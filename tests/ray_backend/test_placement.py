"""What each peer's actor asks of the cluster: a pure function."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ray_dmml.config import yamlio
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.ray_backend import placement
from ray_dmml.ray_backend.placement import plan_bundles


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


@pytest.mark.parametrize(
    ("num_peers", "nodes", "bundles"),
    [
        # A head without GPUs has CPUs that are of no use to peers with one.
        (2, [{"CPU": 64}, {"CPU": 8, "GPU": 2}], [{"CPU": 4, "GPU": 1}] * 2),
        (2, [{"CPU": 8}, {"CPU": 4}], [{"CPU": 4}] * 2),
        (3, [{"CPU": 3}, {"CPU": 3}], [{"CPU": 1}] * 3),
        # 6, 4 and 3 peers of one core each would be 13; two share a core.
        (14, [{"CPU": 6}, {"CPU": 4}, {"CPU": 3}], [{"CPU": 1 / 2}] * 14),
        (4, [{"CPU": 64}, {"CPU": 1, "GPU": 4}], [{"CPU": 1 / 4, "GPU": 1}] * 4),
        (3, [{"CPU": 4, "GPU": 1}, {"CPU": 8, "GPU": 1}], [{"CPU": 4, "GPU": 1 / 2}] * 3),
    ],
)
def test_shares_find_places_on_the_nodes_as_they_are(
    num_peers: int, nodes: list[dict[str, float]], bundles: list[dict[str, float]]
) -> None:
    """What is even on one big machine may be more than a node has, or leave rests on each."""
    for order in (nodes, nodes[::-1]):
        assert plan(num_peers, *order) == [pytest.approx(bundle) for bundle in bundles]


def test_only_what_is_not_said_is_lowered() -> None:
    """The first peer keeps what it asks for; the others take what goes beside it."""
    nodes = [{"CPU": 8.0}, {"CPU": 4.0}]
    assert plan(2, *nodes, num_cpus=3) == [{"CPU": 3}, {"CPU": 8}]
    assert plan(2, *nodes, num_cpus=5) == [{"CPU": 5}, {"CPU": 4}]
    # 3 GPUs, each with 0.4 left beside a peer that asks for 0.6: not a half, but a third.
    peers = [{"num_gpus": 0.6}] * 3 + [{}]
    config = Config.parse({"cohort": {"peers": peers}})
    found = plan_bundles(config, [{"CPU": 8.0, "GPU": 3.0}])
    assert [bundle["GPU"] for bundle in found] == [0.6] * 3 + [pytest.approx(1 / 3)]
    # A peer that wants no GPU goes where there is none.
    nodes = [{"CPU": 64.0}, {"CPU": 8.0, "GPU": 2.0}]
    assert plan(3, *nodes, num_gpus=0, num_cpus=60)[1:] == [{"CPU": 4, "GPU": 1}] * 2


@pytest.mark.parametrize(
    ("peers", "nodes", "says"),
    [
        (
            [{"num_cpus": 6}] * 3,
            [{"CPU": 10}, {"CPU": 8}],
            r"peer0, peer1, peer2: 6 CPU, 0 GPU\. .* 1 x \(10 CPU, 0 GPU\); 1 x \(8 CPU, 0 GPU\)",
        ),
        (
            [{"num_cpus": 5}, {"num_cpus": 5}],
            [{"CPU": 64}, {"CPU": 8, "GPU": 2}],
            r"peer0, peer1: 5 CPU, a share of the GPUs\. .* 1 x \(8 CPU, 2 GPU\)",
        ),
        (
            [{"num_gpus": 0.6}] * 3,
            [{"CPU": 8, "GPU": 2}],
            r"peer0, peer1, peer2: a share of the CPUs, 0.6 GPU\. ",
        ),
        (
            [{"resources": {"A100": 1}}, {"resources": {"A100": 1}}],
            [{"CPU": 8, "A100": 1}, {"CPU": 8}],
            r"peer0, peer1: .*, 1 A100\. .* \(8 CPU, 0 GPU, 1 A100\)",
        ),
        # The node of two GPUs has 1.7 of them in sum; Ray would put all there, which it then refuses.
        (
            [{"num_cpus": 1, "num_gpus": 0.6}] * 2 + [{"num_cpus": 1, "num_gpus": 0.5}],
            [{"CPU": 5, "GPU": 2}, {"CPU": 2, "GPU": 1}],
            r"peer0, peer1: 1 CPU, 0.6 GPU; peer2: 1 CPU, 0.5 GPU\. ",
        ),
        # Arithmetic has room for these (4; 3 and 3). Ray puts the largest where most is left, and then waits.
        ([{"num_cpus": 4}, {"num_cpus": 3}, {"num_cpus": 3}], [{"CPU": 6}, {"CPU": 4}], "place"),
    ],
)
def test_what_finds_no_place_is_told_at_once(
    peers: list[dict[str, Any]], nodes: list[dict[str, float]], says: str
) -> None:
    """With what each peer asks for and what the nodes have, though their sums are enough."""
    config = Config.parse({"cohort": {"peers": peers}})
    with pytest.raises(UserError, match=says):
        placement.plan(config, nodes, [])


def test_whole_machines_are_planned_soon() -> None:
    """Also where no share fits: 64 peers on 32 nodes."""
    config = Config.parse({"cohort": {"base": {"num_cpus": 40}, "peers": [{}] * 64}})
    nodes = [{"CPU": 192.0}] * 16 + [{"CPU": 39.0, "GPU": 4.0}] * 16
    began = time.monotonic()
    with pytest.raises(UserError, match="peer0 and 63 others: 40 CPU, a share of the GPUs"):
        plan_bundles(config, nodes)
    assert time.monotonic() - began < 10


GPU_NODE = {"CPU": 48.0, "GPU": 4.0, "memory": 1e11}
HEAD = {"CPU": 0.0, placement.HEAD: 1.0}


@pytest.mark.parametrize(
    ("num_peers", "alive", "growth", "bundle"),
    [
        (3, [HEAD], [GPU_NODE] * 4, {"CPU": 16, "GPU": 1}),  # one node serves
        (4, [HEAD, GPU_NODE], [GPU_NODE] * 4, {"CPU": 12, "GPU": 1}),  # what is there serves
        (6, [HEAD, GPU_NODE], [GPU_NODE] * 4, {"CPU": 16, "GPU": 1}),  # one more
        (3, [HEAD], [{"CPU": 2.0}] * 3, {"CPU": 1}),  # no GPUs anywhere
        (6, [HEAD], [GPU_NODE], {"CPU": 8, "GPU": 1 / 2}),  # all there will ever be
        (5, [HEAD, GPU_NODE], [GPU_NODE], {"CPU": 9, "GPU": 1 / 2}),  # it is there by now
        (2, [HEAD | {"CPU": 64.0}], [GPU_NODE] * 4, {"CPU": 24, "GPU": 1}),  # the head's are no use
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
        placement.plan(config, [HEAD], [GPU_NODE] * 2)


def test_a_cluster_grows_until_each_finds_a_place() -> None:
    """Not until the sums are enough: each node has room for one of these, and one alone has an A100."""
    node, a100 = {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0, "A100": 1.0}
    config = Config.parse({"cohort": {"base": {"num_cpus": 8}, "peers": [{}] * 2}})
    assert placement.plan(config, [HEAD], [node] * 2) == [{"CPU": 8, "GPU": 1}] * 2
    config = Config.parse({"cohort": {"peers": [{"resources": {"A100": 1}}, {}]}})
    assert placement.plan(config, [HEAD], [node, a100])[0] == {"CPU": 8, "GPU": 1, "A100": 1}


def test_workers_that_are_alive_have_come_already() -> None:
    """Of their own type where that can be told, else there is one less of the smallest; never less than
    none."""
    large, small = {"CPU": 48.0, "GPU": 4.0}, {"CPU": 8.0, "memory": 1e9}
    growth = [large, large, small]
    assert placement.left_to_grow([HEAD], growth) == growth
    here = {"memory": 2e9, "node:10.0.0.2": 1.0}  # measured there, and Ray's own
    assert placement.left_to_grow([HEAD, large | here], growth) == [large, small]
    assert placement.left_to_grow([HEAD, small | here], growth) == [large, large]
    assert placement.left_to_grow([HEAD, {"CPU": 7.0}], growth) == [large, large]
    assert placement.left_to_grow([HEAD, *[small] * 2], growth) == [large]
    assert placement.left_to_grow([HEAD, *[small] * 5], growth) == []
    assert placement.left_to_grow([HEAD, large], [{}, {}]) == [{}]
    config = Config.parse({"cohort": {"base": {"num_gpus": 1}, "peers": [{}] * 5}})
    with pytest.raises(UserError, match=r"ask for 5 GPUs .*cluster has 4"):
        placement.plan(config, [HEAD, GPU_NODE], [GPU_NODE])


def test_the_head_alone_knows_what_may_come(tmp_path: Path) -> None:
    """A file that an earlier cluster has left on a worker says nothing of this one."""
    file = tmp_path / "ray_bootstrap_config.yaml"
    types = {"head": {}, "gpu": {"resources": {"CPU": 48, "GPU": 4}}}
    cluster = {"max_workers": 2, "head_node_type": "head", "available_node_types": types}
    file.write_text(yamlio.dump(cluster))
    gone = {"NodeID": "gone", "Alive": False, "Resources": {}}
    head = {"NodeID": "head", "Alive": True, "Resources": HEAD}
    worker = {"NodeID": "worker", "Alive": True, "Resources": {"CPU": 48.0, "GPU": 4.0}}
    rows = [head, worker, gone]
    assert placement.known_nodes(rows, "worker", file) == [HEAD, worker["Resources"]]
    assert placement.known_nodes(rows, "head", file) == [HEAD, *[worker["Resources"]] * 2]


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
    for wrong in (
        {"num_gpus": 1.5},
        {"num_gpus": 3, "replicas": 2},
        {"num_gpus": 1, "replicas": 2},
    ):
        with pytest.raises(UserError, match="several have a GPU each"):
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


def on(labels: dict[str, str], **resources: float) -> placement.Node:
    return placement.labelled(resources, labels)


def test_a_peer_is_placed_where_its_labels_are() -> None:
    """Not where most room is: what fits by labels alone is not refused, and what does not is."""
    h100, a100 = on({"gpu": "H100"}, CPU=12, GPU=4), on({"gpu": "A100"}, CPU=8, GPU=1)
    peers: list[dict[str, Any]] = [{"labels": {"gpu": "A100"}, "num_cpus": 8, "num_gpus": 1}]
    peers += [{"labels": {"gpu": "H100"}, "num_cpus": 4, "num_gpus": 1}] * 3
    config = Config.parse({"cohort": {"peers": peers}})
    for nodes in ([h100, a100], [a100, h100]):
        found = plan_bundles(config, nodes)  # for Ray, which is told of labels apart
        assert found == [{"CPU": 8, "GPU": 1}, *[{"CPU": 4, "GPU": 1}] * 3]
    assert placement.plan(config, [HEAD, h100], [h100, a100]) == found
    both = Config.parse(
        {"cohort": {"base": {"num_cpus": 4, "labels": {"zone": "b"}}, "peers": [{}] * 2}}
    )
    nodes = [on({"zone": "a"}, CPU=8), on({"zone": "b"}, CPU=4)]
    with pytest.raises(
        UserError, match=r"peer0, peer1: 4 CPU, 0 GPU, zone: b.* 1 x \(4 CPU, 0 GPU, zone: b\)"
    ):
        plan_bundles(both, nodes)
    # A share is one of the nodes that a peer may use.
    one = Config.parse(
        {"cohort": {"peers": [{"labels": {"zone": "b"}}, {"labels": {"zone": "b"}}]}}
    )
    assert plan_bundles(one, nodes) == [{"CPU": 2}] * 2


def test_workers_of_each_set_of_labels_may_come(tmp_path: Path) -> None:
    """The largest would otherwise hide all others behind the most that may be at once."""
    file = tmp_path / "ray_bootstrap_config.yaml"
    types = {
        "head": {},
        "large": {"resources": {"CPU": 48, "GPU": 4}, "labels": {"gpu": "H100"}},
        "small": {"resources": {"CPU": 8, "GPU": 1}, "labels": {"gpu": "T4"}},
    }
    cluster = {"max_workers": 2, "head_node_type": "head", "available_node_types": types}
    file.write_text(yamlio.dump(cluster))
    large, small = on({"gpu": "H100"}, CPU=48, GPU=4), on({"gpu": "T4"}, CPU=8, GPU=1)
    growth = placement.growth_of(file)
    assert growth == [large, large, small, small]
    assert placement.left_to_grow([HEAD, {"CPU": 8.0, "GPU": 1.0}], growth) == [large, large, small]
    config = Config.parse({"cohort": {"peers": [{"labels": {"gpu": "T4"}, "num_gpus": 1}]}})
    assert placement.plan(config, [HEAD], growth) == [{"CPU": 8, "GPU": 1}]
