"""Each peer in a Ray actor of its own, and the coordinator between them.

    driver --run(start, stop)--> PeerActor 0..M-1: draw, view, embed, exchange, update
                                     |  embeddings  |
                                     +- Coordinator -+   (or from peer to peer, in the group it forms)

This file calls the peers, waits for them and forms their generations. Which state they then go on from is decided
in :mod:`~ray_dmml.training.trainer`.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_dmml.cohort.cohort import StepRow
from ray_dmml.config.schema import Config
from ray_dmml.errors import PeerLostError, UserError
from ray_dmml.ray_backend.coordinator import Coordinator, PeerStatus
from ray_dmml.ray_backend.failure_detector import FailureDetector
from ray_dmml.ray_backend.failures import (
    cause_of,
    first_cause,
    is_death,
    is_user_mistake,
    reason_of,
)
from ray_dmml.ray_backend.peer_actor import PeerActor, PeerPlace
from ray_dmml.ray_backend.reservation import Reservation
from ray_dmml.ray_backend.session import only_at, ray_session

if TYPE_CHECKING:  # these import torch
    import numpy as np

    from ray_dmml.checkpoint.store import PeerFiles
    from ray_dmml.data.dataset import Splits

POLL_S = 0.25
"""Seconds between two checks of the peers."""

MANY_STEPS = 10
"""A peer may go without progress for this many median steps."""


class RayCohort:
    """A cohort on Ray, in the session that :func:`~ray_dmml.ray_backend.session.ray_session` finds or starts.

    Args:
        config: the experiment.
        splits: its images. Every actor reads its own copy and compares it with these.
        initial_weights: False leaves the initial weights unread, because a state is loaded next.

    Raises:
        UserError: the cluster does not have what the peers ask for, or a peer cannot be built.
        PeerLostError: a peer died meanwhile.
    """

    peer_class: type = PeerActor
    """Class of the peers' actors. A subclass with another one injects faults."""

    coordinator_class: type = Coordinator
    """Class of the coordinator's actor."""

    grace_s = 5.0
    """When the call of one peer fails, the driver waits this long for those of the others: one of them may
    have caused it, and peers that are still at work are kept."""

    def __init__(self, config: Config, splits: Splits, *, initial_weights: bool = True) -> None:
        self.names = tuple(str(peer.name) for peer in config.cohort.peers)
        self.actors: dict[str, Any] = {}
        """Handles of the peers' actors, by name."""

        self.coordinator: Any = None
        """Handle of this generation's coordinator."""

        self.places: dict[str, PeerPlace] = {}
        """Where each peer of this generation is, by name."""

        self.waited: dict[str, float] = dict.fromkeys(self.names, 0.0)
        self._config, self._skipped, self._digests = config, splits.skipped, splits.digests()
        self._positions = {name: position for position, name in enumerate(self.names)}
        self._step_seconds: deque[float] = deque(maxlen=31)  # of the latest calls of run
        self._has_new_peers = True  # a peer that has made no step yet
        # A process may be inside an NCCL kernel that waits for a lost peer; then it cannot be used again.
        self._uses_nccl = False
        self._session = ExitStack()
        self._session.enter_context(ray_session())
        try:
            self._reservation = Reservation(config)
            self._session.callback(self._reservation.release)
            self.threads = tuple(
                config.cohort.threads_per_peer or max(1, int(bundle["CPU"] / peer.num_replicas))
                for peer, bundle in zip(config.cohort.peers, self._reservation.bundles, strict=True)
            )
            self._form_generation(initial_weights, is_first=True)
        except BaseException:
            self.close()
            raise

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self.places[name].device for name in self.names)

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self.places[name].address for name in self.names)

    @property
    def transport(self) -> str:
        return self.places[self.names[0]].transport

    # --- training ---------------------------------------------------------------------------

    def run(self, start: int, stop: int, on_step: Callable[[int], None]) -> list[StepRow]:
        began = time.monotonic()
        refs = {name: self.actors[name].run.remote(start, stop) for name in self.names}
        results = self._gather(refs, self._patience(), on_step)
        self._has_new_peers = False
        self._step_seconds.append((time.monotonic() - began) / (stop - start))
        on_step(stop)
        for name, (_, waited) in results.items():
            self.waited[name] += waited
        rows = zip(*(rows for rows, _ in results.values()), strict=True)
        return [dict(zip(self.names, terms, strict=True)) for terms in rows]

    def embeddings(self, split: str, *, ema: bool = False) -> dict[str, np.ndarray]:
        refs = {name: self.actors[name].embeddings.remote(split, ema) for name in self.names}
        return self._gather(refs, self._config.cohort.start_timeout_s)

    def state(self) -> dict[str, PeerFiles]:
        refs = {name: self.actors[name].state.remote() for name in self.names}
        return self._gather(refs, self._config.cohort.start_timeout_s)

    def load(self, state: Mapping[str, PeerFiles]) -> None:
        refs = {name: self.actors[name].load.remote(state[name]) for name in self.names}
        self._gather(refs, self._config.cohort.start_timeout_s)

    def load_weights(self, state: Mapping[str, PeerFiles]) -> None:
        refs = {name: self.actors[name].load_weights.remote(state[name]) for name in self.names}
        self._gather(refs, self._config.cohort.start_timeout_s)

    # --- generations ------------------------------------------------------------------------

    def recover(self, failure: PeerLostError, *, drop: bool = False) -> None:
        """Forms the next generation. Peers that were lost, or do not answer soon, are started again; all must be
        given a state next.

        Raises:
            PeerLostError: another peer was lost meanwhile.
            UserError: no peer is left.
        """
        # Its end wakes the peers that wait in an exchange for one that will never come.
        self._kill(self.coordinator)
        lost = list(failure.stuck)
        for name in (*failure.stuck, *failure.suspects):
            self._end_peer(name)
        pings = {name: actor.ping.remote() for name, actor in self.actors.items()}
        grace = max(self.grace_s, 2 * self._median_step())
        ray.wait(list(pings.values()), num_returns=len(pings), timeout=grace)
        for name, ping in pings.items():
            if not _is_ready(ping):  # it lives, and is busy with something long
                self._end_peer(name)
            elif not _succeeded(ping):
                lost.append(name)
                self._end_peer(name)
            elif not ray.get(ping) or self._uses_nccl:
                self._end_peer(name)
        if drop:
            left = tuple(name for name in self.names if name not in lost)
            if not left:
                raise UserError(f"{', '.join(lost)}: lost, and no peer is left to go on")
            self.names = left
        self._form_generation(initial_weights=False, is_first=False)

    def _form_generation(self, initial_weights: bool, *, is_first: bool) -> None:
        """Starts the missing peers of ``names`` and lets all of them meet at a new coordinator."""
        cohort, data = self._config.cohort, self._config.data
        self.coordinator = self._start_coordinator()
        starting = [name for name in self.names if name not in self.actors]
        self._has_new_peers = self._has_new_peers or bool(starting)
        for name in starting:
            self.actors[name] = self.start_actor(name)
        if not is_first:  # a peer was lost, perhaps with its node: another node may have to start first
            pings = {name: self.actors[name].ping.remote() for name in starting}
            self._gather(pings, cohort.placement_timeout_s)
        if data.source is not None:
            copies = {name: self.actors[name].fetch.remote(data) for name in starting}
            self._gather(copies, math.inf)  # a copy takes as long as it takes
        refs = {
            name: self.actors[name].build.remote(
                self._config,
                self._positions[name],
                self._skipped,
                self._digests,
                self.threads[self._positions[name]],
                initial_weights,
                self._reservation.options(self._positions[name]),
            )
            for name in starting
        }
        self._gather(refs, cohort.start_timeout_s)
        refs = {name: self.actors[name].join.remote(self.coordinator, self.names) for name in self.names}
        self.places = self._gather(refs, cohort.start_timeout_s)
        is_direct = self.transport == "direct"
        self._uses_nccl = is_direct and all(d.startswith("cuda") for d in self.devices)

    def _start_coordinator(self) -> Any:
        # On the driver's node, without which nothing goes on anyway: one thing less that can be lost.
        own_node = ray.get_runtime_context().get_node_id()
        options = {
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(own_node, soft=True),
            # Ray first asks any node, which may not know ours yet and then keeps the actor.
            "resources": only_at(own_node),
        }
        return ray.remote(self.coordinator_class).options(**options).remote(self.names)

    def start_actor(self, name: str) -> Any:
        """A new process for a peer, not built yet."""
        options = self._reservation.options(self._positions[name])
        return ray.remote(self.peer_class).options(**options).remote()

    def _end_peer(self, name: str) -> None:
        actor = self.actors.pop(name, None)
        place = self.places.pop(name, None)  # the next process may be anywhere
        if actor is None:
            return
        # Ray asks a process to end before it forces it to. A stopped process takes its time.
        is_here = place and place.node_id == ray.get_runtime_context().get_node_id()
        if place and is_here and _is_ray_process(place.pid):
            with suppress(OSError):
                os.kill(place.pid, signal.SIGKILL)
        self._kill(actor)

    def close(self) -> None:
        for actor in [*self.actors.values(), self.coordinator]:
            self._kill(actor)
        self.actors, self.coordinator = {}, None
        self._session.close()

    @staticmethod
    def _kill(actor: Any) -> None:
        if actor is not None:
            ray.kill(actor)

    # --- waiting ----------------------------------------------------------------------------

    def _patience(self) -> float:
        """Seconds that a step may take. Nobody knows how long the first steps of a peer take; they compile
        and fill caches."""
        if self._has_new_peers:
            return self._config.cohort.start_timeout_s
        return max(self._config.failure.heartbeat_timeout_s, MANY_STEPS * self._median_step())

    def _median_step(self) -> float:
        return sorted(self._step_seconds)[len(self._step_seconds) // 2] if self._step_seconds else 0

    def _gather(
        self,
        refs: dict[str, Any],
        patience: float,
        on_step: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """The results of one call on some peers, by name. The first failure ends the wait, because the other peers
        would only wait in an exchange.

        Args:
            patience: seconds that a living peer may go without progress.

        Raises:
            UserError: what a peer raised.
            PeerLostError: a peer died or fell silent.
        """
        node_of = {name: place.node_id for name, place in self.places.items()}
        detector = FailureDetector(patience, self._config.failure, node_of)
        waiting, results = dict(refs), {}
        while waiting:
            ray.wait(list(waiting.values()), num_returns=len(waiting), timeout=POLL_S)
            for name in [name for name, ref in waiting.items() if _is_ready(ref)]:
                try:
                    results[name] = ray.get(waiting.pop(name))
                except (RayTaskError, RayActorError) as error:
                    raise self._explain(error, refs) from error
                except RayError as error:  # the result was lost with the node that held it
                    raise PeerLostError(f"{name}: {reason_of(error)}") from error
            if waiting:
                statuses = self.statuses()
                num_sent = [status.num_sent for status in statuses.values()]
                # 0: a peer of this generation has not sent anything yet.
                if on_step is not None and num_sent and min(num_sent):
                    on_step(min(num_sent) - 1)
                detector.check(waiting, statuses)
        return {name: results[name] for name in refs}

    def statuses(self) -> dict[str, PeerStatus]:
        """The latest status of each peer; empty if the coordinator does not answer.

        Raises:
            PeerLostError: the coordinator is dead.
        """
        try:
            return ray.get(self.coordinator.statuses.remote(), timeout=self.grace_s)
        except GetTimeoutError:
            return {}
        except RayActorError:
            message = "the coordinator died: its process was killed or crashed"
            raise PeerLostError(message) from None

    def _explain(self, error: Exception, refs: Mapping[str, Any]) -> Exception:
        """The failure that caused the others."""
        if is_user_mistake(cause_of(error)):
            return cause_of(error)
        # A death is its own cause. Everything else that a peer raises may follow from another peer's death.
        grace = POLL_S if is_death(error) else self.grace_s
        failures = _failures_of(refs, grace) or {"": error}
        try:
            num_sent = {name: status.num_sent for name, status in self.statuses().items()}
        except PeerLostError:
            num_sent = {}
        return first_cause(failures, num_sent)


def _failures_of(refs: Mapping[str, Any], grace: float) -> dict[str, Exception]:
    """What peers have raised, or raise within so many seconds, by name."""
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=grace)
    failures: dict[str, Exception] = {}
    for name, ref in refs.items():
        try:
            ray.get(ref, timeout=0)
        except GetTimeoutError:
            pass
        except RayError as error:
            failures[name] = error
    return failures


def _is_ray_process(pid: int) -> bool:
    """Whether the number is not another process's by now. Without /proc nobody can tell, and only Ray ends it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def _is_ready(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])


def _succeeded(ref: Any) -> bool:
    """Whether a call that is ready did not fail."""
    try:
        ray.get(ref, timeout=0)
    except RayError:
        return False
    return True
