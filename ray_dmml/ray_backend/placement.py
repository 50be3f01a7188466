"""CPUs and GPUs of each peer's actor, computed from the config and the nodes of a cluster.

A peer gets what it asks for, and the others share the rest evenly. Ray's placement group chooses the nodes; this
module refuses at once what they can never hold. A cluster of `ray up` may have no node for peers yet: the plan then
counts on workers that the placement group makes its autoscaler start.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.cores import num_threads, num_view_workers
from ray_dmml.errors import UserError

BOOTSTRAP_FILE = "ray_bootstrap_config.yaml"  # the cluster file, which `ray up` writes to the head's home folder
HEAD = "node:__internal_head__"  # a resource that Ray gives to the head only

Node = Mapping[str, float]
"""Resources, such as ``{"CPU": 8, "GPU": 1}``, and labels as in :func:`labelled`."""

_LABEL = "label:"
_TOLERANCE = 1e-6


def labelled(resources: Node, labels: Mapping[str, str] | None, amount: float = math.inf) -> Node:
    """A node with its labels as resources that never run out: ``{"label:zone: a": inf}``."""
    return {**resources, **{f"{_LABEL}{key}: {at}": amount for key, at in (labels or {}).items()}}


def with_labels(asked: Node, peer: PeerConfig) -> Node:
    """A bundle that needs a node with the peer's labels. Not for Ray, which takes labels separately."""
    return labelled(asked, peer.labels, 0.0)


def bundle(peer: PeerConfig, cpus: float, gpus: float) -> dict[str, float]:
    """The bundle of a peer for Ray, which rejects bundles with 0 GPUs."""
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {}), **peer.resources}


def num_workers_of(peer: PeerConfig, bundle: Node) -> int:
    """Number of view workers of a peer."""
    return num_view_workers(peer.num_workers, bundle["CPU"], on_gpu=bool(bundle.get("GPU")))


def threads_of(peer: PeerConfig, bundle: Node) -> int:
    """torch threads of each process of the peer. Its replicas share its CPUs, and the workers of the first one."""
    num_workers = num_workers_of(peer, bundle) / peer.num_replicas
    return num_threads(bundle["CPU"] / peer.num_replicas, num_workers, on_gpu=bool(bundle.get("GPU")))


def shown(nodes: Sequence[Node]) -> str:
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{cpus:g} CPUs and {gpus:g} GPUs"


def cluster_nodes(rows: Sequence[Mapping[str, Any]], here: str) -> tuple[list[Node], list[Node]]:
    """The nodes of a cluster (``ray.nodes()``), and the workers that its autoscaler may still start. Only the
    head knows these; ``here`` is the ID of this process's node."""
    rows = [row for row in rows if row["Alive"]]
    nodes = [labelled(row["Resources"], row.get("Labels")) for row in rows]
    is_on_head = any(row["NodeID"] == here and HEAD in row["Resources"] for row in rows)
    growth = growth_of(Path(os.path.expanduser("~"), BOOTSTRAP_FILE)) if is_on_head else []
    return nodes, left_to_grow(nodes, growth)


def growth_of(bootstrap: Path) -> list[Node]:
    """The workers that a cluster file allows, the largest first; none if there is no valid file.

    The file limits the number of all workers together. The list has that many for each set of labels, since
    a peer that needs one label has no use for workers with another.
    """
    try:
        cluster = yaml.safe_load(bootstrap.read_text(encoding="utf-8"))
        limit, types = int(cluster["max_workers"]), dict(cluster["available_node_types"])
        del types[cluster["head_node_type"]]
        workers = [
            labelled({kind: float(n) for kind, n in each["resources"].items()}, each.get("labels"))
            for each in types.values()
            for _ in range(each.get("max_workers", limit))
        ]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return []
    workers.sort(key=_size, reverse=True)
    labels = [{kind for kind in worker if kind.startswith(_LABEL)} for worker in workers]
    return [worker for n, worker in enumerate(workers) if labels[:n].count(labels[n]) < limit]


