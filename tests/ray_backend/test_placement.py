"""The resources that each peer's actor asks for, and what is refused at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.util.placement_group import placement_group, remove_placement_group

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.ray_backend import placement


def plan_on(nodes: Sequence[placement.Node], peers: list[dict[str, Any]]) -> list[dict[str, float]]:
    return placement.plan(Config.parse({"cohort": {"peers": peers}}), nodes, [])


def plan(num_peers: int, *nodes: dict[str, float], **first: Any) -> list[dict[str, float]]:
    """The bundles of a cohort whose first peer has the given settings."""
    return plan_on(nodes, [first, *({} for _ in range(num_peers - 1))])


@pytest.mark.parametrize(("num_peers", "cpus", "share"), [(2, 4, 2), (3, 4, 1), (2, 5, 2), (4, 2, 0.5), (3, 1, 1 / 3)])
def test_cpus_are_shared_evenly(num_peers: int, cpus: int, share: float) -> None:
    """Shares are whole cores where there are enough, else fractions."""
    bundles = plan(num_peers, {"CPU": cpus})
    assert bundles == [{"CPU": pytest.approx(share)}] * num_peers
    assert sum(bundle["CPU"] for bundle in bundles) <= cpus + 1e-9


def test_no_peer_asks_for_more_than_a_node_has() -> None:
    """2 peers on 4 nodes of 2 cores take 2 each, not 4."""
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
    """Peers that outnumber the GPUs take 1/2, 1/3, ... of one. These shares fill whole GPUs."""
    bundles = plan(num_peers, {"CPU": 16, "GPU": gpus})
    assert [bundle["GPU"] for bundle in bundles] == [pytest.approx(share)] * num_peers
    assert num_peers <= gpus * round(1 / bundles[0]["GPU"])


def test_without_gpus_none_are_asked() -> None:
    """Ray rejects a bundle with 0 GPUs."""
    for cluster in ({"CPU": 4.0}, {"CPU": 4.0, "GPU": 0.0}):
        assert all("GPU" not in bundle for bundle in plan(2, cluster))


def test_settings_of_a_peer_come_first() -> None:
    """A peer gets what it asks for, and the others share the rest."""
    bundles = plan(3, {"CPU": 8, "GPU": 2}, num_cpus=4, num_gpus=1)
    assert bundles[0] == {"CPU": 4, "GPU": 1}
    assert plan(4, {"CPU": 4, "GPU": 2}, num_gpus=1)[1]["GPU"] == pytest.approx(1 / 3)
    assert plan(2, {"CPU": 2}, num_cpus=1.5)[1] == {"CPU": 0.5}
    assert bundles[1] == bundles[2] == {"CPU": 2, "GPU": 0.5}
    assert "GPU" not in plan(2, {"CPU": 8, "GPU": 2}, num_gpus=0)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_gpus": 3}, r"peer0: a share of the CPUs, 3 GPU; peer1: .* 1 x \(2 CPU, 1 GPU\)"),
        ({"num_cpus": 9}, r"peer0: 9 CPU, a share of the GPUs; peer1: .*; 1 x \(2 CPU\)"),
        ({"num_cpus": 3}, r"peer0: 3 CPU, .*1 x \(2 CPU, 1 GPU\); 1 x \(2 CPU\).*num_cpus"),
        ({"num_cpus": 2, "num_gpus": 0}, None),
    ],
)
def test_asking_for_more_than_there_is(settings: dict[str, Any], message: str | None) -> None:
    """The message shows what each peer asks for and what the nodes have."""
    nodes = [{"CPU": 2, "GPU": 1}, {"CPU": 2}]
    if message is None:
        assert plan(2, *nodes, **settings)[0] == {"CPU": 2}
    else:
        with pytest.raises(UserError, match=message):
            plan(2, *nodes, **settings)


def test_nothing_left_for_the_others() -> None:
    """A peer that takes every core leaves none for one that asks for a share."""
    with pytest.raises(UserError, match=r"peer0: 2 CPU, .*; peer1: a share of the CPUs"):
        plan(2, {"CPU": 2}, num_cpus=2)


@pytest.mark.parametrize(
    ("num_peers", "nodes", "bundles"),
    [
        # Peers with a GPU cannot use the CPUs of a head without one.
        (2, [{"CPU": 64}, {"CPU": 8, "GPU": 2}], [{"CPU": 4, "GPU": 1}] * 2),
        (2, [{"CPU": 8}, {"CPU": 4}], [{"CPU": 4}] * 2),
        (3, [{"CPU": 3}, {"CPU": 3}], [{"CPU": 1}] * 3),
        # With a core each the nodes would hold 13 peers, so two share a core.
        (14, [{"CPU": 6}, {"CPU": 4}, {"CPU": 3}], [{"CPU": 1 / 2}] * 14),
        (4, [{"CPU": 64}, {"CPU": 1, "GPU": 4}], [{"CPU": 1 / 4, "GPU": 1}] * 4),
        (3, [{"CPU": 4, "GPU": 1}, {"CPU": 8, "GPU": 1}], [{"CPU": 4, "GPU": 1 / 2}] * 3),
    ],
)
def test_shares_fit_each_node(num_peers: int, nodes: list[dict[str, float]], bundles: list[dict[str, float]]) -> None:
    """A share that is even over the whole cluster may be too large for its nodes."""
    for order in (nodes, nodes[::-1]):
        assert plan(num_peers, *order) == [pytest.approx(bundle) for bundle in bundles]


def test_only_shares_are_lowered() -> None:
    """The first peer keeps what it asks for, and the others take what fits beside it."""
    nodes = [{"CPU": 8.0}, {"CPU": 4.0}]
    assert plan(2, *nodes, num_cpus=3) == [{"CPU": 3}, {"CPU": 8}]
    assert plan(2, *nodes, num_cpus=5) == [{"CPU": 5}, {"CPU": 4}]
    # Each of the 3 GPUs has 0.4 left beside a peer that asks for 0.6: room for a third, not for a half.
    bundles = plan_on([{"CPU": 8.0, "GPU": 3.0}], [{"num_gpus": 0.6}] * 3 + [{}])
    assert [bundle["GPU"] for bundle in bundles] == [0.6] * 3 + [pytest.approx(1 / 3)]
    # A peer that needs no GPU goes to the node without.
    nodes = [{"CPU": 64.0}, {"CPU": 8.0, "GPU": 2.0}]
    assert plan(3, *nodes, num_gpus=0, num_cpus=60)[1:] == [{"CPU": 4, "GPU": 1}] * 2


@pytest.mark.parametrize(
    ("peers", "nodes", "message"),
    [
        (
            [{"num_cpus": 6}] * 3,
            [{"CPU": 10}, {"CPU": 8}],
            r"peer0, peer1, peer2: 6 CPU, a share of .*\. .* 1 x \(10 CPU\); 1 x \(8 CPU\)",
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
            r"peer0, peer1: .*, 1 A100\. .* \(8 CPU, 1 A100\)",
        ),
        (
            [{"resources": {"A100": 1}}, {"resources": {"A100": 2}}],
            [{"CPU": 8, "A100": 2}, {"CPU": 8}],
            r"peer0: .*, 1 A100; peer1: .*, 2 A100\. .* \(8 CPU, 2 A100\)",
        ),
        # The only node with GPUs has one CPU, which the first peer takes.
        ([{"num_cpus": 1}, {}], [{"CPU": 8}, {"CPU": 1, "GPU": 8}], "peer0: 1 CPU, a share"),
    ],
)
def test_what_can_never_fit_is_refused_at_once(
    peers: list[dict[str, Any]], nodes: list[dict[str, float]], message: str
) -> None:
    """Here the nodes have enough in total."""
    with pytest.raises(UserError, match=message):
        plan_on(nodes, peers)


@pytest.mark.parametrize(
    ("cpus", "nodes"),
    [([4, 3, 3], [{"CPU": 6}, {"CPU": 4}]), ([4, 4, 3, 3, 3, 3], [{"CPU": 10}, {"CPU": 10}])],
)
def test_what_fits_in_another_order_is_not_refused(cpus: list[int], nodes: list[dict[str, float]]) -> None:
    """First-fit fails here, but the bundles fit: 3 + 3 and 4; twice 4 + 3 + 3. Ray decides."""
    assert not placement.have_places([{"CPU": num_cpus} for num_cpus in cpus], nodes)
    bundles = plan_on(nodes, [{"num_cpus": num_cpus} for num_cpus in cpus])
    assert bundles == [{"CPU": num_cpus} for num_cpus in cpus]


def test_large_clusters_are_planned_quickly() -> None:
    """64 peers on 32 nodes, where no share fits."""
    config = Config.parse({"cohort": {"base": {"num_cpus": 40}, "peers": [{}] * 64}})
    nodes = [{"CPU": 192.0}] * 16 + [{"CPU": 39.0, "GPU": 4.0}] * 16
    start = time.monotonic()
    with pytest.raises(UserError, match=r"peer0, .*peer63: 40 CPU, a share of the GPUs"):
        placement.plan(config, nodes, [])
    assert time.monotonic() - start < 10


GPU_NODE = {"CPU": 48.0, "GPU": 4.0, "memory": 1e11}
HEAD = {"CPU": 0.0, placement.HEAD: 1.0}


@pytest.mark.parametrize(
    ("num_peers", "alive", "growth", "bundle"),
    [
        (3, [HEAD], [GPU_NODE] * 4, {"CPU": 16, "GPU": 1}),  # one node serves
        (4, [HEAD, GPU_NODE], [GPU_NODE] * 4, {"CPU": 12, "GPU": 1}),  # the node alive serves
        (6, [HEAD, GPU_NODE], [GPU_NODE] * 4, {"CPU": 16, "GPU": 1}),  # one more
        (3, [HEAD], [{"CPU": 2.0}] * 3, {"CPU": 1}),  # no GPUs anywhere
        (6, [HEAD], [GPU_NODE], {"CPU": 8, "GPU": 1 / 2}),  # no more nodes can come
        (5, [HEAD, GPU_NODE], [GPU_NODE], {"CPU": 9, "GPU": 1 / 2}),  # the one worker is alive
        (2, [HEAD | {"CPU": 64.0}], [GPU_NODE] * 4, {"CPU": 24, "GPU": 1}),  # not the head's CPUs
    ],
)
def test_a_cluster_that_can_grow_is_planned_with_new_nodes(
    num_peers: int,
    alive: list[dict[str, float]],
    growth: list[dict[str, float]],
    bundle: dict[str, float],
) -> None:
    """As few as give every peer a GPU, or a CPU where no node has GPUs."""
    config = Config.parse({"cohort": {"peers": [{}] * num_peers}})
    bundles = placement.plan(config, alive, placement.left_to_grow(alive, growth))
    assert bundles == [pytest.approx(bundle)] * num_peers


def write_cluster_file(home: Path, max_workers: int, **types: dict[str, Any]) -> Path:
    """The file that `ray up` leaves on the head."""
    file = home / placement.BOOTSTRAP_FILE
    cluster = {"max_workers": max_workers, "head_node_type": "head"}
    file.write_text(yaml.safe_dump({**cluster, "available_node_types": {"head": {}, **types}}))
    return file


GPU_TYPE = {"resources": {"CPU": 48, "GPU": 4}}


def test_only_the_head_knows_what_may_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers alive are subtracted. A file on a worker says nothing about this cluster."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_cluster_file(tmp_path, 2, gpu=GPU_TYPE)
    gone = {"NodeID": "gone", "Alive": False, "Resources": {}}
    head = {"NodeID": "head", "Alive": True, "Resources": HEAD}
    worker = {"NodeID": "worker", "Alive": True, "Resources": {"CPU": 48.0, "GPU": 4.0}}
    rows = [head, worker, gone]
    alive = [HEAD, worker["Resources"]]
    assert placement.cluster_nodes(rows, "worker") == (alive, [])
    assert placement.cluster_nodes(rows, "head") == (alive, [worker["Resources"]])


def test_what_the_cluster_file_allows(tmp_path: Path) -> None:
    """The workers of all types, up to the limit for all together, without the head."""
    assert placement.growth_of(tmp_path / placement.BOOTSTRAP_FILE) == []
    large = {"resources": {"CPU": 48, "GPU": 4}, "max_workers": 2}
    small = {"resources": {"CPU": 8}, "max_workers": 5}
    file = write_cluster_file(tmp_path, 3, head={"resources": {"CPU": 4}}, small=small, large=large)
    assert placement.growth_of(file) == [{"CPU": 48, "GPU": 4}] * 2 + [{"CPU": 8}]
    file.write_text("provider: [")
    assert placement.growth_of(file) == []


def test_each_replica_has_a_gpu() -> None:
    """They are whole GPUs of one node. `replicas` alone asks for as many where there are GPUs."""
    nodes = {"CPU": 8.0, "GPU": 4.0}
    assert plan(2, nodes, num_gpus=2) == [{"CPU": 4, "GPU": 2}, {"CPU": 4, "GPU": 1}]
    assert plan(2, nodes, replicas=3) == [{"CPU": 4, "GPU": 3}, {"CPU": 4, "GPU": 1}]
    assert plan(2, {"CPU": 8.0}, replicas=3) == [{"CPU": 4}, {"CPU": 4}]
    config = Config.parse({"cohort": {"peers": [{"num_gpus": 2}, {}, {"num_gpus": 0.5}]}})
    assert [peer.num_replicas for peer in config.cohort.peers] == [2, 1, 1]
    with pytest.raises(UserError, match=r"peer0: a share of the CPUs, 2 GPU; .* 2 x \(4 CPU, 1 GPU\)"):
        plan(2, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}, num_gpus=2)
    for wrong in (
        {"num_gpus": 1.5},
        {"num_gpus": 3, "replicas": 2},
        {"num_gpus": 1, "replicas": 2},
    ):
        with pytest.raises(UserError, match="several have a GPU each"):
            Config.parse({"cohort": {"peers": [wrong, {}]}})


def labelled(labels: dict[str, str], **resources: float) -> placement.Node:
    return placement.labelled(resources, labels)


def test_other_resources_and_labels_of_a_node() -> None:
    """Resources become part of the bundle. What no node has is refused at once."""
    small, large = {"CPU": 4.0}, {"CPU": 4.0, "accelerator_type:A100": 1.0}
    asked = {"accelerator_type:A100": 0.001}
    first, second = plan(2, small, large, resources=asked)
    assert first == {"CPU": 4, **asked} and second == {"CPU": 4}
    with pytest.raises(UserError, match=r"peer0: .* 0.001 accelerator_type:A100; .* \(4 CPU\)"):
        plan(2, small, resources=asked)
    config = Config.parse({"cohort": {"peers": [{"labels": {"zone": "a"}}, {}]}})
    placement.require_labels(config, [labelled({"zone": "b"}), labelled({"zone": "a", "disk": "ssd"})])
    node = labelled({"zone": "b", "ray.io/node-id": "1"})
    with pytest.raises(UserError, match=r"no node has the labels .* of peer0 .*\(zone: b\)$"):
        placement.require_labels(config, [node])
    with pytest.raises(UserError, match=r"no node has the labels .* of peer0 .*\(zone: b\)$"):
        placement.plan(config, [node], [])


def test_a_peer_is_placed_where_its_labels_are() -> None:
    """Also where another node has more room. What cannot fit because of labels is refused."""
    h100, a100 = labelled({"gpu": "H100"}, CPU=12, GPU=4), labelled({"gpu": "A100"}, CPU=8, GPU=1)
    peers: list[dict[str, Any]] = [{"labels": {"gpu": "A100"}, "num_cpus": 8, "num_gpus": 1}]
    peers += [{"labels": {"gpu": "H100"}, "num_cpus": 4, "num_gpus": 1}] * 3
    config = Config.parse({"cohort": {"peers": peers}})
    bundles = [{"CPU": 8, "GPU": 1}, *[{"CPU": 4, "GPU": 1}] * 3]  # Ray gets the labels separately
    for nodes in ([h100, a100], [a100, h100]):
        assert placement.plan(config, nodes, []) == bundles
    assert placement.plan(config, [HEAD, h100], [a100]) == bundles
    nodes = [labelled({"zone": "a"}, CPU=8), labelled({"zone": "b"}, CPU=4)]
    in_b: dict[str, Any] = {"num_cpus": 4, "labels": {"zone": "b"}}
    both = Config.parse({"cohort": {"base": in_b, "peers": [{}] * 2}})
    with pytest.raises(UserError, match=r"peer0, peer1: 4 CPU, .*, zone: b\. .* \(4 CPU, zone: b\)"):
        placement.plan(both, nodes, [])
    # The share is of the nodes that a peer may use.
    one = Config.parse({"cohort": {"base": {"labels": {"zone": "b"}}, "peers": [{}] * 2}})
    assert placement.plan(one, nodes, []) == [{"CPU": 2}] * 2


def test_workers_of_each_set_of_labels_may_start(tmp_path: Path) -> None:
    """The limit of the file counts for each set of labels, so that large types do not hide small ones."""
    file = write_cluster_file(
        tmp_path,
        2,
        large={"resources": {"CPU": 48, "GPU": 4}, "labels": {"gpu": "H100"}},
        small={"resources": {"CPU": 8, "GPU": 1}, "labels": {"gpu": "T4"}},
    )
    large, small = labelled({"gpu": "H100"}, CPU=48, GPU=4), labelled({"gpu": "T4"}, CPU=8, GPU=1)
    growth = placement.growth_of(file)
    assert growth == [large, large, small, small]
    assert placement.left_to_grow([HEAD, {"CPU": 8.0, "GPU": 1.0}], growth) == [large, large, small]
    config = Config.parse({"cohort": {"peers": [{"labels": {"gpu": "T4"}, "num_gpus": 1}]}})
    assert placement.plan(config, [HEAD], growth) == [{"CPU": 8, "GPU": 1}]


def test_workers_that_are_alive_have_come_already() -> None:
    """Of their own type where that can be told, else there is one less of the smallest; never less than none."""
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
    with pytest.raises(UserError, match=r"no room for all peers.* 1 x \(48 CPU, 4 GPU\)\."):
        placement.plan(config, [HEAD, GPU_NODE], placement.left_to_grow([HEAD, GPU_NODE], [GPU_NODE]))


@pytest.fixture(scope="module")
def ray_with_gpus() -> Iterator[None]:
    """A private Ray of 4 CPUs and 2 GPUs that nothing uses, so that they need not exist."""
    ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.parametrize("num_peers", [3, 4])
@pytest.mark.parametrize("first", [{}, {"num_cpus": 2, "num_gpus": 1}])
def test_ray_grants_the_plan(ray_with_gpus: None, num_peers: int, first: dict[str, Any]) -> None:
    peers = [first, *({} for _ in range(num_peers - 1))]
    nodes, _ = placement.cluster_nodes(ray.nodes(), "")
    bundles = plan_on(nodes, peers)
    cpus, gpus = (sum(bundle[kind] for bundle in bundles) for kind in ("CPU", "GPU"))
    assert len(bundles) == num_peers and 3 <= cpus <= 4 and 1.5 <= gpus <= 2
    group = placement_group(bundles, strategy="PACK")
    ray.get(group.ready(), timeout=30)
    remove_placement_group(group)
