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

from ray_dmml.config.code import Files, use_code
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.errors import ReplicaLostError
from ray_dmml.peer.data_parallel import LOOPBACK, Replica, ReplicaChannel, Replicas
from ray_dmml.peer.peer import Peer
from ray_dmml.ray_backend.failures import cause_of, first_line, is_user_mistake
from ray_dmml.ray_backend.process import device_of, prepare_process
from ray_dmml.ray_backend.rendezvous import store_at


class ReplicaActor:
    """The process of one more replica of a peer."""

    def build(self, config: PeerConfig, run_seed: int, micro_batch: int | None, code: Files, threads: int) -> None:
        prepare_process(threads)
        use_code(code)
        self._config, self._run_seed, self._micro_batch = config, run_seed, micro_batch
        self._device = device_of(config)

    def serve(self, port: int, rank: int, patience: float) -> None:
        """Works until the peer is gone."""
        config, store = self._config, TCPStore(LOOPBACK, port, is_master=False)
        channel = ReplicaChannel(store, rank, config.num_replicas, self._device, str(config.name), patience)
        Replica(config, self._run_seed, channel, self._micro_batch).serve()


class ReplicaActors:
    """The replica actors of a peer, which become its ``replicas`` if it has any. ``options`` are Ray's for each one.
    ``code``: the files of the setting `code`. The peer's actor owns them, so Ray ends them with it.

    Raises:
        ReplicaLostError: a replica died at its start.
    """

    def __init__(self, peer: Peer, config: Config, code: Files, threads: int, options: Mapping[str, Any]) -> None:
        self.is_complete = True  # False once a replica is lost
        self._serving: list[Any] = []
        size = peer.config.num_replicas
        if size == 1:
            return
        self._actors = [ray.remote(ReplicaActor).options(**options).remote() for _ in range(1, size)]
        try:
            arguments = peer.config, config.seed, config.data.micro_batch, code, threads
            ray.get([actor.build.remote(*arguments) for actor in self._actors])
        except RayActorError as error:
            raise ReplicaLostError(f"{peer.name}: a replica died at its start: {first_line(error)}") from error
        patience = config.cohort.start_timeout_s / 3
        store = store_at(LOOPBACK, timedelta(seconds=patience))
        self._serving = [
            actor.serve.remote(store.port, rank, patience) for rank, actor in enumerate(self._actors, start=1)
        ]
        with self.explain_loss():
            peer.replicas = Replicas(ReplicaChannel(store, 0, size, peer.device, peer.name, patience))

    @contextmanager
    def explain_loss(self) -> Iterator[None]:
        """If a replica is lost inside the block because of a user's mistake or a lack of memory, raises that."""
        try:
            yield
        except ReplicaLostError:
            self.is_complete = False
            ray.wait(self._serving, timeout=2.0)  # a replica that failed reports its reason meanwhile
            for ref in self._serving:
                try:
                    ray.get(ref, timeout=0)
                except RayTaskError as error:
                    cause = cause_of(error)
                    if is_user_mistake(cause) or isinstance(cause, torch.OutOfMemoryError):
                        raise cause from error
                except RayError:  # still at work, or dead
                    pass
            raise
