"""The actor of one peer: its batches, its steps and its end of the exchange.

``draw batch t -> own view -> embed -> publish -> metric loss -> receive the others -> mutual loss -> backward ->
step every k-th batch``

The driver imports this module, too. So only the methods import what takes seconds to import.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import ray

from ray_dmml.cohort.phases import PHASES, PhaseClock
from ray_dmml.config.code import Files
from ray_dmml.config.schema import Config, DataConfig
from ray_dmml.errors import NonFiniteTeacherError, PeerLostError, ReplicaLostError, UserError, WorkerLostError

if TYPE_CHECKING:
    import numpy as np

    from ray_dmml.checkpoint.peer_files import FileEntry, PeerFiles
    from ray_dmml.data.dataset import Splits


@dataclass(frozen=True)
class PeerPlace:
    """Where a peer of a generation is, and the way its embeddings take."""

    device: str
    transport: str
    node_id: str
    address: str
    pid: int


@dataclass(frozen=True)
class Processes:
    """The processes of a peer.

    Attributes:
        threads: torch threads of its actor and of each replica.
        num_workers: number of its view workers.
        options: Ray's options for the actors of its replicas.
    """

    threads: int
    num_workers: int
    options: Mapping[str, Any]


class PeerActor:
    """The process of one peer. A call builds it, because Ray hides the type of an error that a constructor raises."""

    def __init__(self) -> None:
        self._is_built = False
        self._coordinator: Any = None
        self._heartbeats: Thread | None = None
        self._encoded: dict[str, bytes] = {}
        self._chunks: dict[str, list[bytes]] = {}

    def fetch(self, config: DataConfig) -> None:
        """Copies the images to this node if ``data.source`` is set and they are not there."""
        from ray_dmml.data.staging import fetch

        fetch(config)

    def build(
        self,
        config: Config,
        position: int,
        code: Files,
        skipped: Sequence[str],
        digests: Mapping[str, str],
        processes: Processes,
        initial_weights: bool,
    ) -> None:
        """Builds the peer at a position of ``cohort.peers``.

        Args:
            code: the files of the setting `code`.
            skipped: names of images to leave out.
            digests: digests of the driver's images, by split.
            processes: its threads, view workers and replicas.
            initial_weights: False leaves the initial weights unread, because a state is loaded next.

        Raises:
            UserError: the peer cannot be built, its node lacks an own part, it cannot have its device, or its images
                are not the driver's.
            PeerLostError: one of its replicas died.
        """
        from ray_dmml.data.datasets import load_splits
        from ray_dmml.data.loader import DecodedBatches, build_sampler
        from ray_dmml.peer.build import build_peer, build_view_loader
        from ray_dmml.ray_backend.exchange import Exchange
        from ray_dmml.ray_backend.process import device_of, prepare_process, use_parts
        from ray_dmml.ray_backend.replica_actor import ReplicaActors

        prepare_process(processes.threads)
        self._config = config
        use_parts(config, code)
        self._splits = load_splits(config.data, skip=frozenset(skipped), check=False)
        peer = config.cohort.peers[position]
        _require_same_images(self._splits, digests, config.data, str(peer.name))
        device, threads = device_of(peer), processes.threads
        self._decoded = DecodedBatches(self._splits.train, build_sampler(config, self._splits), threads)
        self._loader = build_view_loader(
            *(config, position, self._splits, self._decoded, device), num_workers=processes.num_workers, threads=threads
        )
        self._peer = build_peer(config, position, self._splits.train.num_classes, device, initial_weights)
        self._replicas = ReplicaActors(self._peer, config, code, threads, processes.options)
        self.exchange = Exchange()
        self._num_sent = self._num_chunks = 0
        self._is_built = True
        if self._heartbeats is None:
            self._heartbeats = Thread(target=self._send_heartbeats, daemon=True)
            self._heartbeats.start()

    def join(self, coordinator: Any, names: Sequence[str]) -> PeerPlace:
        """Leaves its generation and joins the next one: its coordinator and the names of its peers in peer order."""
        from ray_dmml.cohort.teachers import Teachers
        from ray_dmml.ray_backend.exchange import Member
        from ray_dmml.ray_backend.rendezvous import connect

        self.exchange.close()
        self._rank, self._coordinator = list(names).index(self._peer.name), coordinator
        coordinator.heartbeat.remote(self._rank)  # from the first one on, the next are missed
        cohort, device = self._config.cohort, self._peer.device
        self._teachers = Teachers(len(names), cohort.max_teachers, self._config.seed)
        member = Member(self._rank, device, tuple(names), self._teachers, coordinator)
        self.exchange, transport = connect(member, cohort.transport, cohort.start_timeout_s)
        num_replicas, node_id = self._peer.config.num_replicas, ray.get_runtime_context().get_node_id()
        devices = f"{device} x {num_replicas}" if num_replicas > 1 else str(device)
        return PeerPlace(devices, transport, node_id, ray.util.get_node_ip_address(), os.getpid())

    def keep_embeddings(self) -> None:
        """Embeds the training images once if the peer publishes such embeddings."""
        from ray_dmml.peer.kept_embeddings import keep_embeddings
        from ray_dmml.peer.memory import explain_out_of_memory

        batch_size = self._config.data.classes_per_batch * self._config.data.images_per_class
        with explain_out_of_memory(self._peer), self._replicas.explain_loss():
            chunks = self._loader.chunks("train", batch_size)
            keep_embeddings(self._peer, chunks, after_chunk=lambda: self._report(num_chunks=1))

    def run(self, start: int, stop: int) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Trains steps ``start .. stop - 1``. Returns the terms of each step's loss, and the seconds spent in each
        phase."""
        rows, clock = [], PhaseClock()
        try:
            for step in range(start, stop):
                rows.append(self._step(step, clock))
        except NonFiniteTeacherError:
            raise  # the peer that is the cause still needs the exchange to get to its own error
        except BaseException:
            # Peers that wait for this one in a group are woken when its sockets close.
            self.exchange.close()
            raise
        return rows, clock.seconds

    def _step(self, step: int, clock: PhaseClock) -> dict[str, float]:
        from ray_dmml.peer.memory import explain_out_of_memory

        images, embedding, metric, waiting, update = PHASES
        clock.start()
        batch = self._loader.batch(step)
        clock.stop(images)
        with explain_out_of_memory(self._peer, batch), self._replicas.explain_loss():
            out = self._peer.forward(batch)
            self._num_sent = step + 1
            self._report()
            self.exchange.start(step, out.published)
            clock.stop(embedding)
            loss = self._peer.metric_loss(out)
            clock.stop(metric)
            teachers = self.exchange.finish()
            clock.stop(waiting)
            terms = self._peer.step(out, loss, teachers, self._teachers.place(step, self._rank))
            clock.stop(update)
            return terms

    def embeddings(self, split: str, ema: bool, features: bool = False) -> np.ndarray:
        """(N, D) float32 embeddings of a split; or the (N, F) ``features`` of the backbone."""
        from ray_dmml.peer.memory import explain_out_of_memory

        with explain_out_of_memory(self._peer), self._replicas.explain_loss():
            chunks = self._loader.chunks(split, self._config.evaluation.batch_size)
            return self._peer.embed_images(
                chunks, ema=ema, features=features, after_chunk=lambda: self._report(num_chunks=1)
            )

    # --- the files of a checkpoint: read and written by this process, or in chunks (file_transfer) ---

    def reaches(self, folder: Path, mode: int) -> bool:
        """Whether this process can use a folder as ``mode`` says, ``os.R_OK`` or ``os.W_OK``."""
        return os.access(folder, mode | os.X_OK)

    def save(self, folder: Path) -> PeerFiles | None:
        """Writes the peer's state into an empty folder of a new checkpoint. None: this process does not reach it; the
        random name keeps it from taking another folder for it. Raises OSError."""
        from ray_dmml.checkpoint.peer_state import write_peer

        return write_peer(self._peer.state_dict(), folder) if self.reaches(folder, os.W_OK) else None

    def load(self, files: PeerFiles, weights_only: bool) -> bool:
        """Restores what :meth:`save` wrote. False: this process does not reach these files."""
        from ray_dmml.checkpoint.manifest import DamagedError
        from ray_dmml.checkpoint.peer_state import decode_peer

        if not self.reaches(files.folder, os.R_OK):
            return False
        try:
            state = decode_peer(files)
        except DamagedError:  # or those of another run, which this node has in the same place
            return False
        self._restore(state, weights_only)
        return True

    def encode(self) -> dict[str, FileEntry]:
        """Encodes the peer's state as files in memory, for :meth:`read_chunk`."""
        from ray_dmml.checkpoint.peer_files import FileEntry
        from ray_dmml.checkpoint.peer_state import encode_peer

        self._encoded = encode_peer(self._peer.state_dict())
        return {name: FileEntry.of(content) for name, content in self._encoded.items()}

    def read_chunk(self, name: str, start: int, size: int) -> bytes:
        """A part of an encoded file."""
        return self._encoded[name][start : start + size]

    def write_chunk(self, name: str, chunk: bytes) -> None:
        """Takes the next part of a file, for :meth:`load_chunks`."""
        self._chunks.setdefault(name, []).append(chunk)

    def load_chunks(self, entries: Mapping[str, FileEntry], weights_only: bool) -> None:
        """Does the same as :meth:`load` with files that have arrived. Raises PeerLostError if one was damaged on its
        way."""
        from ray_dmml.checkpoint.peer_files import FileEntry
        from ray_dmml.checkpoint.peer_state import decode_peer

        files = {name: b"".join(self._chunks.pop(name, [])) for name in entries}
        if {name: FileEntry.of(content) for name, content in files.items()} != entries:
            raise PeerLostError(f"{self._peer.name}: its files of a checkpoint were damaged on their way")
        self._restore(decode_peer(files), weights_only)

    def forget(self) -> None:
        """Frees what was encoded or has arrived."""
        self._encoded.clear()
        self._chunks.clear()

    def _restore(self, state: dict[str, Any], weights_only: bool) -> None:
        if weights_only:
            self._peer.load_weights(state)
        else:
            self._peer.load_state_dict(state)

    def rest(self) -> bool:
        """Forgets the run, and keeps the process for another :meth:`build`. False: it cannot, since it has replicas."""
        from ray_dmml.ray_backend.process import free_memory

        if not self._is_built or self._peer.config.num_replicas > 1:
            return False
        self._is_built, self._coordinator = False, None
        self.exchange.close()
        self._loader.close()
        self._decoded.close()
        del self._peer, self._replicas, self._loader, self._decoded, self._splits
        free_memory()
        return True

    def ping(self) -> bool:
        """Whether the peer is built. The answer comes once the actor has finished its last call. Raises
        ReplicaLostError if one of its replicas is gone, WorkerLostError if one of its view workers is."""
        if self._is_built and not self._replicas.is_complete:
            raise ReplicaLostError(f"{self._peer.name}: one of its replicas was lost")
        if self._is_built and not self._loader.is_complete:
            raise WorkerLostError(f"{self._peer.name}: one of its view workers was lost")
        return self._is_built

    def _report(self, num_chunks: int = 0) -> None:
        self._num_chunks += num_chunks
        self._coordinator.report.remote(self._rank, self._num_sent, self._num_chunks)

    def _send_heartbeats(self) -> None:
        """torch lets this thread run while it computes, and so does a wait for other peers."""
        while True:
            if (coordinator := self._coordinator) is not None:
                coordinator.heartbeat.remote(self._rank)
            time.sleep(1.0)


def _require_same_images(splits: Splits, digests: Mapping[str, str], data: DataConfig, peer_name: str) -> None:
    """Raises UserError if an image's number does not mean the same image as in the driver. Peers exchange embeddings
    by it."""
    own = splits.digests()
    others = [split for split, digest in digests.items() if own.get(split) != digest]
    if not others:
        return
    advice = "give all nodes the same data.root, with the same files and lists in it"
    if data.name == "characters":
        advice = "install the same versions of ray-dmml and matplotlib on all nodes"
    elif data.source is not None:
        advice = (
            "bring every copy up to date by `ray-dmml data fetch` (with --address for all nodes), and remove files "
            "that data.source no longer has"
        )
    raise UserError(
        f"{peer_name}: the {', '.join(others)} images on host {socket.gethostname()} "
        f"({ray.util.get_node_ip_address()}) are not those that the driver has: {advice}"
    )