def left_to_grow(alive: Sequence[Node], growth: Sequence[Node]) -> list[Node]:
    """The workers that may still start, the largest first. Each worker alive takes the place of one with its
    resources, or else of the smallest. Memory does not count, since each node measures its own."""
    left = sorted(growth, key=_size, reverse=True)
    for worker in [node for node in alive if HEAD not in node][: len(left)]:
        own = [{k: n for k, n in w.items() if 0 < n < math.inf and "memory" not in k} for w in left]
        left.pop(next((n for n, has in enumerate(own) if has and has.items() <= worker.items()), -1))
    return left


def plan(config: Config, alive: Sequence[Node], growth: Sequence[Node]) -> list[dict[str, float]]:
    """CPUs and GPUs of each peer's actor: as configured, or an even share of the rest. Nodes are not one big machine,
    so the share is lowered until the peers fit the nodes one by one.

    Of the workers that may start (``growth``), the plan uses as few as give each peer a GPU, or a CPU if none of them
    has GPUs.

    Raises:
        UserError: the peers ask for more than all of these nodes can hold.
    """
    require_labels(config, [*alive, *growth])
    nodes, peers = list(alive), config.cohort.peers
    has_gpus = any(node.get("GPU") for node in [*alive, *growth])
    # None: a share. Each replica needs a GPU of its own where there are any.
    gpus_asked = [
        p.num_replicas if p.num_gpus is None and p.num_replicas > 1 and has_gpus else p.num_gpus for p in peers
    ]

    def bundles(cpus: float, gpus: float) -> list[dict[str, float]]:
        asked = zip(peers, gpus_asked, strict=True)
        return [bundle(p, p.num_cpus or cpus, gpus if g is None else g) for p, g in asked]

    def fits(cpus: float, gpus: float) -> bool:
        return have_places(list(map(with_labels, bundles(cpus, gpus), peers)), nodes)

    one_gpu = float(any(node.get("GPU") for node in growth))
    for worker in growth:
        if fits(1.0, one_gpu):
            break
        nodes.append(worker)
    cpu_shares = list(lowered(_share([p.num_cpus for p in peers], nodes, "CPU")))
    gpu_shares = list(lowered(_share(gpus_asked, nodes, "GPU")))
    gpus = next((share for share in gpu_shares if fits(cpu_shares[-1], share)), gpu_shares[-1])
    cpus = next((share for share in cpu_shares if fits(share, gpus)), cpu_shares[-1])
    if can_never_fit(list(map(with_labels, bundles(cpus, gpus), peers)), nodes):
        raise UserError(_no_room(config, gpus_asked, nodes))
    return bundles(cpus, gpus)


def _share(asked: Sequence[float | None], nodes: Sequence[Node], kind: str) -> float:
    """The amount for each peer that does not ask for one."""
    amounts, num_open = [node.get(kind, 0.0) for node in nodes], asked.count(None)
    rest = sum(amounts) - sum(amount or 0.0 for amount in asked)
    if kind == "GPU":
        # 1/2, 1/3, ... fill whole GPUs; 3 peers on 2 GPUs would not fit with 2/3 each.
        return 1 / math.ceil(num_open / int(rest)) if num_open and rest >= 1 else 0.0
    share = min(rest / max(1, num_open), max(amounts, default=0.0))
    return float(int(share)) if share > 1 else max(share, 1 / 100)


def lowered(share: float) -> Iterator[float]:
    """A share, then smaller ones to try: whole numbers, 1/2, 1/3, ... 1/100."""
    yield share
    yield from (float(number) for number in range(math.ceil(share) - 1, 0, -1))
    yield from (1 / parts for parts in range(2, 101) if 1 / parts < share)


