"""The images on every node of a cluster, before a run asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.datasets import prepare
from ray_dmml.errors import UserError


def prepare_everywhere(config: DataConfig) -> Iterator[tuple[str, str | UserError]]:
    """What :func:`prepare` says on each node of the session's cluster, as they end; all work at once.

    Yields:
        the node's address, and what it said or why it failed.
    """
    refs = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(prepare).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
            refs[task.remote(config)] = str(node["NodeManagerAddress"])
    waiting = list(refs)
    while waiting:
        (ended,), waiting = ray.wait(waiting)
        try:
            yield refs[ended], ray.get(ended)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(error, RayTaskError) and not isinstance(cause, UserError):
                raise
            yield refs[ended], cause if isinstance(cause, UserError) else UserError("it was lost")
