"""What runs inside a peer's actor: the peer, its batches, and its end of the exchange.

draw batch t -> own view -> embed -> publish -> metric loss -> the others' embeddings
-> relational loss -> backward -> step every k-th batch
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ray_dmml.checkpoint.peer_state import decode_peer, encode_peer
from ray_dmml.checkpoint.store import PeerFiles
from ray_dmml.cohort.local import build_peer
from ray_dmml.cohort.teachers import Teachers
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.data.dataset import Splits
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.loader import BatchLoader, build_sampler
from ray_dmml.errors import ReplicaLostError, UserError
from ray_dmml.peer.data_parallel import LOOPBACK, Replica, ReplicaChannel, Replicas
from ray_dmml.ray_backend.exchange import Exchange, Members, NoExchange, connect, store_at

BEAT_S = 1.0
"""From one sign of life to the next."""

REPLICA_GRACE_S = 2.0
"""Until one that failed has said why."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


class Member:
    """One peer of a cohort on Ray; it delegates to :class:`~ray_dmml.peer.peer.Peer`.

    Args:
        config: the experiment.
        position: of the peer in it.
        skipped: names of images to leave out.
        digests: of the driver's images, by split.
        threads: of torch.
        initial_weights: False where a checkpoint replaces them at once.
        options: Ray's for the actors of its replicas.

    Raises:
        UserError: the peer cannot be built as configured, or cannot have the device, or its images are
            not the driver's.
        PeerLostError: a replica of it died on the way.
    """

    def __init__(
        self,
        config: Config,
        position: int,
        skipped: Sequence[str],
        digests: Mapping[str, str],
        threads: int,
        initial_weights: bool,
        options: Mapping[str, Any],
    ) -> None:
        torch.set_num_threads(threads)
        tune_malloc()
        self._config = config
        self._splits = load_splits(config.data, skip=frozenset(skipped), check=False)
        _require_same(self._splits, digests, config, position)
        self._device = _device(config.cohort.peers[position])
        self._peer = build_peer(config, position, self._splits, self._device, initial_weights)
        self._is_whole = True
        self._serving: list[Any] = []
        self._replicas = self._start_replicas(threads, options)
        sampler = build_sampler(config, self._splits)
        self._loader = BatchLoader(self._splits.train, sampler, threads)
        self._exchange: Exchange = NoExchange()
        self._sent = self._chunks = 0
        self._coordinator: Any = None
        Thread(target=self._beat, daemon=True).start()

    def join(self, coordinator: Any, names: Sequence[str]) -> dict[str, Any]:
        """Enters a generation, out of the one before.

        Args:
            coordinator: the generation's own.
            names: its peers, in peer order.

        Returns:
            what there is to know about the peer's place in it.
        """
        self._exchange.close()
        self._rank = list(names).index(self._peer.name)
        self._coordinator = coordinator
        coordinator.beat.remote(self._rank)  # the first, from which on the next are missed
        sizes = {peer.name: peer.embedding_size for peer in self._config.cohort.peers}
        self._exchange, transport = connect(
            self._config.cohort.transport,
            coordinator,
            self._rank,
            Members(tuple(names), tuple(sizes[name] for name in names)),
            Teachers(len(names), self._config.cohort.max_teachers, self._config.seed),
            self._device,
            self._config.cohort.start_timeout_s,
        )
        return {
            "device": str(self._device)
            + (f" x {1 + len(self._replicas)}" if self._replicas else ""),
            "transport": transport,
            "node": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
        }

    def run(self, start: int, stop: int) -> tuple[list[dict[str, float]], float]:
        """The terms of each step's loss, and the seconds spent waiting for other peers."""
        try:
            with self._peer.enough_memory(), self._replicas_told():
                return self._run(start, stop)
        except BaseException:
            # Who waits for this peer in a group is woken when its sockets close.
            self._exchange.close()
            raise

    def _run(self, start: int, stop: int) -> tuple[list[dict[str, float]], float]:
        rows, waited = [], 0.0
        for step in range(start, stop):
            batch = self._loader.batch(step)
            published = self._peer.embed(batch)
            self._sent = step + 1
            self._give_sign()
            self._exchange.start(step, published)
            self._peer.measure()
            began = time.perf_counter()
            others = self._exchange.finish()
            waited += time.perf_counter() - began
            rows.append(self._peer.update(others))
        return rows, waited

    def embeddings(self, split: str, ema: bool) -> np.ndarray:
        images = getattr(self._splits, split)
        size = self._config.evaluation.batch_size
        with self._peer.enough_memory(), self._replicas_told():
            return self._peer.embed_images(images, size, ema=ema, after_chunk=self._finish_chunk)

    def _finish_chunk(self) -> None:
        self._chunks += 1
        self._give_sign()

    def _beat(self) -> None:
        """Tells a stopped process from one that waits or has much to do. torch lets other threads run
        while it computes, and so does a wait for others."""
        while True:
            if (coordinator := self._coordinator) is not None:
                coordinator.beat.remote(self._rank)
            time.sleep(BEAT_S)

    def _give_sign(self) -> None:
        self._coordinator.report.remote(self._rank, self._sent, self._chunks)

    # --- replicas ---------------------------------------------------------------------------

    def _start_replicas(self, threads: int, options: Mapping[str, Any]) -> list[Any]:
        """Actors that this one owns: Ray ends them with it."""
        peer, patience = self._peer.config, self._config.cohort.start_timeout_s / 3
        size = peer.num_replicas
        if size == 1:
            return []
        actors = [ray.remote(ReplicaActor).options(**options).remote() for _ in range(1, size)]
        try:
            ray.get([actor.build.remote(peer, self._config.seed, threads) for actor in actors])
        except RayActorError as error:
            why = str(error).strip().splitlines()[0]
            raise ReplicaLostError(
                f"{self._peer.name}: a replica died at its start: {why}"
            ) from error
        store = store_at(LOOPBACK, timedelta(seconds=patience))
        self._serving = [
            actor.serve.remote(store.port, rank, size, patience)
            for rank, actor in enumerate(actors, start=1)
        ]
        with self._replicas_told():
            channel = ReplicaChannel(store, 0, size, self._device, self._peer.name, patience)
        self._peer.replicas = Replicas(channel)
        return actors

    @contextmanager
    def _replicas_told(self) -> Iterator[None]:
        """Why one was lost, where that is more than that it was."""
        try:
            yield
        except ReplicaLostError:
            self._is_whole = False
            ray.wait(self._serving, timeout=REPLICA_GRACE_S)
            for ref in self._serving:
                try:
                    ray.get(ref, timeout=0)
                except RayTaskError as error:
                    cause = getattr(error, "cause", None)
                    is_told = isinstance(cause, (UserError, torch.OutOfMemoryError))
                    if cause is not None and is_told and not isinstance(cause, ReplicaLostError):
                        raise cause from error
                except RayError:  # still at work, or dead
                    pass
            raise

    def check_healthy(self) -> None:
        """Raises ReplicaLostError where one of its replicas is gone."""
        if not self._is_whole:
            raise ReplicaLostError(f"{self._peer.name}: one of its replicas was lost")

    def state(self) -> PeerFiles:
        return encode_peer(self._peer.state_dict())

    def load(self, files: PeerFiles) -> None:
        self._peer.load_state_dict(decode_peer(files))

    def load_weights(self, files: PeerFiles) -> None:
        self._peer.load_weights(decode_peer(files)["net"])

    def close(self) -> None:
        self._loader.close()
        self._exchange.close()
        for replica in self._replicas:
            ray.kill(replica)


