"""Spot nodes first, on-demand nodes where there are none: a hook for Ray's autoscaler.

Ray 2.60 asks again and again for a type of node that failed to start. Its hook for the choice of a type
(``RAY_AUTOSCALER_UTILIZATION_SCORER``, set in cluster.yaml) receives the types that failed recently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _resource_based_utilization_scorer


def spot_first(
    node_resources: Mapping[str, float],
    resources: Sequence[Mapping[str, float]],
    node_type: str,
    *,
    node_availability_summary: NodeAvailabilitySummary,
) -> tuple[object, ...] | None:
    """Ray's own score of a type of node for the bundles of a demand: larger is better. Of equal ones, a type named
    ``...spot`` wins. None: the type is of no use, or failed to start recently."""
    last_try = node_availability_summary.node_availabilities.get(node_type)
    if last_try is not None and not last_try.is_available:
        return None
    score = _resource_based_utilization_scorer(
        node_resources, resources, node_availability_summary=node_availability_summary
    )
    return None if score is None else (*score, node_type.endswith("spot"))
