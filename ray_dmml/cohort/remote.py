"""Each peer in a Ray actor of its own, and the coordinator between them.

    driver --run(start, stop)--> PeerActor 0..M-1: draw, view, embed, exchange, update
                                     |  embeddings  |
                                     +- Coordinator -+   (or peer to peer, in the group it forms)

The actors delegate to :class:`~ray_dmml.peer.Peer`; what is here is placement, waiting, and telling
a user why a cohort ended.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_dmml.cohort import StepRow
from ray_dmml.cohort.coordinator import Coordinator
from ray_dmml.config import Config
from ray_dmml.cores import num_cores
from ray_dmml.errors import PeerLostError, UserError

if TYPE_CHECKING:  # which load torch
    import numpy as np

    from ray_dmml.checkpoint import PeerFiles
    from ray_dmml.data.images import Splits

POLL_S = 0.25
"""Seconds between two looks at the peers' progress."""

CONNECT_S = 10.0
"""Seconds until a cluster that does not answer is reported."""

GRACE_S = 5.0
"""When one peer's exchange fails, so long do we wait for the peer that is the cause to be known."""


class PeerActor:
    """The process of one peer.

    It is built by a call, not by its constructor: Ray hides the type of an error that a constructor
    raises. And it alone imports what a peer needs: the driver starts sooner without.
    """

    def build(self, *arguments: Any) -> dict[str, str]:
        from ray_dmml.cohort.member import Member

        self._member = Member(*arguments)
        return self._member.facts

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._member, method)(*arguments)


