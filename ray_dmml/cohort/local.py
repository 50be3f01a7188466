"""All peers in this process, one after the other: the reference that every other cohort equals to the bit.

``draw batch t -> each peer: own view -> embed -> publish -> metric loss -> receive the others ->
mutual loss -> backward -> step every k-th batch``
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch

from ray_dmml.checkpoint.peer_files import PeerFiles
from ray_dmml.checkpoint.peer_state import decode_peer, write_peer
from ray_dmml.cohort.cohort import StepRow, names_without
from ray_dmml.cohort.phases import PHASES, PhaseClock
from ray_dmml.cohort.teachers import Teachers
from ray_dmml.config.schema import Config
from ray_dmml.cores import num_cores, num_threads, num_view_workers
from ray_dmml.data.dataset import Splits
from ray_dmml.data.loader import DecodedBatches, build_sampler
from ray_dmml.data.view_loader import ViewLoader
from ray_dmml.errors import NonFiniteTeacherError, PeerLostError
from ray_dmml.peer.build import build_peer, build_view_loader
from ray_dmml.peer.kept_embeddings import keep_embeddings, keeps_embeddings
from ray_dmml.peer.memory import explain_out_of_memory


class LocalCohort:
    """A cohort without Ray.

    Args:
        config: the experiment.
        splits: its images.
        device: device of all peers; None: the first GPU, or the CPU where there is none.
        initial_weights: False leaves the initial weights unread, because a state is loaded next.
    """

    def __init__(
        self,
        config: Config,
        splits: Splits,
        device: torch.device | None = None,
        *,
        initial_weights: bool = True,
    ) -> None:
        if device is None:
            device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        num_peers = len(config.cohort.peers)
        self._config = config
        cores, on_gpu = max(1, num_cores() // num_peers), device.type == "cuda"
        num_workers = [num_view_workers(peer.num_workers, cores, on_gpu=on_gpu) for peer in config.cohort.peers]
        threads = config.cohort.threads_per_peer or num_threads(cores, max(num_workers), on_gpu=on_gpu)
        with ExitStack() as opened:  # workers end if a peer cannot be built
            self._decoded = opened.enter_context(
                closing(DecodedBatches(splits.train, build_sampler(config, splits), threads))
            )
            self._loaders: list[ViewLoader] = []
            for position, number in enumerate(num_workers):
                parts = config, position, splits, self._decoded, device
                loader = build_view_loader(*parts, num_workers=number, threads=threads)
                self._loaders.append(opened.enter_context(closing(loader)))
            self.peers = [
                build_peer(config, i, splits.train.num_classes, device, initial_weights) for i in range(num_peers)
            ]
            opened.pop_all()
        self.names = tuple(peer.name for peer in self.peers)
        self._teachers = Teachers.of(config)
        self.threads = (threads,) * num_peers
        self._clocks = {name: PhaseClock() for name in self.names}
        self.seconds = {name: clock.seconds for name, clock in self._clocks.items()}
        self.devices, self.transport = (str(device),) * num_peers, "in-process"
        self.nodes: tuple[str, ...] = ()
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)

    def run(self, start: int, stop: int, on_step: Callable[[int], None]) -> list[StepRow]:
        rows = []
        batch_size = self._config.data.classes_per_batch * self._config.data.images_per_class
        for peer, loader in zip(self.peers, self._loaders, strict=True):
            if keeps_embeddings(peer):
                with explain_out_of_memory(peer):
                    keep_embeddings(peer, loader.chunks("train", batch_size))
        for step in range(start, stop):
            rows.append(self._step(step))
            on_step(step + 1)
        return rows

    def _step(self, step: int) -> StepRow:
        images, embedding, metric, _, update = PHASES
        # Teachers are the embeddings before any update of this step: all peers embed, then all update.
        outputs = []
        for peer, loader in zip(self.peers, self._loaders, strict=True):
            clock = self._clocks[peer.name]
            clock.start()
            batch = loader.batch(step)
            clock.stop(images)
            with explain_out_of_memory(peer, batch):
                outputs.append(peer.forward(batch))
            clock.stop(embedding)
        row: dict[str, dict[str, float]] = {}
        effect: NonFiniteTeacherError | None = None
        for position, (peer, out, teachers) in enumerate(
            zip(self.peers, outputs, self._teachers.at(step), strict=True)
        ):
            clock = self._clocks[peer.name]
            clock.start()
            with explain_out_of_memory(peer, out.batch):
                loss = peer.metric_loss(out)
                clock.stop(metric)
                published = [outputs[t].published for t in teachers]
                try:
                    row[peer.name] = peer.step(out, loss, published, self._teachers.place(step, position))
                except NonFiniteTeacherError as error:
                    effect = error  # the peer that is its cause fails, too, and is named
            clock.stop(update)
        if effect is not None:
            raise effect
        return row

    def embeddings(self, split: str, *, ema: bool = False) -> dict[str, np.ndarray]:
        return self._embed(split, self.names, ema=ema)

    def features(self, split: str, names: Collection[str]) -> dict[str, np.ndarray]:
        return self._embed(split, names, features=True)

    def _embed(
        self, split: str, names: Collection[str], *, ema: bool = False, features: bool = False
    ) -> dict[str, np.ndarray]:
        embeddings = {}
        for peer, loader in zip(self.peers, self._loaders, strict=True):
            if peer.name in names:
                with explain_out_of_memory(peer):
                    chunks = loader.chunks(split, self._config.evaluation.batch_size)
                    embeddings[peer.name] = peer.embed_images(chunks, ema=ema, features=features)
        return embeddings

    def save(self, folder: Path) -> dict[str, PeerFiles]:
        saved = {}
        for peer in self.peers:
            (folder / peer.name).mkdir()
            saved[peer.name] = write_peer(peer.state_dict(), folder / peer.name)
        return saved

    def load(self, state: Mapping[str, Mapping[str, bytes]]) -> None:
        for peer in self.peers:
            peer.load_state_dict(decode_peer(state[peer.name]))

    def load_weights(self, state: Mapping[str, Mapping[str, bytes]]) -> None:
        for peer in self.peers:
            peer.load_weights(decode_peer(state[peer.name]))

    def recover(self, failure: PeerLostError, *, drop: bool = False) -> None:
        lost = [peer.name for peer, loader in zip(self.peers, self._loaders, strict=True) if not loader.is_complete]
        if not lost:
            raise RuntimeError("peers in one process are lost with it") from failure
        if drop:
            self._drop(lost)
        for loader in self._loaders:
            loader.restart()

    def _drop(self, lost: Collection[str]) -> None:
        self.names = names_without(self.names, lost, self._config.cohort)
        for peer, loader in zip(self.peers, self._loaders, strict=True):
            if peer.name in lost:
                loader.close()
        kept = [(p, loader) for p, loader in zip(self.peers, self._loaders, strict=True) if p.name not in lost]
        self.peers, self._loaders = [peer for peer, _ in kept], [loader for _, loader in kept]
        self.threads, self.devices = self.threads[: len(kept)], self.devices[: len(kept)]
        self._teachers = Teachers(len(kept), self._config.cohort.max_teachers, self._config.seed)

    def close(self) -> None:
        for loader in self._loaders:
            loader.close()
        self._decoded.close()
        torch.set_num_threads(self._threads_before)
