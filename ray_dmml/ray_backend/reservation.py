"""Places for the peers of a cohort on the nodes of a Ray session."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import get_current_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.placement import cluster_nodes, plan, shown

NOTICE_S = 30.0
"""Seconds between two lines while a run waits."""

logger = logging.getLogger(__name__)


class Reservation:
    """A placement group with one bundle a peer; ``bundles`` are the resources of each peer in peer order.

    In a trial of a search, these are the last bundles of the trial's group. Otherwise the class makes a new group, and
    the autoscaler may start nodes for it.

    Raises:
        UserError: the cluster does not have what the peers ask for, or did not grant it in time.
    """

    def __init__(self, config: Config) -> None:
        self._peers = config.cohort.peers
        given: Any = get_current_placement_group()
        self._is_own = given is None or len(given.bundle_specs) < len(self._peers)
        self._group, bundles = _reserve(config) if self._is_own else (given, given.bundle_specs)
        self.bundles = bundles[-len(self._peers) :]

    def options(self, position: int) -> dict[str, Any]:
        """Ray's options for the actor of a peer, and for those of its replicas."""
        bundle, num_replicas = self.bundles[position], self._peers[position].num_replicas
        index = self._index(position)
        return {
            "num_cpus": bundle["CPU"] / num_replicas,
            "num_gpus": bundle.get("GPU", 0) / num_replicas,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index),
        }

    def place(self, position: int) -> tuple[str, int] | None:
        """The group and the bundle of a peer, if the next run of this process may have the same; None if the group ends
        with this run."""
        return None if self._is_own else (self._group.id.hex(), self._index(position))

    def _index(self, position: int) -> int:
        return len(self._group.bundle_specs) - len(self.bundles) + position

    def release(self) -> None:
        """Gives a group of its own back. A second call does nothing."""
        if self._is_own:
            remove_placement_group(self._group)
            self._is_own = False


def _reserve(config: Config) -> tuple[Any, list[dict[str, float]]]:
    cohort = config.cohort
    alive, growth = cluster_nodes(ray.nodes(), ray.get_runtime_context().get_node_id())
    if not alive:
        raise UserError("the Ray cluster has ended: none of its nodes is alive")
    bundles = plan(config, alive, growth)
    labels = [dict(peer.labels) for peer in cohort.peers]
    group = placement_group(bundles, strategy=cohort.placement_strategy.upper(), bundle_label_selector=labels)
    may_grow = f" and may grow by {shown(growth)}" if growth else ""
    try:
        for waited in _wait(group.ready(), cohort.placement_timeout_s):
            has = f"the cluster has {shown([ray.cluster_resources()])}{may_grow}"
            free = f"{shown([ray.available_resources()])} are free"
            logger.info("waiting for room for %s: after %.0f s, %s, and %s", bundles, waited, has, free)
    except GetTimeoutError:
        free = f"{shown([ray.available_resources()])} are free"
        remove_placement_group(group)
        raise UserError(
            f"the cluster did not grant {bundles} within {cohort.placement_timeout_s:g} s "
            f"(cohort.placement_timeout_s): it has {shown([ray.cluster_resources()])}{may_grow}; {free}"
        ) from None
    except RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the cluster has ended while this run waited for room in it: {reason}") from error
    except BaseException:  # such as Ctrl-C: a group that waits would make the cluster grow
        remove_placement_group(group)
        raise
    return group, bundles


def _wait(ref: Any, timeout_s: float) -> Iterator[float]:
    """Waits for a result, and yields the seconds waited every NOTICE_S. Raises GetTimeoutError after ``timeout_s``."""
    began = time.monotonic()
    while True:
        waited = time.monotonic() - began
        try:
            ray.get(ref, timeout=min(NOTICE_S, max(0.0, timeout_s - waited)))
            return
        except GetTimeoutError:
            waited = time.monotonic() - began
            if waited >= timeout_s:
                raise
        yield waited