class RayCohort:
    """A cohort on Ray, in the session that :func:`ray_session` finds or starts.

    Args:
        config: the experiment.
        splits: its images (the actors read their own copy; they are told which to leave out).
        initial_weights: False where a checkpoint replaces them at once.

    Raises:
        UserError: the cluster has not what the peers ask for, or a peer cannot be built.
    """

    def __init__(self, config: Config, splits: Splits, *, initial_weights: bool = True) -> None:
        self.names = tuple(str(peer.name) for peer in config.cohort.peers)
        self._session = ExitStack()
        self._actors: list[Any] = []
        self._group: Any = None
        self._coordinator: Any = None
        self._session.enter_context(ray_session())
        try:
            self._start(config, splits, initial_weights)
        except BaseException:
            self.close()
            raise

    def _start(self, config: Config, splits: Splits, initial_weights: bool) -> None:
        group, bundles = self._reserve(config)
        first = len(group.bundle_specs) - len(bundles)
        self._coordinator = (
            ray.remote(Coordinator)
            .options(num_cpus=0)
            .remote(self.names, config.cohort.exchange_timeout_s, config.cohort.start_timeout_s)
        )
        self.threads = tuple(
            config.cohort.threads_per_peer or max(1, int(bundle["CPU"])) for bundle in bundles
        )
        self._actors = [
            ray.remote(PeerActor)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=first + i
                ),
            )
            .remote()
            for i, bundle in enumerate(bundles)
        ]
        built = self._gather(
            [
                actor.build.remote(
                    config, i, splits.skipped, threads, self._coordinator, initial_weights
                )
                for i, (actor, threads) in enumerate(zip(self._actors, self.threads, strict=True))
            ]
        )
        self.transport: str = built[0]["transport"]
        self.devices = tuple(each["device"] for each in built)

    def _reserve(self, config: Config) -> tuple[PlacementGroup, list[dict[str, float]]]:
        """A place for every peer: in the group this process was started in (as a trial of a search
        is), whose last bundles are the peers', or in a new one."""
        num_peers = len(config.cohort.peers)
        given = get_current_placement_group()
        if given is not None and len(given.bundle_specs) >= num_peers:
            return given, given.bundle_specs[-num_peers:]
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        bundles = plan_bundles(config, nodes)
        self._group = placement_group(bundles, strategy="PACK")
        try:
            ray.get(self._group.ready(), timeout=config.cohort.start_timeout_s)
        except GetTimeoutError:
            raise UserError(
                f"the cluster did not grant {bundles} within {config.cohort.start_timeout_s:g} s "
                f"(cohort.start_timeout_s): it has {_shown(ray.cluster_resources())}, of which "
                f"{_shown(ray.available_resources())} are free"
            ) from None
        return self._group, bundles

    def run(self, start: int, stop: int, on_step: Callable[[int], None]) -> list[StepRow]:
        per_peer = self._gather(self._calls("run", start, stop), on_step)
        on_step(stop)
        return [dict(zip(self.names, terms, strict=True)) for terms in zip(*per_peer, strict=True)]

    def embeddings(self, split: str, *, averaged: bool = False) -> dict[str, np.ndarray]:
        found = self._gather(self._calls("embeddings", split, averaged))
        return dict(zip(self.names, found, strict=True))

    def state(self) -> dict[str, PeerFiles]:
        return dict(zip(self.names, self._gather(self._calls("state")), strict=True))

    def load(self, state: Mapping[str, PeerFiles]) -> None:
        self._give("load", state)

    def load_weights(self, state: Mapping[str, PeerFiles]) -> None:
        self._give("load_weights", state)

    def close(self) -> None:
        for actor in [*self._actors, self._coordinator]:
            if actor is not None:
                ray.kill(actor)
        self._actors, self._coordinator = [], None
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        self._session.close()

    # --- calling ----------------------------------------------------------------------------

    def _calls(self, method: str, *arguments: Any) -> list[Any]:
        """The same call on every peer."""
        return [actor.call.remote(method, *arguments) for actor in self._actors]

    def _give(self, method: str, state: Mapping[str, PeerFiles]) -> None:
        """To every peer what is its own."""
        pairs = zip(self.names, self._actors, strict=True)
        self._gather([actor.call.remote(method, state[name]) for name, actor in pairs])

    # --- waiting ----------------------------------------------------------------------------

    def _gather(self, refs: list[Any], on_step: Callable[[int], None] | None = None) -> list[Any]:
        """The results of one call on every peer. The first failure ends the wait: the peers that
        are left would only sit in an exchange until its deadline.

        Raises:
            UserError: what a peer raised, or which peer died.
        """
        waiting = list(refs)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            for ref in done:
                try:
                    ray.get(ref)
                except (RayTaskError, RayActorError) as error:
                    raise self._explain(error, refs) from error
            if on_step is not None and waiting:
                on_step(min(self._progress().values(), default=0))
        return ray.get(refs)

    def _explain(self, error: Exception, refs: list[Any]) -> Exception:
        """The failure that caused the others: a user's mistake, then a death, then a lost exchange."""
        if _is_mistake(_cause(error)):
            return _cause(error)
        failures, silent = self._failures(refs)
        progress = self._progress()
        # Who waits for a silent peer is silent itself; who got least far is the cause.
        least = min((progress.get(name, 0) for name in silent), default=0)
        silent = [name for name in silent if progress.get(name, 0) == least]
        failures = failures or [(refs[0], error)]
        causes = [_cause(failure) for _, failure in failures]
        for cause in causes:
            if _is_mistake(cause):
                return cause
        for ref, failure in failures:
            # A call that failed on a dead actor is a RayActorError too: that one is the coordinator.
            if isinstance(failure, RayActorError) and not isinstance(failure, RayTaskError):
                name = self.names[refs.index(ref)]
                step = progress.get(name)
                where = "" if step is None else f" after step {step}"
                return PeerLostError(f"{name} died{where}: {_first_line(failure)}")
        for cause in causes:
            if isinstance(cause, RayActorError):
                return PeerLostError(f"the coordinator died: {_first_line(cause)}")
        for cause in causes:
            if isinstance(cause, PeerLostError):
                told, missing = str(cause), ", ".join(silent)
                if told.startswith(missing):
                    return cause
                # torch.distributed does not say for whom it waited; the coordinator does.
                return PeerLostError(f"{missing} gave no answer: {told}")
        return causes[0]

    def _failures(self, refs: list[Any]) -> tuple[list[tuple[Any, Exception]], list[str]]:
        """What the peers raised by now, and who has not answered."""
        done, waiting = ray.wait(refs, num_returns=len(refs), timeout=GRACE_S)
        failures: list[tuple[Any, Exception]] = []
        for ref in done:
            try:
                ray.get(ref)
            except (RayTaskError, RayActorError) as error:
                failures.append((ref, error))
        return failures, [self.names[refs.index(ref)] for ref in waiting]

    def _progress(self) -> dict[str, int]:
        try:
            return ray.get(self._coordinator.progress.remote(), timeout=GRACE_S)
        except (RayActorError, GetTimeoutError):
            return {}


