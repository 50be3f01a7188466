"""The further processes of a peer that has more than one device, and the peer's watch over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import ReplicaLostError, UserError
from ray_dmml.peer.data_parallel import LOOPBACK, Replica, ReplicaChannel, Replicas
from ray_dmml.peer.peer import Peer
from ray_dmml.ray_backend.process import device_of, prepare_process
from ray_dmml.ray_backend.rendezvous import store_at

GRACE_S = 2.0
"""Seconds in which a replica that failed can report its reason."""


class ReplicaActor:
    """The process of one more replica of a peer."""

    def build(self, config: PeerConfig, run_seed: int, threads: int) -> None:
        prepare_process(threads)
        self._config, self._run_seed = config, run_seed
        self._device = device_of(config)

    def serve(self, port: int, rank: int, size: int, patience: float) -> None:
        """Works until the peer is gone."""
        store = TCPStore(LOOPBACK, port, is_master=False)
        name = str(self._config.name)
        channel = ReplicaChannel(store, rank, size, self._device, name, patience)
        Replica(self._config, self._run_seed, channel).serve()


class ReplicaActors:
    """The replica actors of a peer. The peer's actor owns them, so Ray ends them with it.

    Args:
        peer: the peer; its ``replicas`` are set if it has any.
        run_seed: seed of the run.
        threads: torch threads of each replica.
        options: Ray's options for their actors.
        patience: seconds until all replicas must be there.

    Raises:
        ReplicaLostError: a replica died at its start.
    """

    def __init__(self, peer: Peer, run_seed: int, threads: int, options: Mapping[str, Any], patience: float) -> None:
        self.is_complete = True
        """False once a replica is lost."""

        self.num_replicas = peer.config.num_replicas
        self._serving: list[Any] = []
        if self.num_replicas == 1:
            return
        self._actors = [ray.remote(ReplicaActor).options(**options).remote() for _ in range(1, self.num_replicas)]
        try:
            ray.get([actor.build.remote(peer.config, run_seed, threads) for actor in self._actors])
        except RayActorError as error:
            reason = str(error).strip().splitlines()[0]
            raise ReplicaLostError(f"{peer.name}: a replica died at its start: {reason}") from error
        store = store_at(LOOPBACK, timedelta(seconds=patience))
        self._serving = [
            actor.serve.remote(store.port, rank, self.num_replicas, patience)
            for rank, actor in enumerate(self._actors, start=1)
        ]
        with self.explain_loss():
            peer.replicas = Replicas(ReplicaChannel(store, 0, self.num_replicas, peer.device, peer.name, patience))

    @contextmanager
    def explain_loss(self) -> Iterator[None]:
        """If a replica is lost inside the block because of a user's mistake or a lack of memory, raises that."""
        try:
            yield
        except ReplicaLostError:
            self.is_complete = False
            ray.wait(self._serving, timeout=GRACE_S)
            for ref in self._serving:
                try:
                    ray.get(ref, timeout=0)
                except RayTaskError as error:
                    cause = getattr(error, "cause", None)
                    explains = isinstance(cause, (UserError, torch.OutOfMemoryError))
                    if cause is not None and explains and not isinstance(cause, ReplicaLostError):
                        raise cause from error
                except RayError:  # still at work, or dead
                    pass
            raise
