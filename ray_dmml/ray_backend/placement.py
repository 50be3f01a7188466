"""What each peer's actor asks of a cluster: a pure function of the config and the nodes.

A cluster of `ray up` may have no node for peers yet: it is planned with those that its autoscaler may
start, and the placement group is what makes it start them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_dmml.config import yamlio
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.errors import UserError

BOOTSTRAP_FILE = "ray_bootstrap_config.yaml"
"""What `ray up` leaves in the head's home folder: the cluster file, with what AWS says of its nodes."""

NODE_ID = "ray.io/node-id"
"""A label that Ray gives every node."""

HEAD = "node:__internal_head__"
"""A resource that Ray gives the head alone."""

SMALLEST_PART = 100
"""An even share goes down to so small a part of a CPU or GPU, 1/100, where larger ones find no place."""

Node = Mapping[str, float]
"""Resources of a node, such as ``{"CPU": 8, "GPU": 1}``; its labels as resources without end."""

_LABEL = "label:"


def labelled(resources: Node, labels: Mapping[str, str] | None) -> Node:
    """A node with its labels, as ``{"label:zone=a": inf}`` beside what it has."""
    return {**resources, **{f"{_LABEL}{key}={at}": math.inf for key, at in (labels or {}).items()}}


def with_labels(asked: Node, peer: PeerConfig) -> Node:
    """What a peer asks for, and that its labels are there, of which it takes nothing; not for Ray, which
    is told of labels apart."""
    return {**asked, **{f"{_LABEL}{key}={at}": 0.0 for key, at in peer.labels.items()}}


def plan(config: Config, alive: Sequence[Node], growth: Sequence[Node]) -> list[dict[str, float]]:
    """CPUs and GPUs of each peer's actor, on the nodes there are, with as few more as serve.

    Args:
        config: the experiment.
        alive: the nodes of the cluster.
        growth: the workers that its file allows, those among them that are alive by now included.

    Raises:
        UserError: more is asked than all of these have, or than finds a place on them.
    """
    growth = left_to_grow(alive, growth)
    _require_kinds(config, [*alive, *growth])
    nodes = list(alive)
    for node in growth:
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
                    {k for node in nodes for k in node if not k.startswith(("node:", _LABEL))}
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


def growth_of(bootstrap: Path) -> list[Node]:
    """The workers that the autoscaler of a cluster file may start, the largest first: as many as it
    allows of each set of labels, as who asks for one has no use for others.

    Args:
        bootstrap: the file that `ray up` leaves on the head; where it is not, nothing is known to
            grow.
    """
    types, most = _worker_types(bootstrap)
    found: dict[tuple[str, ...], list[Node]] = {}
    try:
        for node_type in types:
            has = {kind: float(amount) for kind, amount in node_type["resources"].items()}
            node = labelled(has, node_type.get("labels"))
            of_labels = found.setdefault(tuple(sorted(node.keys() - has.keys())), [])
            of_labels += [node] * node_type.get("max_workers", most)
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
    kept = [
        node for each in found.values() for node in sorted(each, key=_size, reverse=True)[:most]
    ]
    return sorted(kept, key=_size, reverse=True)


def left_to_grow(alive: Sequence[Node], growth: Sequence[Node]) -> list[Node]:
    """What the autoscaler may still start, the largest first: each worker that is alive is one less, of
    its own type where its resources tell that, and of the smallest else."""
    left = sorted(growth, key=_size, reverse=True)
    for worker in (node for node in alive if HEAD not in node):
        own = [place for place, node in enumerate(left) if _is_of_type(worker, node)]
        if left:
            left.pop(own[0] if own else -1)
    return left


def _is_of_type(worker: Node, node_type: Node) -> bool:
    """Memory is measured on each node anew, and is not what the file says of its type."""
    kinds = {kind for kind in node_type if not kind.startswith(_LABEL)}
    kinds -= {"memory", "object_store_memory"}
    return bool(kinds) and all(worker.get(kind, 0.0) == node_type[kind] for kind in kinds)


