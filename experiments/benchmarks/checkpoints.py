"""Row `checkpoint`: most memory of the driver while peers save and load a checkpoint."""

from __future__ import annotations

import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.jpegs import write_classes
from benchmarks.memory import peak
from benchmarks.row import Goal, Row, Settings, in_turn, require
from benchmarks.worker import Worker, serve

PEERS = 8
BACKBONE, EMBEDDING_SIZE = "convnext_small", 512
"""50 million weights: 200 MB."""


def driver(num_peers: int) -> dict[str, Any]:
    """In a process of its own: its peak in MiB, and the MB of one peer's files."""
    from ray_dmml.checkpoint.store import CheckpointStore
    from ray_dmml.config.schema import Config
    from ray_dmml.data.datasets import load_splits
    from ray_dmml.ray_backend.peer_actor import PeerActor
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    class FarPeer(PeerActor):
        def reaches(self, folder: Path, mode: int) -> bool:
            return False

    class FarCohort(RayCohort):
        peer_class = FarPeer

    with TemporaryDirectory(prefix="benchmark-") as name:
        write_classes(Path(name, "images"), 4, 4, 40, 40)
        images = {"name": "imagefolder", "root": f"{name}/images", "decode_size": 36, "validation_fraction": 0}
        peer = {"backbone": BACKBONE, "weights": "none", "embedding_size": EMBEDDING_SIZE, "input_size": 32}
        raw = {
            "data": {**images, "classes_per_batch": 2, "images_per_class": 2},
            "cohort": {"base": peer, "peers": [{}] * num_peers},
        }
        config, store = Config.parse(raw), CheckpointStore(Path(name, "checkpoints"))
        with closing((FarCohort if sys.argv[1:] == ["far"] else RayCohort)(config, load_splits(config.data))) as cohort:
            for step in (1, 2):
                store.save(step, cohort.save, {}, best=False)
                checkpoint = store.load("last", verify=False)
                cohort.load(checkpoint.peers)
            sizes = [sum(entry.size for entry in files.entries.values()) for files in checkpoint.peers.values()]
    return {"peak": peak(), "size": max(sizes) / 1e6}


def checkpoint(settings: Settings) -> list[Row]:
    def measured(num_peers: int, *arguments: str) -> float:
        with Worker("checkpoints", *arguments) as worker:  # a peak is that of a whole process
            worker.ask(num_peers)
            answer = worker.answer()
        require(answer["size"] > 195, "a peer's files have 200 MB")
        return float(answer["peak"])

    rows = []
    for where, *arguments in (("",), (" that do not reach its folder", "far")):
        a, b = in_turn(settings.rounds, partial(measured, PEERS, *arguments), partial(measured, 1, *arguments))
        what = f"peak memory of the driver, 200 MB of a checkpoint a peer, {PEERS} peers{where} / 1 peer"
        rows.append(Row("checkpoint", what, "MiB", a, b, Goal("A/B", "<=", 1.2)))
    return rows


if __name__ == "__main__":
    serve(driver)
