"""Each peer in a Ray actor of its own, and the coordinator between them.

    driver --run(start, stop)--> PeerActor 0..M-1: draw, view, embed, exchange, update
                                     |  embeddings  |
                                     +- Coordinator -+   (or peer to peer, in the group it forms)

The actors delegate to :class:`~ray_dmml.peer.peer.Peer`; what is here is placement, waiting, noticing who
is lost, and forming the next generation without them or with others in their places. What the peers
then go on from is for :mod:`~ray_dmml.training.trainer` to say.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from ray_dmml.cohort.cohort import StepRow
from ray_dmml.config.schema import Config, DataConfig, FailureConfig
from ray_dmml.errors import ExchangeLostError, PeerLostError, UserError
from ray_dmml.ray_backend.coordinator import Coordinator, PeerStatus
from ray_dmml.ray_backend.placement import cluster_nodes, plan, shown
from ray_dmml.ray_backend.session import only_at, ray_session

if TYPE_CHECKING:  # which load torch
    import numpy as np

    from ray_dmml.checkpoint.store import PeerFiles
    from ray_dmml.data.dataset import Splits

POLL_S = 0.25
"""Seconds between two looks at the peers."""

GRACE_S = 5.0
"""When one peer's call fails, so long do we wait for the others': one may be the cause, and those that
are still at work need not be started anew."""

LONGEST_LOOK_S = GRACE_S + 1
"""From one look at the peers to the next; more is a pause of our own."""

LATE_S = 3.0
"""A process that lives gives a sign more often, by far."""

SILENT_STEPS = 10
"""A peer may be silent for so many median steps."""


class PeerActor:
    """The process of one peer.

    It is built by a call, not by its constructor: Ray hides the type of an error that a constructor
    raises. And it alone imports what a peer needs: the driver starts sooner without.
    """

    def fetch(self, config: DataConfig) -> None:
        """Its node's copy of the images."""
        from ray_dmml.data.staging import fetch

        fetch(config, lambda line: None)

    def build(self, *arguments: Any) -> None:
        from ray_dmml.ray_backend.peer_actor import Member

        self._member = Member(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._member, method)(*arguments)

    def answer(self) -> bool:
        """It lives, is whole, and is through with its last call; False: it was not built yet."""
        member = getattr(self, "_member", None)
        if member is not None:
            member.check_healthy()
        return member is not None


