"""Each peer in a Ray actor of its own, and the coordinator between them.

    driver --run(start, stop)--> PeerActor 0..M-1: draw, view, embed, exchange, update
                                     |  embeddings  |
                                     +- Coordinator -+   (or from peer to peer)

This file calls the peers, waits for them and forms their generations. Which state they then go on from is decided
in :mod:`~ray_dmml.training.trainer`.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_dmml.cohort.cohort import StepRow, names_without
from ray_dmml.cohort.phases import PHASES
from ray_dmml.config.code import code_in_use
from ray_dmml.config.schema import Config
from ray_dmml.errors import PeerLostError
from ray_dmml.ray_backend import file_transfer, resting_peers
from ray_dmml.ray_backend.coordinator import Coordinator, PeerStatus
from ray_dmml.ray_backend.failure_detector import FailureDetector
from ray_dmml.ray_backend.failures import cause_of, first_cause, is_death, is_own_cause, reason_of
from ray_dmml.ray_backend.peer_actor import PeerActor, PeerPlace, Processes
from ray_dmml.ray_backend.placement import num_workers_of, threads_of
from ray_dmml.ray_backend.reservation import Reservation
from ray_dmml.ray_backend.session import only_at, ray_session

if TYPE_CHECKING:  # these import torch
    import numpy as np

    from ray_dmml.checkpoint.peer_files import PeerFiles
    from ray_dmml.data.dataset import Splits

POLL_S = 0.25  # between two checks of the peers


class RayCohort:
    """A cohort on Ray, in the session that :func:`~ray_dmml.ray_backend.session.ray_session` finds or starts.

    Every actor reads its own copy of the images and compares it with ``splits``.

    Raises:
        UserError: the cluster does not have what the peers ask for, or a peer cannot be built.
        PeerLostError: a peer died meanwhile.
    """

    peer_class: type = PeerActor
    coordinator_class: type = Coordinator
    """Classes of the actors. A subclass with others injects faults."""

    grace_s = 5.0
    """When the call of one peer fails, the driver waits this long for those of the others: one of them may
    have caused it, and peers that are busy only so long are kept."""

    def __init__(self, config: Config, splits: Splits, *, initial_weights: bool = True) -> None:
        self.names = tuple(str(peer.name) for peer in config.cohort.peers)
        self.actors: dict[str, Any] = {}  # in peer order
        self.places: dict[str, PeerPlace] = {}
        self.coordinator: Any = None  # the actor of this generation
        self.seconds = {name: dict.fromkeys(PHASES, 0.0) for name in self.names}
        self._config, self._skipped, self._digests = config, splits.skipped, splits.digests()
        self._code = code_in_use()  # not read again, so that peers that start later get the same
        self._positions = {name: position for position, name in enumerate(self.names)}
        self._step_seconds: deque[float] = deque(maxlen=31)  # of the latest calls of run
        self._median_step = 0.0
        self._has_new_peers = True  # a peer that has made no step yet
        self._must_keep_embeddings = True  # before the first step of a generation
        self._session = ExitStack()
        self._session.enter_context(ray_session())
        try:
            self._reservation = Reservation(config)
            self._session.callback(self._reservation.release)
            bundles = self._reservation.bundles
            self._num_workers = tuple(map(num_workers_of, config.cohort.peers, bundles))
            self.threads = tuple(
                config.cohort.threads_per_peer or threads_of(peer, bundle)
                for peer, bundle in zip(config.cohort.peers, bundles, strict=True)
            )
            self._form_generation(initial_weights, is_first=True)
        except BaseException:
            self.close()
            raise

    def run(self, start: int, stop: int, on_step: Callable[[int], None]) -> list[StepRow]:
        if self._must_keep_embeddings:
            # Not within the first step, where the other peers would wait and seem to hang.
            self._gather({name: self.actors[name].keep_embeddings.remote() for name in self._keeping_peers()})
            self._must_keep_embeddings = False
        began = time.monotonic()
        refs = {name: actor.run.remote(start, stop) for name, actor in self.actors.items()}
        patience = None
        if not self._has_new_peers:  # nobody knows how long the first steps take, which compile and fill caches
            patience = max(self._config.failure.heartbeat_timeout_s, 10 * self._median_step)
        results = self._gather(refs, patience, on_step)
        self._has_new_peers = False
        self._step_seconds.append((time.monotonic() - began) / (stop - start))
        self._median_step = median_high(self._step_seconds)
        on_step(stop)
        for name, (_, seconds) in results.items():
            for phase, of_phase in seconds.items():
                self.seconds[name][phase] += of_phase
        rows = zip(*(rows for rows, _ in results.values()), strict=True)
        return [dict(zip(self.names, terms, strict=True)) for terms in rows]

    def embeddings(self, split: str, *, ema: bool = False) -> dict[str, np.ndarray]:
        return self._gather({name: actor.embeddings.remote(split, ema) for name, actor in self.actors.items()})

    def features(self, split: str, names: Collection[str]) -> dict[str, np.ndarray]:
        actors = {name: actor for name, actor in self.actors.items() if name in names}
        return self._gather({name: actor.embeddings.remote(split, False, True) for name, actor in actors.items()})

    def _keeping_peers(self) -> list[str]:
        peers = self._config.cohort.peers
        return [name for name in self.names if peers[self._positions[name]].teacher_view == "evaluation"]

    def save(self, folder: Path) -> dict[str, PeerFiles]:
        folder = folder.absolute()  # a peer's process has another current folder
        for name in self.names:  # so that the driver may remove what another user's process has written
            (folder / name).mkdir()
        saved = self._gather({name: actor.save.remote(folder / name) for name, actor in self.actors.items()})
        for name in [name for name, files in saved.items() if files is None]:
            saved[name] = file_transfer.fetch(self.actors[name], partial(self._ask, name), folder / name)
        return saved

    def load(self, state: Mapping[str, PeerFiles]) -> None:
        self._load(state, weights_only=False)

    def load_weights(self, state: Mapping[str, PeerFiles]) -> None:
        self._load(state, weights_only=True)

    def _load(self, state: Mapping[str, PeerFiles], *, weights_only: bool) -> None:
        refs = {name: actor.load.remote(state[name].absolute(), weights_only) for name, actor in self.actors.items()}
        loaded = self._gather(refs)
        for name in [name for name, is_loaded in loaded.items() if not is_loaded]:
            file_transfer.send(self.actors[name], partial(self._ask, name), state[name], weights_only)

    def _ask(self, name: str, ref: Any) -> Any:
        """The result of a call on one peer."""
        return self._gather({name: ref})[name]

    def recover(self, failure: PeerLostError, *, drop: bool = False) -> None:
        """Forms the next generation. Peers that were lost, or do not answer soon, are started again.

        Raises:
            PeerLostError: another peer was lost meanwhile.
            UserError: no peer that learns is left.
        """
        # Its end wakes the peers that wait in an exchange for one that will never come.
        ray.kill(self.coordinator)
        lost = list(failure.stuck)
        for name in (*failure.stuck, *failure.suspects):
            self._end_peer(name)
        pings = {name: actor.ping.remote() for name, actor in self.actors.items()}
        ray.wait(list(pings.values()), num_returns=len(pings), timeout=max(self.grace_s, 2 * self._median_step))
        for name, ping in pings.items():
            is_usable = False
            try:
                is_usable = ray.get(ping, timeout=0) and not self._uses_nccl
            except GetTimeoutError:
                pass  # it lives, and is busy with something long
            except RayError:
                lost.append(name)
            if not is_usable:
                self._end_peer(name)
        if drop:
            self.names = names_without(self.names, lost, self._config.cohort)
        self._form_generation(initial_weights=False, is_first=False)

    def _form_generation(self, initial_weights: bool, *, is_first: bool) -> None:
        """Starts the missing peers of ``names`` and lets all of them meet at a new coordinator."""
        config = self._config
        self.coordinator = self._start_coordinator()
        missing = [name for name in self.names if name not in self.actors]
        starting = {name: self.start_actor(name) for name in missing}
        self._has_new_peers = self._has_new_peers or bool(starting)
        self._must_keep_embeddings = True
        actors = self.actors | starting
        self.actors = {name: actors[name] for name in self.names}
        if not is_first:  # a peer was lost, perhaps with its node: another node may have to start first
            pings = {name: actor.ping.remote() for name, actor in starting.items()}
            self._gather(pings, config.cohort.placement_timeout_s)
        if config.data.source is not None:
            copies = {name: actor.fetch.remote(config.data) for name, actor in starting.items()}
            self._gather(copies, math.inf)  # a copy takes as long as it takes
        refs: dict[str, Any] = {}
        for name, actor in starting.items():
            position = self._positions[name]
            processes = Processes(
                self.threads[position], self._num_workers[position], self._reservation.options(position)
            )
            refs[name] = actor.build.remote(
                config, position, self._code, self._skipped, self._digests, processes, initial_weights
            )
        self._gather(refs)
        refs = {name: actor.join.remote(self.coordinator, self.names) for name, actor in self.actors.items()}
        self.places = self._gather(refs)
        self.devices = tuple(place.device for place in self.places.values())
        self.nodes = tuple(place.address for place in self.places.values())
        self.transport = self.places[self.names[0]].transport
        # A process may be inside an NCCL kernel that waits for a lost peer; then it cannot be used again.
        self._uses_nccl = self.transport == "direct" and all(device.startswith("cuda") for device in self.devices)

    def _start_coordinator(self) -> Any:
        # On the driver's node, without which nothing goes on anyway: one thing less that can be lost.
        own_node = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(own_node, soft=True)
        # Ray first asks any node, which may not know ours yet and then keeps the actor. Resources prevent that.
        options = {"num_cpus": 0, "scheduling_strategy": here, "resources": only_at(own_node)}
        return ray.remote(self.coordinator_class).options(**options).remote(self.names)

    def start_actor(self, name: str) -> Any:
        """A process for a peer, not built yet: a new one, or one that rests in its place."""
        position = self._positions[name]
        place = self._reservation.place(position)
        if place is not None and (resting := resting_peers.take((*place, self.peer_class))) is not None:
            return resting
        return ray.remote(self.peer_class).options(**self._reservation.options(position)).remote()

    def _end_peer(self, name: str) -> None:
        actor = self.actors.pop(name, None)
        place = self.places.pop(name, None)  # the next process may be anywhere
        if actor is None:
            return
        # Ray asks a process to end before it forces it to. A stopped process takes its time.
        if place and place.node_id == ray.get_runtime_context().get_node_id():
            with suppress(OSError):  # without /proc only Ray ends it
                # The number may be another process's by now.
                if Path(f"/proc/{place.pid}/cmdline").read_bytes().startswith(b"ray::"):
                    os.kill(place.pid, signal.SIGKILL)
        ray.kill(actor)

    def close(self) -> None:
        places = {name: self._reservation.place(self._positions[name]) for name in self.places}
        resting = {
            (*at, self.peer_class): self.actors[name] for name, at in places.items() if at and name in self.actors
        }
        resting_peers.rest(resting)
        kept = list(resting.values())
        for actor in [*self.actors.values(), self.coordinator]:
            if actor is not None and actor not in kept:
                ray.kill(actor)
        self.actors, self.places, self.coordinator = {}, {}, None
        self._session.close()

    def _gather(
        self, refs: dict[str, Any], patience: float | None = None, on_step: Callable[[int], None] | None = None
    ) -> dict[str, Any]:
        """The results of one call on some peers, by name. The first failure ends the wait, because the other peers
        would only wait in an exchange. A living peer may go without progress for ``patience`` seconds (None:
        ``cohort.start_timeout_s``)."""
        patience = self._config.cohort.start_timeout_s if patience is None else patience
        node_of = {name: place.node_id for name, place in self.places.items()}
        detector = FailureDetector(patience, self._config.failure, node_of)
        waiting, results = dict(refs), {}
        while waiting:
            ready, _ = ray.wait(list(waiting.values()), num_returns=len(waiting), timeout=POLL_S)
            for name in [name for name, ref in waiting.items() if ref in ready]:
                try:
                    results[name] = ray.get(waiting.pop(name))
                except (RayTaskError, RayActorError) as error:
                    raise self._explain(error, refs) from error
                except RayError as error:  # the result was lost with the node that held it
                    raise PeerLostError(f"{name}: {reason_of(error)}") from error
            if waiting:
                statuses = self.statuses()
                num_sent = min((status.num_sent for status in statuses.values()), default=0)
                if on_step is not None and num_sent:  # 0: a peer of this generation has not sent anything yet
                    on_step(num_sent - 1)
                detector.check(waiting, statuses)
        return {name: results[name] for name in refs}

    def statuses(self) -> dict[str, PeerStatus]:
        """The latest status of each peer; empty if the coordinator does not answer. Raises PeerLostError if it died."""
        try:
            return ray.get(self.coordinator.statuses.remote(), timeout=self.grace_s)
        except GetTimeoutError:
            return {}
        except RayActorError:
            raise PeerLostError("the coordinator died: its process was killed or crashed") from None

    def _explain(self, error: Exception, refs: Mapping[str, Any]) -> Exception:
        """The failure that caused the others."""
        if is_own_cause(cause_of(error)):
            return cause_of(error)
        # A death is its own cause. Everything else that a peer raises may follow from another peer's death.
        grace = POLL_S if is_death(error) else self.grace_s
        ray.wait(list(refs.values()), num_returns=len(refs), timeout=grace)
        failures: dict[str, Exception] = {}
        for name, ref in refs.items():
            try:
                ray.get(ref, timeout=0)
            except GetTimeoutError:
                pass
            except RayError as failure:
                failures[name] = failure
        num_sent: dict[str, int] = {}
        with suppress(PeerLostError):
            num_sent = {name: status.num_sent for name, status in self.statuses().items()}
        return first_cause(failures or {"": error}, num_sent)
