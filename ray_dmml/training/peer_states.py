"""The states of peers between a cohort and the checkpoints of its run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ray_dmml.checkpoint.manifest import DamagedError
from ray_dmml.checkpoint.peer_files import PeerFiles
from ray_dmml.checkpoint.store import Checkpoint, CheckpointStore
from ray_dmml.cohort.cohort import Cohort


def load_peers(cohort: Cohort, store: CheckpointStore, checkpoint: Checkpoint) -> Checkpoint:
    """Puts all peers into the state of a checkpoint. If a peer finds a damaged file, they get the newest undamaged one
    before it. Returns the one that they got.

    Raises:
        UserError: no checkpoint can be used.
    """
    while True:
        try:
            cohort.load(checkpoint.peers)
            for name, files in checkpoint.peers.items():
                if name not in cohort.names:  # of a dropped peer: nobody else reads them
                    files.verify()
            return checkpoint
        except DamagedError as damage:
            store.set_aside(checkpoint, damage)
            checkpoint = store.load("last", verify=False)


def write_peers(cohort: Cohort, store: CheckpointStore, dropped: Collection[str], folder: Path) -> dict[str, PeerFiles]:
    """All peers write their states into a folder. Those of dropped peers are copied from the last checkpoint. Raises
    OSError or DamagedError if that is not possible."""
    copied = {}
    if dropped:
        last, _ = store.load_with_warnings("last", verify=False)
        copied = {name: last.peers[name].copy_to(folder / name) for name in dropped}
    return {**cohort.save(folder), **copied}