def known_nodes(rows: Sequence[Mapping[str, Any]], here: str, bootstrap: Path) -> list[Node]:
    """The nodes of a cluster, and those it may start besides, which its head alone knows of.

    Args:
        rows: what ``ray.nodes()`` says.
        here: the ID of this process's node.
        bootstrap: see :func:`growth_of`.
    """
    alive = [labelled(row["Resources"], row.get("Labels")) for row in rows if row["Alive"]]
    heads = [row["NodeID"] for row in rows if row["Alive"] and HEAD in row["Resources"]]
    growth = growth_of(bootstrap) if here in heads else []
    return [*alive, *left_to_grow(alive, growth)]


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
    asked = zip(config.cohort.peers, _gpus_asked(config, gpus), strict=True)
    default = 1.0 if gpus else 0.0
    wanted = [
        with_labels(bundle(peer, peer.num_cpus or 1.0, _or(gpu, default)), peer)
        for peer, gpu in asked
    ]
    return have_places(wanted, nodes, config.cohort.placement_strategy)


def _or(asked: float | None, share: float) -> float:
    return share if asked is None else asked


def plan_bundles(config: Config, nodes: Sequence[Node]) -> list[dict[str, float]]:
    """CPUs and GPUs of each peer's actor: as configured, or an even share of what is left.

    Nodes are not one big machine: a share that finds no place on them is lowered until all do. What a
    peer says itself stays.

    Args:
        nodes: the resources of every node of the cluster.

    Raises:
        UserError: more is asked than the cluster, or its largest node, has, or than finds a place.
    """
    peers = config.cohort.peers
    _require_kinds(config, nodes)
    asked_cpus = [peer.num_cpus for peer in peers]
    asked_gpus = _gpus_asked(config, any(node.get("GPU") for node in nodes))
    most_cpus, most_gpus = _share(asked_cpus, nodes, "CPU"), _share(asked_gpus, nodes, "GPU")

    def bundles(cpus: float, gpus: float) -> list[dict[str, float]]:
        asked = zip(peers, asked_cpus, asked_gpus, strict=True)
        return [bundle(peer, _or(cpu, cpus), _or(gpu, gpus)) for peer, cpu, gpu in asked]

    def fits(cpus: float, gpus: float) -> bool:
        wanted = map(with_labels, bundles(cpus, gpus), peers)
        return have_places(list(wanted), nodes, config.cohort.placement_strategy)

    cpu_shares = list(lowered(most_cpus))
    for gpus in lowered(most_gpus):
        # The last is the smallest: where that has no place, none between them is likely to.
        if fits(cpu_shares[0], gpus) or fits(cpu_shares[-1], gpus):
            return bundles(next(cpus for cpus in cpu_shares if fits(cpus, gpus)), gpus)
    raise UserError(_no_place(config, asked_gpus, most_gpus, nodes))


def lowered(share: float) -> Iterator[float]:
    """A share, and what may be tried in its place: whole numbers below it, then 1/2, 1/3, ..."""
    yield share
    yield from (float(number) for number in range(math.ceil(share) - 1, 0, -1))
    yield from (1 / parts for parts in range(2, SMALLEST_PART + 1) if 1 / parts < share)


class _Room:
    """What a node has left while bundles are given their places."""

    def __init__(self, node: Node) -> None:
        self._left = dict(node)
        self._gpus = [1.0] * int(node.get("GPU", 0.0))
        self.is_real = True
        """Each GPU has what was taken of it: Ray adds a node's GPUs up when it chooses, and the node
        refuses a third part of 0.6 of two GPUs, again and again."""

    def spare(self, asked: Node) -> float:
        """How much would be left of each kind, as parts of 1 and added up, which is how Ray chooses;
        -1: it does not fit."""
        left = {kind: self._left.get(kind, 0.0) for kind in asked}
        if any(left[kind] <= 0 or amount > left[kind] + 1e-6 for kind, amount in asked.items()):
            return -1.0
        return sum(max(0.0, 1 - amount / left[kind]) for kind, amount in asked.items())

    def take(self, asked: Node) -> bool:
        """False: it does not fit."""
        if self.spare(asked) < 0:
            return False
        for kind, amount in asked.items():
            self._left[kind] -= amount
        if gpus := asked.get("GPU", 0.0):
            self._take_gpus(gpus)
        return True

    def _take_gpus(self, amount: float) -> None:
        """Whole ones, or a part of the fullest that has it."""
        for part in [1.0] * int(amount) or [amount]:
            self._gpus.sort()
            place = next((n for n, free in enumerate(self._gpus) if part <= free + 1e-6), None)
            if place is None:
                self.is_real = False
            else:
                self._gpus[place] -= part


