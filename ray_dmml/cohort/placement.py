"""What each peer's actor asks of a cluster: a pure function of the config and the nodes.

A cluster of `ray up` may have no node for peers yet: it is planned with those that its autoscaler may
start, and the placement group is what makes it start them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_dmml import yamlio
from ray_dmml.config import Config, PeerConfig
from ray_dmml.errors import UserError

BOOTSTRAP_FILE = "ray_bootstrap_config.yaml"
"""What `ray up` leaves in the head's home folder: the cluster file, with what AWS says of its nodes."""

NODE_ID = "ray.io/node-id"
"""A label that Ray gives every node."""

Node = Mapping[str, float]
"""Resources of a node, such as ``{"CPU": 8, "GPU": 1}``."""


def plan(config: Config, alive: Sequence[Node], growth: Sequence[Node]) -> list[dict[str, float]]:
    """CPUs and GPUs of each peer's actor, on the nodes there are, with as few more as serve.

    Args:
        config: the experiment.
        alive: the nodes of the cluster.
        growth: the nodes it may start besides.

    Raises:
        UserError: more is asked than all of these have.
    """
    _require_kinds(config, [*alive, *growth])
    nodes = list(alive)
    for node in sorted(growth, key=_size, reverse=True):
        if _serve(config, nodes, any(node.get("GPU") for node in growth)):
            break
        nodes.append(node)
    return plan_bundles(config, nodes)


def _require_kinds(config: Config, nodes: Sequence[Node]) -> None:
    """That some node has what each peer names besides CPUs and GPUs."""
    for number, peer in enumerate(config.cohort.peers):
        for kind, amount in peer.resources.items():
            most = max((node.get(kind, 0.0) for node in nodes), default=0.0)
            if amount > most + 1e-6:
                known = sorted(
                    {kind for node in nodes for kind in node if not kind.startswith("node:")}
                )
                raise UserError(
                    f"{peer.name} asks for {amount:g} of {kind!r} (cohort.peers.{number}.resources), "
                    f"and no node has more than {most:g}; nodes have {', '.join(known)}"
                )


def require_labels(config: Config, nodes: Sequence[Mapping[str, str]]) -> None:
    """That some node has the labels of each peer.

    Args:
        nodes: the labels of every node that the cluster has or may start.

    Raises:
        UserError: none has.
    """
    for number, peer in enumerate(config.cohort.peers):
        if any(peer.labels.items() <= dict(node).items() for node in nodes):
            continue
        known = sorted({f"{key}: {node[key]}" for node in nodes for key in node if key != NODE_ID})
        raise UserError(
            f"no node has the labels {peer.labels} of {peer.name} (cohort.peers.{number}.labels); "
            f"there are {', '.join(known) or 'none'}"
        )


def labels_of_growth(bootstrap: Path) -> list[dict[str, str]]:
    """The labels of the workers that the autoscaler may start; see :func:`growth_of`."""
    return [dict(node.get("labels") or {}) for node in _worker_types(bootstrap)[0]]