def have_places(bundles: Sequence[Node], nodes: Sequence[Node]) -> bool:
    """Whether first-fit, the largest first, puts each bundle on a node and each part of a GPU on one GPU."""
    largest_first = sorted(nodes, key=_size, reverse=True)
    rooms = [(dict(node), [1.0] * int(node.get("GPU", 0.0))) for node in largest_first]
    return all(any(_take(asked, *room) for room in rooms) for asked in sorted(bundles, key=_size, reverse=True))


def _take(asked: Node, left: dict[str, float], gpus: list[float]) -> bool:
    """Takes a bundle from what a node has left, and from the fullest GPU for it. False: it does not fit."""
    if any(amount > left.get(kind, -1.0) + _TOLERANCE for kind, amount in asked.items()):
        return False
    gpu, free = asked.get("GPU", 0.0), sorted(gpus)
    for part in [1.0] * int(gpu) or [gpu] * (gpu > 0):
        place = next((n for n, amount in enumerate(free) if part <= amount + _TOLERANCE), None)
        if place is None:
            return False
        free[place] -= part
    gpus[:] = free
    left.update({kind: left[kind] - amount for kind, amount in asked.items()})
    return True


def can_never_fit(bundles: Sequence[Node], nodes: Sequence[Node]) -> bool:
    """Whether counting shows that the nodes cannot hold the bundles, in whatever order: of those that need the same
    kinds of resources, the total is more than nodes of these kinds have, or more are at least as large as one of
    them than copies of that one fit. First-fit is exact for copies."""
    for asked in bundles:
        alike = [other for other in bundles if asked.keys() <= other.keys()]
        able = [node for node in nodes if asked.keys() <= node.keys()]
        as_large = [other for other in alike if all(other[kind] >= asked[kind] for kind in asked)]
        if not have_places([asked] * len(as_large), able) or any(
            sum(other[kind] for other in alike) > sum(node[kind] for node in able) + _TOLERANCE for kind in asked
        ):
            return True
    return False


def _size(node: Node) -> tuple[float, int, float]:
    """GPUs first, then the number of kinds of resources and labels."""
    return node.get("GPU", 0.0), len(node), node.get("CPU", 0.0)


def require_labels(config: Config, nodes: Sequence[Node]) -> None:
    """Raises UserError if no node has the labels of some peer."""
    for number, peer in enumerate(config.cohort.peers):
        if not any(with_labels({}, peer).keys() <= node.keys() for node in nodes):
            raise UserError(
                f"no node has the labels {peer.labels} of {peer.name} (cohort.peers.{number}.labels). "
                f"Nodes: {_described(nodes)}"
            )


def _no_room(config: Config, gpus_asked: Sequence[float | None], nodes: Sequence[Node]) -> str:
    """What each peer asks for, equal ones together, and what the nodes have."""
    names: dict[str, list[str]] = {}
    for peer, gpus in zip(config.cohort.peers, gpus_asked, strict=True):
        amounts = {"CPU": peer.num_cpus, "GPU": gpus, **peer.resources}
        asks = [f"a share of the {k}s" if n is None else f"{n:g} {k}" for k, n in amounts.items()]
        asks += [f"{key}: {at}" for key, at in peer.labels.items()]
        names.setdefault(", ".join(asks), []).append(str(peer.name))
    peers = "; ".join(f"{', '.join(same)}: {asks}" for asks, same in names.items())
    return (
        f"the nodes have no room for all peers. Peers ask for: {peers}. Nodes, present or possible: "
        f"{_described(nodes)}. Ask for less (cohort.peers.*.num_cpus, num_gpus, resources, labels), and set "
        "num_gpus: 0 for peers that need no GPU"
    )


def _described(nodes: Sequence[Node]) -> str:
    hidden = ("node:", "memory", "object_store_memory", f"{_LABEL}ray.io/node-id")
    texts = Counter(
        ", ".join(
            kind.removeprefix(_LABEL) if amount == math.inf else f"{amount:g} {kind}"
            for kind, amount in node.items()
            if not kind.startswith(hidden)
        )
        for node in nodes
    )
    return "; ".join(f"{number} x ({has})" for has, number in texts.items()) or "none"
