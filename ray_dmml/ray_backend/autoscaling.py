"""Spot nodes first, on-demand nodes where there are none: a hook for Ray's autoscaler.

Ray 2.60 asks again and again for a type of node that failed to start. Its hook for the choice of a type
(``RAY_AUTOSCALER_UTILIZATION_SCORER``, set in cluster.yaml) receives the types that failed of late.
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
    """Ray's own score of a type of node for a demand. Of equal ones, a type named ``...spot`` wins.

    Args:
        node_resources: the resources of a node of this type.
        resources: the demand, the resources of each bundle.
        node_type: its name in the cluster file.
        node_availability_summary: the types that could be started or not at the last try.

    Returns:
        The score, where larger is better. None: the type is of no use, or failed to start of late.
    """
    last_try = node_availability_summary.node_availabilities.get(node_type)
    if last_try is not None and not last_try.is_available:
        return None
    score = _resource_based_utilization_scorer(
        node_resources, resources, node_availability_summary=node_availability_summary
    )
    return None if score is None else (*score, node_type.endswith("spot"))