def growth_of(bootstrap: Path) -> list[dict[str, float]]:
    """The workers that the autoscaler of a cluster file may start, the largest first.

    Args:
        bootstrap: the file that `ray up` leaves on the head; where it is not, nothing is known to
            grow.
    """
    types, most = _worker_types(bootstrap)
    try:
        found = [
            {kind: float(amount) for kind, amount in node["resources"].items()}
            for node in types
            for _ in range(node.get("max_workers", most))
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
    return sorted(found, key=_size, reverse=True)[:most]


def _worker_types(bootstrap: Path) -> tuple[list[dict[str, Any]], int]:
    """Those of the cluster file, and how many workers it allows at most."""
    try:
        cluster: dict[str, Any] = yamlio.load(bootstrap.read_text(encoding="utf-8"))
        types = dict(cluster["available_node_types"])
        types.pop(cluster["head_node_type"])
        return [dict(node) for node in types.values()], int(cluster["max_workers"])
    except (OSError, UnicodeDecodeError, yamlio.YAMLError, KeyError, TypeError, ValueError):
        return [], 0


def _size(node: Node) -> tuple[float, float]:
    return node.get("GPU", 0.0), node.get("CPU", 0.0)


def _serve(config: Config, nodes: Sequence[Node], gpus: bool) -> bool:
    """Whether what is asked fits, and whoever says nothing gets a GPU, or a CPU where there are none."""
    for kind, asked, default in (
        ("CPU", [peer.num_cpus for peer in config.cohort.peers], 1.0),
        ("GPU", _gpus_asked(config, gpus), 1.0 if gpus else 0.0),
    ):
        wanted = [default if part is None else part for part in asked]
        if sum(wanted) > sum(node.get(kind, 0.0) for node in nodes) + 1e-6:
            return False
        if max(wanted) > max((node.get(kind, 0.0) for node in nodes), default=0.0) + 1e-6:
            return False
    return True


def plan_bundles(config: Config, nodes: Sequence[Node]) -> list[dict[str, float]]:
    """CPUs and GPUs of each peer's actor: as configured, or an even share of what is left.

    Args:
        nodes: the resources of every node of the cluster.

    Raises:
        UserError: more is asked than the cluster, or its largest node, has.
    """
    peers = config.cohort.peers
    _require_kinds(config, nodes)
    cpus = _shares([peer.num_cpus for peer in peers], nodes, "CPU")
    has_gpus = any(node.get("GPU") for node in nodes)
    gpus = _shares(_gpus_asked(config, has_gpus), nodes, "GPU")
    return [bundle(peer, cpu, gpu) for peer, cpu, gpu in zip(peers, cpus, gpus, strict=True)]


def bundle(peer: PeerConfig, cpus: float, gpus: float) -> dict[str, float]:
    """What the node of a peer must have; Ray takes 0 of something for a mistake."""
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {}), **peer.resources}


def _gpus_asked(config: Config, has_gpus: bool) -> list[float | None]:
    """A GPU for each replica of a peer that says nothing else, where there are any."""
    return [
        float(peer.num_replicas)
        if peer.num_gpus is None and peer.num_replicas > 1 and has_gpus
        else peer.num_gpus
        for peer in config.cohort.peers
    ]


def _shares(asked: Sequence[float | None], nodes: Sequence[Node], kind: str) -> list[float]:
    """Each peer's part of one kind of resource."""
    total = sum(node.get(kind, 0.0) for node in nodes)
    largest = max((node.get(kind, 0.0) for node in nodes), default=0.0)
    given = sum(part for part in asked if part is not None)
    where = f"cohort.peers.*.num_{kind.lower()}s"
    if given > total + 1e-6:
        raise UserError(
            f"the peers ask for {given:g} {kind}s ({where}), but the cluster has {total:g}"
        )
    most = max((part for part in asked if part is not None), default=0.0)
    if most > largest + 1e-6:
        raise UserError(
            f"a peer asks for {most:g} {kind}s ({where}), but the largest node has {largest:g}"
        )
    rest, num_open = max(0.0, total - given), sum(part is None for part in asked)
    share = 0.0
    if num_open and kind == "GPU":
        # 1/2, 1/3, ... so that peers fill whole GPUs: 3 peers on 2 GPUs as 2/3 each would not fit.
        share = 1 / math.ceil(num_open / int(rest)) if rest >= 1 else 0.0
    elif num_open:
        if rest <= 0:
            raise UserError(
                f"the peers that say their {where} take all {total:g} CPUs of the cluster: "
                "leave some for the others"
            )
        share = min(rest / num_open, largest)
        share = float(int(share)) if share > 1 else share
    return [share if part is None else part for part in asked]


def shown(nodes: Sequence[Node]) -> str:
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{cpus:g} CPUs and {gpus:g} GPUs"