class RayCohort:
    """A cohort on Ray, in the session that :func:`ray_session` finds or starts.

    Args:
        config: the experiment.
        splits: its images (the actors read their own copy; they are told which to leave out, and what
            the others are).
        initial_weights: False where a checkpoint replaces them at once.

    Raises:
        UserError: the cluster has not what the peers ask for, or a peer cannot be built.
        PeerLostError: one died on the way.
    """

    def __init__(self, config: Config, splits: Splits, *, initial_weights: bool = True) -> None:
        self.names = tuple(str(peer.name) for peer in config.cohort.peers)
        self._config, self._skipped, self._digests = config, splits.skipped, splits.digests()
        self._positions = {name: position for position, name in enumerate(self.names)}
        self._actors: dict[str, Any] = {}
        self._group: Any = None
        self._coordinator: Any = None
        self._nodes: dict[str, str] = {}  # name of a peer to the ID of its node
        self.pids: dict[str, int] = {}
        self._stuck: tuple[str, ...] = ()
        self._suspects: tuple[str, ...] = ()
        self._step_seconds: deque[float] = deque(maxlen=31)  # of the latest calls of run
        self.waited: dict[str, float] = dict.fromkeys(self.names, 0.0)
        self._has_new = True  # a peer that has made no step yet
        self.transport = ""
        self.devices: tuple[str, ...] = ()
        self.nodes: tuple[str, ...] = ()
        self._session = ExitStack()
        self._session.enter_context(ray_session())
        try:
            self._placement, self._bundles = self._reserve()
            self.threads = tuple(
                config.cohort.threads_per_peer or max(1, int(bundle["CPU"] / peer.num_replicas))
                for peer, bundle in zip(config.cohort.peers, self._bundles, strict=True)
            )
            self._form(initial_weights, again=False)
        except BaseException:
            self.close()
            raise

    def _form(self, initial_weights: bool, *, again: bool) -> None:
        """A generation of ``names``: starts those that are missing, and has all of them meet.

        Args:
            again: one was lost, perhaps with its node: there may have to be another one first.
        """
        # Beside the driver, without whom nothing goes on anyway: one thing less that can be lost.
        own = ray.get_runtime_context().get_node_id()
        self._coordinator = (
            ray.remote(Coordinator)
            .options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(own, soft=True),
                # Ray first asks any node, which may not have heard of ours and keeps the actor itself.
                resources=only_at(own),
            )
            .remote(self.names)
        )
        starting = [name for name in self.names if name not in self._actors]
        self._has_new = self._has_new or bool(starting)
        for name in starting:
            self._actors[name] = self._start_actor(self._positions[name])
        if again:
            waits = {name: self._actors[name].answer.remote() for name in starting}
            self._gather(waits, self._config.cohort.placement_timeout_s)
        if self._config.data.source is not None:  # which takes as long as it takes
            data = self._config.data
            self._gather(
                {name: self._actors[name].fetch.remote(data) for name in starting}, math.inf
            )
        refs = {
            name: self._actors[name].build.remote(
                self._config,
                self._positions[name],
                self._skipped,
                self._digests,
                self._threads_of(name),
                initial_weights,
                self._options(self._positions[name]),
            )
            for name in starting
        }
        patience = self._config.cohort.start_timeout_s
        self._gather(refs, patience)
        facts = self._gather(self._calls("join", self._coordinator, self.names), patience)
        self.transport = facts[self.names[0]]["transport"]
        self.devices = tuple(each["device"] for each in facts.values())
        self.nodes = tuple(each["address"] for each in facts.values())
        self._nodes = {name: each["node"] for name, each in facts.items()}
        self.pids = {name: each["pid"] for name, each in facts.items()}

    def _start_actor(self, position: int) -> Any:
        return ray.remote(PeerActor).options(**self._options(position)).remote()

    def _options(self, position: int) -> dict[str, Any]:
        """Where a peer's actor goes, and those of its replicas."""
        bundle = self._bundles[position]
        parts = self._config.cohort.peers[position].num_replicas
        first = len(self._placement.bundle_specs) - len(self._bundles)
        place = PlacementGroupSchedulingStrategy(
            self._placement, placement_group_bundle_index=first + position
        )
        return {
            "num_cpus": bundle["CPU"] / parts,
            "num_gpus": bundle.get("GPU", 0) / parts,
            "scheduling_strategy": place,
        }

    def _threads_of(self, name: str) -> int:
        return self.threads[self._positions[name]]

    def _reserve(self) -> tuple[PlacementGroup, list[dict[str, float]]]:
        """A place for every peer: in the group this process was started in (as a trial of a search
        is), whose last bundles are the peers', or in a new one."""
        config = self._config
        num_peers = len(config.cohort.peers)
        given = get_current_placement_group()
        if given is not None and len(given.bundle_specs) >= num_peers:
            return given, given.bundle_specs[-num_peers:]
        alive, growth = cluster_nodes(ray.nodes(), ray.get_runtime_context().get_node_id())
        bundles = plan(config, alive, growth)
        self._group = placement_group(
            bundles,
            strategy=config.cohort.placement_strategy.upper(),
            bundle_label_selector=[dict(peer.labels) for peer in config.cohort.peers],
        )
        try:
            ray.get(self._group.ready(), timeout=config.cohort.placement_timeout_s)
        except GetTimeoutError:
            grown = f" and may grow by {shown(growth)}" if growth else ""
            raise UserError(
                f"the cluster did not grant {bundles} within {config.cohort.placement_timeout_s:g} s "
                f"(cohort.placement_timeout_s): it has {shown([ray.cluster_resources()])}{grown}; "
                f"{shown([ray.available_resources()])} are free"
            ) from None
        return self._group, bundles

    def run(self, start: int, stop: int, on_step: Callable[[int], None]) -> list[StepRow]:
        began = time.monotonic()
        found = self._gather(self._calls("run", start, stop), self._patience(), on_step)
        self._has_new = False
        self._step_seconds.append((time.monotonic() - began) / (stop - start))
        on_step(stop)
        for name, (_, waited) in found.items():
            self.waited[name] += waited
        rows = zip(*(rows for rows, _ in found.values()), strict=True)
        return [dict(zip(self.names, terms, strict=True)) for terms in rows]

    def embeddings(self, split: str, *, ema: bool = False) -> dict[str, np.ndarray]:
        return self._gather(
            self._calls("embeddings", split, ema), self._config.cohort.start_timeout_s
        )

    def state(self) -> dict[str, PeerFiles]:
        return self._gather(self._calls("state"), self._config.cohort.start_timeout_s)

    def load(self, state: Mapping[str, PeerFiles]) -> None:
        self._give("load", state)

    def load_weights(self, state: Mapping[str, PeerFiles]) -> None:
        self._give("load_weights", state)

    def recover(self, *, drop: bool = False) -> None:
        """Forms the next generation after a :class:`PeerLostError`; all peers must be given a state
        next. Whoever was lost, or does not answer soon, is started anew.

        Args:
            drop: the others go on without those that were lost.

        Raises:
            PeerLostError: again one was lost.
            UserError: no peer is left.
        """
        # Their end wakes who waits in an exchange for one that will never come.
        self._end(self._coordinator)
        lost, suspects = list(self._stuck), self._suspects
        self._stuck = self._suspects = ()
        for name in (*lost, *suspects):
            self._end_peer(name)
        grace = max(GRACE_S, 2 * self._median_step())
        answers = {name: actor.answer.remote() for name, actor in self._actors.items()}
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=grace)
        for name, answer in answers.items():
            if _has_come(answer):
                if ray.get(answer) and not self._has_nccl():
                    continue
            elif _is_ready(answer):
                lost.append(name)  # else it lives, and is amid something long
            self._end_peer(name)
        if drop:
            left = tuple(name for name in self.names if name not in lost)
            if not left:
                raise UserError(f"{', '.join(lost)}: lost, and no peer is left to go on")
            self.names = left
        self._form(initial_weights=False, again=True)

    def _has_nccl(self) -> bool:
        """Whether a group may be amid a kernel that waits for a lost peer: no process of it can be
        used again."""
        return self.transport == "direct" and all(d.startswith("cuda") for d in self.devices)

    def _end_peer(self, name: str) -> None:
        actor = self._actors.pop(name, None)
        where = self._nodes.pop(name, None)  # the next one may be anywhere
        # Ray asks a process to end before it forces it to, and one that is stopped takes its time.
        is_here = where == ray.get_runtime_context().get_node_id()
        if actor is not None and is_here and _is_of_ray(self.pids[name]):
            with suppress(OSError):
                os.kill(self.pids[name], signal.SIGKILL)
        self._end(actor)

    def close(self) -> None:
        for actor in [*self._actors.values(), self._coordinator]:
            self._end(actor)
        self._actors, self._coordinator = {}, None
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        self._session.close()

    @staticmethod
    def _end(actor: Any) -> None:
        if actor is not None:
            ray.kill(actor)

    # --- calling ----------------------------------------------------------------------------

    def _calls(self, method: str, *arguments: Any) -> dict[str, Any]:
        """The same call on every peer."""
        return {name: self._actors[name].call.remote(method, *arguments) for name in self.names}

    def _give(self, method: str, state: Mapping[str, PeerFiles]) -> None:
        """To every peer what is its own."""
        refs = {name: self._actors[name].call.remote(method, state[name]) for name in self.names}
        self._gather(refs, self._config.cohort.start_timeout_s)

    # --- waiting ----------------------------------------------------------------------------

    def _patience(self) -> float:
        """Seconds that a step may take.

        Before its first steps nobody knows how long one takes; and they compile, and fill caches.
        """
        if self._has_new:
            return self._config.cohort.start_timeout_s
        return max(self._config.failure.heartbeat_timeout_s, SILENT_STEPS * self._median_step())

    def _median_step(self) -> float:
        return sorted(self._step_seconds)[len(self._step_seconds) // 2] if self._step_seconds else 0

    def _gather(
        self,
        refs: dict[str, Any],
        patience: float,
        on_step: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """The results of one call on some peers. The first failure ends the wait: the peers that
        are left would only sit in an exchange.

        Args:
            patience: seconds that a living peer may go without progress.

        Raises:
            UserError: what a peer raised.
            PeerLostError: who died or fell silent.
        """
        watch = _Watch(patience, self._config.failure, self._nodes)
        waiting, found = dict(refs), {}
        while waiting:
            ray.wait(list(waiting.values()), num_returns=len(waiting), timeout=POLL_S)
            for name in [name for name, ref in waiting.items() if _is_ready(ref)]:
                try:
                    found[name] = ray.get(waiting.pop(name))
                except (RayTaskError, RayActorError) as error:
                    raise self._explain(error, refs) from error
                except RayError as error:  # the result was lost with the node that held it
                    raise PeerLostError(f"{name}: {_why(error)}") from error
            if waiting:
                signs = self._signs()
                if signs is None:
                    raise PeerLostError("the coordinator died: its process was killed or crashed")
                sent = [sign.sent for sign in signs.values()]
                if on_step is not None and sent and min(sent):  # 0: no sign in this generation yet
                    on_step(min(sent) - 1)
                try:
                    watch.look(waiting, signs)
                except PeerLostError as loss:
                    self._stuck, self._suspects = loss.stuck, loss.suspects
                    raise
        return {name: found[name] for name in refs}

    def _explain(self, error: Exception, refs: Mapping[str, Any]) -> Exception:
        """The failure that caused the others: a user's mistake, then a death, then a lost exchange."""
        if _is_mistake(_cause(error)):
            return _cause(error)
        # A death is its own cause. What else a peer raises may come of another's death.
        failures = self._failures(refs, POLL_S if _is_death(error) else GRACE_S) or {"": error}
        causes = [_cause(failure) for failure in failures.values()]
        for cause in causes:
            if _is_mistake(cause):
                return cause
        died = {name: _why(failure) for name, failure in failures.items() if _is_death(failure)}
        if died:
            signs = self._signs() or {}
            told = []
            for name, why in died.items():
                sent = signs[name].sent if name in signs else 0
                told.append(f"{name} died{f' in step {sent}' if sent else ''}: {why}")
            return PeerLostError("; ".join(told))
        for cause in causes:
            if isinstance(cause, RayActorError):
                return PeerLostError(f"the coordinator died: {_why(cause)}")
        # A lost exchange is the last to be believed: it is what everything else looks like to others.
        cause = min(
            causes, key=lambda c: (isinstance(c, PeerLostError), isinstance(c, ExchangeLostError))
        )
        return PeerLostError(_why(cause)) if isinstance(cause, RayError) else cause

    def _failures(self, refs: Mapping[str, Any], grace: float) -> dict[str, Exception]:
        """What the peers raised by now, or within so many seconds."""
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

    def _signs(self) -> dict[str, PeerStatus] | None:
        """The last sign of each peer; empty where the coordinator is silent, None where it is dead."""
        try:
            return ray.get(self._coordinator.signs.remote(), timeout=GRACE_S)
        except GetTimeoutError:
            return {}
        except RayActorError:
            return None


class _Watch:
    """Notices, in a wait, who is silent or makes no progress for too long and whose node is gone.

    Args:
        patience: seconds that a living peer may go without progress.
        run: seconds that a process may be silent, and until a node that does not answer is lost.
        nodes: name of a peer to the ID of its node.
    """

    def __init__(self, patience: float, run: FailureConfig, nodes: Mapping[str, str]) -> None:
        self._patience, self._run, self._nodes = patience, run, nodes
        self._last: dict[str, tuple[tuple[int, int], float]] = {}
        # A clock of its own: while this process is stopped itself, nobody is silent.
        self._now = self._heard_at = self._looked_at = 0.0
        self._before = time.monotonic()

    def look(self, waiting: Mapping[str, Any], signs: Mapping[str, PeerStatus]) -> None:
        """Raises PeerLostError."""
        elapsed, self._before = time.monotonic() - self._before, time.monotonic()
        self._now = now = self._now + min(elapsed, LONGEST_LOOK_S)
        silence = self._run.heartbeat_timeout_s
        if not signs:
            if now - self._heard_at > silence:
                raise PeerLostError(f"the coordinator gave no answer for {silence:.0f} s")
            return
        self._heard_at = now
        silent = tuple(name for name in waiting if signs[name].silent_s > silence)
        if silent:
            told = f"{', '.join(silent)}: no sign of life for {silence:.0f} s"
            raise PeerLostError(told, stuck=silent)
        self._look_at_progress(waiting, signs)
        if now - self._looked_at > self._run.node_timeout_s / 3:
            self._look_at_nodes(waiting)
            self._looked_at = now

    def _look_at_progress(
        self, waiting: Mapping[str, Any], signs: Mapping[str, PeerStatus]
    ) -> None:
        """Of those that live: one that hangs keeps others waiting."""
        for name in waiting:
            progress = (signs[name].sent, signs[name].chunks)
            if name not in self._last or self._last[name][0] != progress:
                self._last[name] = (progress, self._now)
        longest = self._now - min(self._last[name][1] for name in waiting)
        # Who may be stopped is waited for: then all know who it is.
        if longest <= self._patience or any(signs[name].silent_s > LATE_S for name in waiting):
            return
        least = min(signs[name].sent for name in waiting)
        suspects = tuple(name for name in waiting if signs[name].sent == least)
        told = f"{' or '.join(suspects)}: no progress for {self._patience:.0f} s"
        if len(suspects) == 1:
            raise PeerLostError(told, stuck=suspects)
        raise PeerLostError(told, suspects=suspects)

    def _look_at_nodes(self, waiting: Mapping[str, Any]) -> None:
        """Ray's own checks take up to a minute by default, and are the cluster's to set."""
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        for where in {self._nodes[name] for name in waiting if name in self._nodes}:
            node = nodes.get(where)
            if node is not None and node["Alive"] and _answers(node, self._run.node_timeout_s / 3):
                continue
            lost = tuple(name for name in self._nodes if self._nodes[name] == where)
            address = node["NodeManagerAddress"] if node else where
            raise PeerLostError(f"{', '.join(lost)}: the node {address} was lost", lost)


def _answers(node: Mapping[str, Any], timeout_s: float) -> bool:
    """Twice, as a single packet may be lost."""
    for _ in range(2):
        try:
            place = (node["NodeManagerAddress"], node["NodeManagerPort"])
            socket.create_connection(place, timeout=timeout_s).close()
            return True
        except OSError:
            continue
    return False


def _is_of_ray(pid: int) -> bool:
    """It is not another's by now. Without /proc nobody can tell, and Ray alone ends it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def _is_ready(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])


def _has_come(ref: Any) -> bool:
    """Whether a call is done and did not fail."""
    try:
        ray.get(ref, timeout=0)
    except RayError:
        return False
    return True


def _is_death(error: Exception) -> bool:
    """Of the actor itself. A call of a living one that failed on a dead one is a RayTaskError, too:
    the dead one is the coordinator."""
    return isinstance(error, RayActorError) and not isinstance(error, RayTaskError)


def _cause(error: Exception) -> Exception:
    """What was raised inside the actor, out of Ray's wrapping."""
    return getattr(error, "cause", None) or error


def _is_mistake(error: Exception) -> bool:
    return isinstance(error, UserError) and not isinstance(error, PeerLostError)


def _why(error: Exception) -> str:
    """Why an actor died, out of Ray's paragraph about it."""
    told = str(error)
    if "OUT_OF_MEMORY" in told or "running low on memory" in told:
        return "out of memory: Ray ended it, as its node had too little left"
    if "node has died" in told or "NODE_DIED" in told:
        return "its node was lost"
    if "unavailable" in told:
        return "it does not answer"
    if "ray.kill" in told:
        return "it was ended"
    if "SYSTEM_ERROR" in told or "connection error" in told.lower():
        return "its process was killed or crashed"
    return next((line.strip() for line in told.splitlines() if line.strip()), type(error).__name__)
