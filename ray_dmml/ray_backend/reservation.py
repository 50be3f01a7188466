"""Places for the peers of a cohort on the nodes of a Ray session."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.placement import cluster_nodes, plan, shown


class Reservation:
    """A placement group with one bundle a peer.

    A trial of a search runs in a group whose last bundles are the peers'; that group is used. Otherwise a new
    group is made, and the autoscaler may start nodes for it.

    Args:
        config: the experiment.

    Raises:
        UserError: the cluster does not have what the peers ask for, or did not grant it in time.
    """

    def __init__(self, config: Config) -> None:
        self._peers = config.cohort.peers
        self._own_group: PlacementGroup | None = None
        given = get_current_placement_group()
        if given is not None and len(given.bundle_specs) >= len(self._peers):
            self._group: PlacementGroup = given
            self.bundles: list[dict[str, float]] = given.bundle_specs[-len(self._peers) :]
            """Resources of each peer, in peer order."""
        else:
            self._reserve(config)

    def options(self, position: int) -> dict[str, Any]:
        """Ray's options for the actor of a peer, and for those of its replicas."""
        bundle = self.bundles[position]
        num_replicas = self._peers[position].num_replicas
        first = len(self._group.bundle_specs) - len(self.bundles)
        return {
            "num_cpus": bundle["CPU"] / num_replicas,
            "num_gpus": bundle.get("GPU", 0) / num_replicas,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=first + position
            ),
        }

    def release(self) -> None:
        """Gives a group of its own back. A second call does nothing."""
        if self._own_group is not None:
            remove_placement_group(self._own_group)
            self._own_group = None

    def _reserve(self, config: Config) -> None:
        alive, growth = cluster_nodes(ray.nodes(), ray.get_runtime_context().get_node_id())
        self.bundles = plan(config, alive, growth)
        self._group = self._own_group = placement_group(
            self.bundles,
            strategy=config.cohort.placement_strategy.upper(),
            bundle_label_selector=[dict(peer.labels) for peer in config.cohort.peers],
        )
        try:
            ray.get(self._group.ready(), timeout=config.cohort.placement_timeout_s)
        except GetTimeoutError:
            self.release()
            may_grow = f" and may grow by {shown(growth)}" if growth else ""
            raise UserError(
                f"the cluster did not grant {self.bundles} within "
                f"{config.cohort.placement_timeout_s:g} s (cohort.placement_timeout_s): "
                f"it has {shown([ray.cluster_resources()])}{may_grow}; "
                f"{shown([ray.available_resources()])} are free"
            ) from None
