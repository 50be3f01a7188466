"""Images on every node of a cluster, before a run needs them."""

from __future__ import annotations

from collections.abc import Iterator

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_dmml.config.code import Files, use_code
from ray_dmml.config.schema import DataConfig
from ray_dmml.data.datasets import prepare
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.failures import cause_of


def prepare_everywhere(config: DataConfig, code: Files | None = None) -> Iterator[tuple[str, str | UserError]]:
    """Runs :func:`prepare` on each node of the session's cluster, one task a node, all at once. Yields the address of
    each node that is done, and the result or the reason why it failed. ``code``: the files of the setting `code`."""
    addresses = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(_prepare).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
            addresses[task.remote(config, code or {})] = str(node["NodeManagerAddress"])
    waiting = list(addresses)
    while waiting:
        (done,), waiting = ray.wait(waiting)
        try:
            yield addresses[done], ray.get(done)
        except RayTaskError as error:
            cause = cause_of(error)
            if not isinstance(cause, UserError):
                raise
            yield addresses[done], cause
        except RayError:
            yield addresses[done], UserError("the node was lost")


def _prepare(config: DataConfig, code: Files) -> str:
    use_code(code)
    return prepare(config)