def _cause(error: Exception) -> Exception:
    """What was raised inside the actor, out of Ray's wrapping."""
    return getattr(error, "cause", None) or error


def _is_mistake(error: Exception) -> bool:
    return isinstance(error, UserError) and not isinstance(error, PeerLostError)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def plan_bundles(config: Config, nodes: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """CPUs and GPUs of each peer's actor: as configured, or an even share of what is left.

    Args:
        nodes: the resources of every node of the cluster.

    Raises:
        UserError: more is asked than the cluster, or its largest node, has.
    """
    peers = config.cohort.peers
    cpus = _shares([peer.num_cpus for peer in peers], nodes, "CPU")
    gpus = _shares([peer.num_gpus for peer in peers], nodes, "GPU")
    return [
        {"CPU": cpu, "GPU": gpu} if gpu else {"CPU": cpu}
        for cpu, gpu in zip(cpus, gpus, strict=True)
    ]


def _shares(
    asked: Sequence[float | None], nodes: Sequence[Mapping[str, float]], kind: str
) -> list[float]:
    """Each peer's part of one kind of resource."""
    total = sum(node.get(kind, 0.0) for node in nodes)
    largest = max((node.get(kind, 0.0) for node in nodes), default=0.0)
    given = sum(part for part in asked if part is not None)
    where = f"cohort.peers.*.num_{kind.lower()}s"
    if given > total + 1e-6:
        raise UserError(
            f"the peers ask for {given:g} {kind}s ({where}), but the cluster has {total:g}"
        )
    most = max((part for part in asked if part is not None), default=0.0)
    if most > largest + 1e-6:
        raise UserError(
            f"a peer asks for {most:g} {kind}s ({where}), but the largest node has {largest:g}"
        )
    rest, num_open = max(0.0, total - given), sum(part is None for part in asked)
    share = 0.0
    if num_open and kind == "GPU":
        # 1/2, 1/3, ... so that peers fill whole GPUs: 3 peers on 2 GPUs as 2/3 each would not fit.
        share = 1 / math.ceil(num_open / int(rest)) if rest >= 1 else 0.0
    elif num_open:
        if rest <= 0:
            raise UserError(
                f"the peers that say their {where} take all {total:g} CPUs of the cluster: "
                "leave some for the others"
            )
        share = min(rest / num_open, largest)
        share = float(int(share)) if share > 1 else share
    return [share if part is None else part for part in asked]


def _shown(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


@contextmanager
def ray_session() -> Iterator[None]:
    """Ray for the length of the block: the session this process is in, or the cluster that
    RAY_ADDRESS names, or else a private one on this machine.

    Raises:
        UserError: the cluster cannot be joined.
    """
    if ray.is_initialized():
        yield
        return
    _start_ray()
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray() -> None:
    # Ray reports usage to its makers unless told otherwise; a user who wants that says so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        _require_reachable(address)
        try:
            ray.init(address=address, **settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"RAY_ADDRESS {address} cannot be joined: {error}") from None
    else:
        # "local": without it Ray would join any cluster that was left in the temp folder.
        ray.init("local", num_cpus=num_cores(), include_dashboard=False, **settings)


def _require_reachable(address: str) -> None:
    """Ray itself tries for minutes, in silence."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto", "local": Ray knows at once
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS {address} does not answer ({error}); unset it to run on this machine"
        ) from None
