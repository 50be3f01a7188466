"""A replica in a process of its own. A process imports this module, which has to be fast."""

from __future__ import annotations

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from ray_dmml.config.schema import PeerConfig
from ray_dmml.peer.data_parallel import Replica, ReplicaChannel

RUN_SEED = 7
NAME = "peer0"


def connect(path: str, rank: int, size: int) -> ReplicaChannel:
    """The channel of one process; ``path`` is a file that all of them share."""
    return ReplicaChannel(FileStore(path, size), rank, size, torch.device("cpu"), NAME, 60)


def serve(path: str, rank: int, size: int, config: PeerConfig, micro_batch: int | None) -> None:
    torch.set_num_threads(1)
    Replica(config, RUN_SEED, connect(path, rank, size), micro_batch).serve()
