"""Spot nodes first, others where there are none: what Ray's autoscaler asks us on a cluster of `ray up`.

Ray 2.60 asks for the type of node that failed to start again and again. It has a hook for the choice
(``RAY_AUTOSCALER_UTILIZATION_SCORER``, which cluster.yaml sets), and knows which types it could not get.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _resource_based_utilization_scorer

Score = tuple[object, ...]


def spot_first(
    node_resources: Mapping[str, float],
    resources: Sequence[Mapping[str, float]],
    node_type: str,
    *,
    node_availability_summary: NodeAvailabilitySummary,
) -> Score | None:
    """How well a type of node serves a demand: as Ray has it, and among equals one whose name ends in
    ``spot`` is the best.

    Args:
        node_resources: what a node of this type has.
        resources: the demand, resources of each bundle.
        node_type: its name in the cluster file.
        node_availability_summary: which types could be had at the last try.

    Returns:
        larger is better; None: not this one, as it serves nothing or could not be had of late.
    """
    tried = node_availability_summary.node_availabilities.get(node_type)
    if tried is not None and not tried.is_available:
        return None
    score = _resource_based_utilization_scorer(
        node_resources, resources, node_availability_summary=node_availability_summary
    )
    return None if score is None else (*score, node_type.endswith("spot"))
