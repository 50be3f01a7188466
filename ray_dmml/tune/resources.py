"""The resources of one trial: a placement group with a bundle for its process and one for each peer."""

from __future__ import annotations

import os
from collections.abc import Sequence

import ray
from ray import tune

from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.placement import (
    Node,
    bundle,
    cluster_nodes,
    have_places,
    lowered,
    require_labels,
    shown,
    with_labels,
)
from ray_dmml.ray_backend.session import only_at
from ray_dmml.tune.search_space import Search


def known_nodes() -> list[Node]:
    """The nodes of the cluster, and those that its autoscaler may start."""
    alive, growth = cluster_nodes(ray.nodes(), ray.get_runtime_context().get_node_id())
    return [*alive, *growth]


def trial_resources(config: Config, nodes: Sequence[Node], gpus_per_trial: float | None) -> tune.PlacementGroupFactory:
    """The bundles of a trial. The first one is for the trial's own process, which computes next to nothing and runs
    on this node, because the files of the search are here.

    Args:
        config: of the trial.
        nodes: as :func:`known_nodes` returns them.
        gpus_per_trial: GPUs that the peers of a trial share; None: one, if there is any.

    Raises:
        UserError: no CPUs or GPUs are known.
    """
    peers = config.cohort.peers
    gpus = min(1.0, _total(nodes, "GPU")) if gpus_per_trial is None else gpus_per_trial
    # A peer gets whole GPUs or a part of one: Ray cannot give it one GPU and a half, or parts of two.
    share = gpus / len(peers)
    share = float(int(share)) if share >= 1 else 1 / -(-len(peers) // gpus) if gpus > 1 else share

    def bundles(cpus: float) -> list[dict[str, float]]:
        return [bundle(peer, peer.num_cpus or cpus, _peer_gpus(peer, share)) for peer in peers]

    own = only_at(ray.get_runtime_context().get_node_id())
    cpus = 0.0 if all(peer.num_cpus for peer in peers) else _peer_cpus(nodes, gpus, len(peers))
    for fewer in lowered(cpus):
        if have_places([own, *map(with_labels, bundles(fewer), peers)], nodes):
            cpus = fewer
            break
    # Bundles that fit on no known node may fit on nodes that are not known yet.
    labels = [{}, *(dict(peer.labels) for peer in peers)]
    return tune.PlacementGroupFactory([own, *bundles(cpus)], bundle_label_selector=labels)


def require_resources(search: Search, nodes: Sequence[Node], gpus_per_trial: float | None = None) -> None:
    """Checks every kind of trial. Ray would wait without end for what a trial lacks.

    A cluster (RAY_ADDRESS) may grow by nodes that are not known here, so only a private Ray is checked.

    Raises:
        UserError: a trial needs more resources, or other labels, than there are.
    """
    for config in search.config_variants():
        trial = trial_resources(config, nodes, gpus_per_trial)
        if not os.environ.get("RAY_ADDRESS"):
            require_labels(config, nodes)
            require_room(trial, nodes)


def require_room(trial: tune.PlacementGroupFactory, nodes: Sequence[Node]) -> None:
    """Raises UserError if the bundles of a trial do not fit on the nodes."""
    settings = "--gpus-per-trial, cohort.peers.*.num_cpus and num_gpus"
    for kind, needed in trial.required_resources.items():
        if needed > (available := _total(nodes, kind)) + 1e-6:
            raise UserError(f"a trial needs {needed:g} {kind}s ({settings}) and this machine has {available:g}")
    if not have_places(trial.bundles, nodes):
        peers = {" and ".join(f"{amount:g} {kind}" for kind, amount in peer.items()) for peer in trial.bundles[1:]}
        raise UserError(
            f"the peers of a trial do not fit on this machine, which has {shown(nodes)}: each of them needs "
            f"{', '.join(sorted(peers))}, and a fraction of a GPU must come from one GPU ({settings})"
        )


def _total(nodes: Sequence[Node], kind: str) -> float:
    return sum(node.get(kind, 0.0) for node in nodes)


def _peer_gpus(peer: PeerConfig, share: float) -> float:
    if peer.num_gpus is not None:
        return peer.num_gpus
    if peer.num_replicas > 1:  # Each replica needs a GPU of its own, because NCCL does not share one.
        return float(peer.num_replicas) if share else 0.0
    return min(share, 1.0)


def _peer_cpus(nodes: Sequence[Node], gpus: float, num_peers: int) -> float:
    """CPUs of a peer: an even share of one CPU, or of the CPUs that go with the trial's GPUs."""
    cpus = _total(nodes, "CPU")
    if not cpus and not gpus:
        raise UserError(
            "the cluster has no CPUs and no GPUs, and the nodes that it may start are not known: say what a "
            "trial needs (--gpus-per-trial, or cohort.base.num_gpus and num_cpus)"
        )
    cpu = min(1.0, cpus / num_peers) if cpus else 1.0
    # Only CPUs beside a GPU count: peers that have a GPU cannot use those of other nodes.
    per_gpu = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU")]
    return max(cpu, min(per_gpu) * gpus // num_peers) if per_gpu and gpus else cpu
