"""Notices, while the driver waits, which peer is silent or hangs and which node is gone."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import ray

from ray_dmml.config.schema import FailureConfig
from ray_dmml.errors import PeerLostError
from ray_dmml.ray_backend.coordinator import PeerStatus

LONGEST_CHECK_INTERVAL_S = 6.0
"""If more time passes between two checks, the driver itself was stopped. A check may take RayCohort.grace_s."""


class FailureDetector:
    """Checks the peers that the driver waits for.

    Args:
        patience: seconds that a living peer may go without progress.
        config: the timeouts.
        node_of: name of each peer to the ID of its node.
    """

    def __init__(self, patience: float, config: FailureConfig, node_of: Mapping[str, str]) -> None:
        self._patience, self._config, self._node_of = patience, config, node_of
        self._progress: dict[str, tuple[tuple[int, int], float]] = {}
        # The detector has a clock of its own: while the driver is stopped, nobody is silent.
        self._now = self._coordinator_answered_at = self._nodes_checked_at = 0.0
        self._last_check = time.monotonic()

    def check(self, waiting: Collection[str], statuses: Mapping[str, PeerStatus], *, now: float | None = None) -> None:
        """Raises PeerLostError if one of the peers that the driver waits for, the coordinator or a node is lost.
        ``statuses`` is empty if the coordinator does not answer; ``now`` is a time of ``time.monotonic``."""
        now = time.monotonic() if now is None else now
        elapsed, self._last_check = now - self._last_check, now
        self._now += min(elapsed, LONGEST_CHECK_INTERVAL_S)
        timeout = self._config.heartbeat_timeout_s
        if not statuses:
            if self._now - self._coordinator_answered_at > timeout:
                raise PeerLostError(f"the coordinator gave no answer for {timeout:.0f} s")
            return
        self._coordinator_answered_at = self._now
        silent = tuple(name for name in waiting if statuses[name].silent_s > timeout)
        if silent:
            raise PeerLostError(f"{', '.join(silent)}: no sign of life for {timeout:.0f} s", stuck=silent)
        self._check_progress(waiting, statuses)
        if self._now - self._nodes_checked_at > self._config.node_timeout_s / 3:
            self._check_nodes(waiting)
            self._nodes_checked_at = self._now

    def _check_progress(self, waiting: Collection[str], statuses: Mapping[str, PeerStatus]) -> None:
        """A living peer that hangs keeps the others waiting."""
        for name in waiting:
            progress = (statuses[name].num_sent, statuses[name].num_chunks)
            if name not in self._progress or self._progress[name][0] != progress:
                self._progress[name] = (progress, self._now)
        longest = self._now - min(self._progress[name][1] for name in waiting)
        # A peer that sent no heartbeat for 3 s may be stopped; soon it is known whether it is.
        is_any_late = any(statuses[name].silent_s > 3 for name in waiting)
        if longest <= self._patience or is_any_late:
            return
        least = min(statuses[name].num_sent for name in waiting)
        suspects = tuple(name for name in waiting if statuses[name].num_sent == least)
        known = {"stuck" if len(suspects) == 1 else "suspects": suspects}
        raise PeerLostError(f"{' or '.join(suspects)}: no progress for {self._patience:.0f} s", **known)

    def _check_nodes(self, waiting: Collection[str]) -> None:
        """Ray's own checks take up to a minute by default, and their settings are the cluster's."""
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        for node_id in {self._node_of[name] for name in waiting if name in self._node_of}:
            node = nodes.get(node_id)
            if node and node["Alive"] and _answers(node, self._config.node_timeout_s / 3):
                continue
            lost = tuple(name for name in self._node_of if self._node_of[name] == node_id)
            address = node["NodeManagerAddress"] if node else node_id
            raise PeerLostError(f"{', '.join(lost)}: the node {address} was lost", stuck=lost)


def _answers(node: Mapping[str, Any], timeout_s: float) -> bool:
    """Whether a node's raylet accepts a connection. It has two chances, because a packet may be lost."""
    for _ in range(2):
        with suppress(OSError):
            address = (node["NodeManagerAddress"], node["NodeManagerPort"])
            socket.create_connection(address, timeout=timeout_s).close()
            return True
    return False