def have_places(bundles: Sequence[Node], nodes: Sequence[Node], placement: str) -> bool:
    """Whether Ray finds each bundle a node, looking as its placement groups do.

    That is greedy, and may fail where another order would not, but so it would in earnest: those of
    GPUs come first, then the larger ones, each to the node with most left; `pack` fills that node before
    it looks at the next, `spread` at first gives a node one bundle only.
    """
    kinds = sorted({kind for each in bundles for kind in each} - {"CPU", "GPU"})
    order = ["GPU", *kinds, "CPU"]
    waiting = sorted(bundles, key=lambda each: [-each.get(kind, 0.0) for kind in order])
    fresh, used = [_Room(node) for node in nodes], list[_Room]()
    while waiting:
        asked = waiting.pop(0)
        rooms = [room for room in fresh if room.spare(asked) >= 0]
        rooms = rooms or [room for room in used if room.spare(asked) >= 0]
        if not rooms:
            return False
        best = max(rooms, key=lambda room: room.spare(asked))
        best.take(asked)
        if best in fresh:
            fresh.remove(best)
            used.append(best)
        if placement == "pack":
            waiting = [other for other in waiting if not best.take(other)]
    return all(room.is_real for room in used)


def _no_place(
    config: Config, asked_gpus: Sequence[float | None], gpus: float, nodes: Sequence[Node]
) -> str:
    """What each peer asks for, and what the nodes have; equals are told once."""
    peers: dict[str, list[str]] = {}
    for peer, asked in zip(config.cohort.peers, asked_gpus, strict=True):
        cpu = "a share of the CPUs" if peer.num_cpus is None else f"{peer.num_cpus:g} CPU"
        gpu = "a share of the GPUs" if asked is None and gpus else f"{_or(asked, 0.0):g} GPU"
        rest = [f"{amount:g} {kind}" for kind, amount in peer.resources.items()]
        labels = [f"{key}: {at}" for key, at in peer.labels.items()]
        peers.setdefault(", ".join([cpu, gpu, *rest, *labels]), []).append(str(peer.name))
    others = {kind for peer in config.cohort.peers for kind in peer.resources}
    kinds = ["CPU", "GPU", *sorted(others)]
    known = Counter(
        ", ".join(
            [f"{node.get(kind, 0.0):g} {kind}" for kind in kinds] + _asked_labels(config, node)
        )
        for node in nodes
    )
    return (
        "not every peer finds a place on a node, the largest placed first: "
        + "; ".join(f"{_names(names)}: {asks}" for asks, names in peers.items())
        + ". There are, or may come, "
        + "; ".join(f"{number} x ({has})" for has, number in known.items())
        + ". Ask for less, and for num_gpus: 0 where none is needed (cohort.peers.*.num_cpus, num_gpus, "
        "resources, labels)"
    )


def _asked_labels(config: Config, node: Node) -> list[str]:
    """Those of a node that a peer asks for."""
    asked = {item for peer in config.cohort.peers for item in peer.labels.items()}
    return sorted(f"{key}: {at}" for key, at in asked if f"{_LABEL}{key}={at}" in node)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} and {len(names) - 1} others"


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


def _share(asked: Sequence[float | None], nodes: Sequence[Node], kind: str) -> float:
    """The part of one kind of resource that a peer gets which does not say how much."""
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
    if not num_open:
        return 0.0
    if kind == "GPU":
        # 1/2, 1/3, ... so that peers fill whole GPUs: 3 peers on 2 GPUs as 2/3 each would not fit.
        return 1 / math.ceil(num_open / int(rest)) if rest >= 1 else 0.0
    if rest <= 0:
        raise UserError(
            f"the peers that say their {where} take all {total:g} CPUs of the cluster: "
            "leave some for the others"
        )
    share = min(rest / num_open, largest)
    return float(int(share)) if share > 1 else share


def shown(nodes: Sequence[Node]) -> str:
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{cpus:g} CPUs and {gpus:g} GPUs"
