"""The actor of one peer: its batches, its steps and its end of the exchange.

``draw batch t -> own view -> embed -> publish -> metric loss -> receive the others -> mutual loss -> backward ->
step every k-th batch``

The driver imports this module, too. So everything that takes seconds to import is imported in :meth:`PeerActor.build`,
which only the actor's process runs.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any

import ray

from ray_dmml.config.schema import Config, DataConfig
from ray_dmml.errors import ReplicaLostError, UserError

if TYPE_CHECKING:
    import numpy as np

    from ray_dmml.checkpoint.store import PeerFiles
    from ray_dmml.data.dataset import Splits
    from ray_dmml.ray_backend.exchange import Exchange

HEARTBEAT_S = 1.0
"""Seconds between two heartbeats."""


@dataclass(frozen=True)
class PeerPlace:
    """Where a peer of a generation is."""

    device: str
    transport: str
    """The way its embeddings take, see :func:`~ray_dmml.ray_backend.rendezvous.connect`."""

    node_id: str
    address: str
    pid: int


class PeerActor:
    """The process of one peer.

    It is built by a call and not by its constructor, because Ray hides the type of an error that a
    constructor raises.
    """

    def __init__(self) -> None:
        self._is_built = False

    def fetch(self, config: DataConfig) -> None:
        """Copies the images to this node if ``data.source`` is set and they are not there."""
        from ray_dmml.data.staging import fetch

        fetch(config)

    def build(
        self,
        config: Config,
        position: int,
        skipped: Sequence[str],
        digests: Mapping[str, str],
        threads: int,
        initial_weights: bool,
        options: Mapping[str, Any],
    ) -> None:
        """Builds the peer.

        Args:
            config: the experiment.
            position: position of the peer in ``cohort.peers``.
            skipped: names of images to leave out.
            digests: digests of the driver's images, by split.
            threads: torch threads.
            initial_weights: False leaves the initial weights unread, because a state is loaded next.
            options: Ray's options for the actors of its replicas.

        Raises:
            UserError: the peer cannot be built as configured, cannot have its device, or its images are
                not the driver's.
            PeerLostError: one of its replicas died.
        """
        from ray_dmml.data.datasets import load_splits
        from ray_dmml.data.loader import BatchLoader, build_sampler
        from ray_dmml.peer.peer import build_peer
        from ray_dmml.ray_backend.exchange import NoExchange
        from ray_dmml.ray_backend.process import device_of, prepare_process
        from ray_dmml.ray_backend.replica_actor import ReplicaActors

        prepare_process(threads)
        self._config = config
        self._splits = load_splits(config.data, skip=frozenset(skipped), check=False)
        peer_config = config.cohort.peers[position]
        _require_same_images(self._splits, digests, config, str(peer_config.name))
        device = device_of(peer_config)
        num_classes = self._splits.train.num_classes
        self._peer = build_peer(config, position, num_classes, device, initial_weights)
        patience = config.cohort.start_timeout_s / 3
        self._replicas = ReplicaActors(self._peer, config.seed, threads, options, patience)
        self._loader = BatchLoader(self._splits.train, build_sampler(config, self._splits), threads)
        self.exchange: Exchange = NoExchange()
        self._num_sent = self._num_chunks = 0
        self._coordinator: Any = None
        self._is_built = True
        Thread(target=self._send_heartbeats, daemon=True).start()

    def join(self, coordinator: Any, names: Sequence[str]) -> PeerPlace:
        """Leaves its generation and joins the next one.

        Args:
            coordinator: the coordinator of the next generation.
            names: its peers in peer order.
        """
        from ray_dmml.cohort.teachers import Teachers
        from ray_dmml.ray_backend.exchange import Members
        from ray_dmml.ray_backend.rendezvous import connect

        self.exchange.close()
        self._rank = list(names).index(self._peer.name)
        self._coordinator = coordinator
        coordinator.heartbeat.remote(self._rank)  # from the first one on, the next are missed
        cohort = self._config.cohort
        sizes = {str(peer.name): peer.embedding_size for peer in cohort.peers}
        self.exchange, transport = connect(
            cohort.transport,
            coordinator,
            self._rank,
            Members(tuple(names), tuple(sizes[name] for name in names)),
            Teachers(len(names), cohort.max_teachers, self._config.seed),
            self._peer.device,
            cohort.start_timeout_s,
        )
        num_replicas = self._replicas.num_replicas
        return PeerPlace(
            device=str(self._peer.device) + (f" x {num_replicas}" if num_replicas > 1 else ""),
            transport=transport,
            node_id=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
            pid=os.getpid(),
        )

    def run(self, start: int, stop: int) -> tuple[list[dict[str, float]], float]:
        """Trains steps ``start .. stop - 1``: the terms of each step's loss, and the seconds spent waiting
        for other peers."""
        rows, waited = [], 0.0
        try:
            with self._replicas.explain_loss():
                for step in range(start, stop):
                    terms, seconds = self._step(step)
                    rows.append(terms)
                    waited += seconds
        except BaseException:
            # Peers that wait for this one in a group are woken when its sockets close.
            self.exchange.close()
            raise
        return rows, waited

    def _step(self, step: int) -> tuple[dict[str, float], float]:
        from ray_dmml.peer.memory import explain_out_of_memory

        batch = self._loader.batch(step)
        with explain_out_of_memory(self._peer, batch):
            out = self._peer.forward(batch)
            self._num_sent = step + 1
            self._report_progress()
            self.exchange.start(step, out.published)
            loss = self._peer.metric_loss(out)
            began = time.perf_counter()
            teachers = self.exchange.finish()
            waited = time.perf_counter() - began
            return self._peer.step(out, loss, teachers), waited

    def embeddings(self, split: str, ema: bool) -> np.ndarray:
        """(N, D) float32 embeddings of a split."""
        from ray_dmml.peer.memory import explain_out_of_memory

        images = getattr(self._splits, split)
        batch_size = self._config.evaluation.batch_size
        with explain_out_of_memory(self._peer), self._replicas.explain_loss():
            return self._peer.embed_images(images, batch_size, ema=ema, after_chunk=self._finish_chunk)

    def state(self) -> PeerFiles:
        """The peer's state, as a checkpoint stores it."""
        from ray_dmml.checkpoint.peer_state import encode_peer

        return encode_peer(self._peer.state_dict())

    def load(self, files: PeerFiles) -> None:
        """Restores what :meth:`state` returned."""
        from ray_dmml.checkpoint.peer_state import decode_peer

        self._peer.load_state_dict(decode_peer(files))

    def load_weights(self, files: PeerFiles) -> None:
        """Loads the weights of the net only."""
        from ray_dmml.checkpoint.peer_state import decode_peer

        self._peer.load_weights(decode_peer(files)["net"])

    def ping(self) -> bool:
        """Whether the peer is built. The answer comes once the actor has finished its last call.

        Raises:
            ReplicaLostError: one of its replicas is gone.
        """
        if self._is_built and not self._replicas.is_complete:
            raise ReplicaLostError(f"{self._peer.name}: one of its replicas was lost")
        return self._is_built

    def _finish_chunk(self) -> None:
        self._num_chunks += 1
        self._report_progress()

    def _report_progress(self) -> None:
        self._coordinator.report.remote(self._rank, self._num_sent, self._num_chunks)

    def _send_heartbeats(self) -> None:
        """Tells a stopped process from one that waits or is busy. torch lets other threads run while it
        computes, and so does a wait for other peers."""
        while True:
            if (coordinator := self._coordinator) is not None:
                coordinator.heartbeat.remote(self._rank)
            time.sleep(HEARTBEAT_S)


def _require_same_images(splits: Splits, digests: Mapping[str, str], config: Config, peer_name: str) -> None:
    """An image's number must mean the same image to all peers, because they exchange embeddings by it.

    Raises:
        UserError: the images of this node are not the driver's.
    """
    own, data = splits.digests(), config.data
    others = [split for split, digest in digests.items() if own.get(split) != digest]
    if not others:
        return
    if data.name == "characters":
        advice = "install the same versions of ray-dmml and matplotlib on all nodes"
    elif data.source is not None:
        advice = "bring every copy up to date by `ray-dmml data fetch`, with --address for all nodes"
    else:
        advice = "give all nodes the same data.root, with the same files and lists in it"
    raise UserError(
        f"{peer_name}: the {', '.join(others)} images on host "
        f"{socket.gethostname()} ({ray.util.get_node_ip_address()}) are not those that the driver has: "
        f"{advice}"
    )
