"""All peers in this process, in turn: the reference that every other cohort equals to the bit.

draw batch t -> each peer: own view -> embed -> publish -> metric loss -> the others' embeddings
-> relational loss -> backward -> step every k-th batch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from ray_dmml.checkpoint.peer_state import decode_peer, encode_peer
from ray_dmml.checkpoint.store import PeerFiles
from ray_dmml.cohort.cohort import StepRow
from ray_dmml.cohort.teachers import Teachers
from ray_dmml.config.schema import Config
from ray_dmml.cores import num_cores
from ray_dmml.data.dataset import Splits
from ray_dmml.data.loader import BatchLoader, build_sampler
from ray_dmml.peer.peer import Peer


def build_peer(
    config: Config, position: int, splits: Splits, device: torch.device, initial_weights: bool
) -> Peer:
    """The peer at a position of ``cohort.peers``."""
    return Peer(
        config.cohort.peers[position],
        config.loss,
        run_seed=config.seed,
        num_classes=splits.train.num_classes,
        decode_size=config.data.decode_size,
        device=device,
        on_nonfinite=config.failure.on_nonfinite,
        max_consecutive_nonfinite=config.failure.max_consecutive_nonfinite,
        initial_weights=initial_weights,
    )


class LocalCohort:
    """A cohort without Ray.

    Args:
        config: the experiment.
        splits: its images.
        device: where all peers compute; None: the first GPU, else the CPU.
        initial_weights: False where a checkpoint replaces them at once.
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
        self._config, self._splits = config, splits
        self.peers = [
            build_peer(config, i, splits, device, initial_weights) for i in range(num_peers)
        ]
        self.names = tuple(peer.name for peer in self.peers)
        self._teachers = Teachers.of(config)
        threads = config.cohort.threads_per_peer or max(1, num_cores() // num_peers)
        self._loader = BatchLoader(splits.train, build_sampler(config, splits), threads)
        self.threads = (threads,) * num_peers
        self.waited = dict.fromkeys(self.names, 0.0)
        self.devices, self.transport = (str(device),) * num_peers, "in-process"
        self.nodes: tuple[str, ...] = ()
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)

    def run(self, start: int, stop: int, on_step: Callable[[int], None]) -> list[StepRow]:
        rows = []
        for step in range(start, stop):
            batch = self._loader.batch(step)
            # Teachers are the embeddings from before any update: embed all, exchange, update all.
            published, row = [], {}
            for peer in self.peers:
                with peer.enough_memory():
                    published.append(peer.embed(batch))
            for peer, teachers in zip(self.peers, self._teachers.at(step), strict=True):
                with peer.enough_memory():
                    row[peer.name] = peer.update([published[teacher] for teacher in teachers])
            rows.append(row)
            on_step(step + 1)
        return rows

    def embeddings(self, split: str, *, ema: bool = False) -> dict[str, np.ndarray]:
        images, size = getattr(self._splits, split), self._config.evaluation.batch_size
        return {peer.name: peer.embed_images(images, size, ema=ema) for peer in self.peers}

    def state(self) -> dict[str, PeerFiles]:
        return {peer.name: encode_peer(peer.state_dict()) for peer in self.peers}

    def load(self, state: Mapping[str, PeerFiles]) -> None:
        for peer in self.peers:
            peer.load_state_dict(decode_peer(state[peer.name]))

    def load_weights(self, state: Mapping[str, PeerFiles]) -> None:
        for peer in self.peers:
            peer.load_weights(decode_peer(state[peer.name])["net"])

    def recover(self, *, drop: bool = False) -> None:
        raise RuntimeError("peers in one process are lost with it")

    def close(self) -> None:
        self._loader.close()
        torch.set_num_threads(self._threads_before)