class ReplicaActor:
    """The process of one more replica of a peer."""

    def build(self, config: PeerConfig, run_seed: int, threads: int) -> None:
        torch.set_num_threads(threads)
        tune_malloc()
        self._config, self._run_seed = config, run_seed
        self._device = _device(config)

    def serve(self, port: int, rank: int, size: int, patience: float) -> None:
        """Until the peer is gone."""
        store = TCPStore(LOOPBACK, port, is_master=False)
        channel = ReplicaChannel(store, rank, size, self._device, str(self._config.name), patience)
        Replica(self._config, self._run_seed, channel).serve()


def _require_same(
    splits: Splits, digests: Mapping[str, str], config: Config, position: int
) -> None:
    """An image's number must mean the same image to all peers: they exchange embeddings by it.

    Raises:
        UserError: the node's copy, or what it sees of a shared folder, is of another time.
    """
    own, data = splits.digests(), config.data
    others = [name for name, digest in digests.items() if own.get(name) != digest]
    if not others:
        return
    if data.name == "characters":
        advice = "install the same versions of ray-dmml and matplotlib on all nodes"
    elif data.source is not None:
        advice = (
            "bring every copy up to date by `ray-dmml data fetch`, with --address for all nodes"
        )
    else:
        advice = "give all nodes the same data.root, with the same files and lists in it"
    raise UserError(
        f"{config.cohort.peers[position].name}: the {', '.join(others)} images on host "
        f"{socket.gethostname()} ({ray.util.get_node_ip_address()}) are not those that the driver has: "
        f"{advice}"
    )


def _device(peer: PeerConfig) -> torch.device:
    """The GPU that Ray gave this actor, which alone is visible to it, else the CPU.

    Raises:
        UserError: the config asks for GPUs and torch has no use of them.
    """
    if ray.get_gpu_ids():
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        if peer.num_gpus:
            raise UserError(
                f"{peer.name}: num_gpus is {peer.num_gpus:g} and Ray found a GPU, but this torch "
                f"({torch.__version__}) cannot use it: install a CUDA build and the driver"
            )
    return torch.device("cpu")


def tune_malloc() -> None:
    """Has the C library keep what a step frees for the next step, in a process of our own.

    As it is, glibc hands blocks of the size of activations back to the system at once, and the
    kernel clears their pages anew at every step: 86,000 page faults a step of EfficientNet-Lite0
    on 64 images of 96 px, and a fourth of its time on two CPU cores.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    # Before 2.35 glibc refuses more than 32 MiB; with no threshold set the others do harm.
    if not mallopt(_M_MMAP_THRESHOLD, 2**30) and not mallopt(_M_MMAP_THRESHOLD, 2**25):
        return
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**26)
