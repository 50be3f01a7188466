"""Small states and files that the tests of checkpoints share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ray_dmml.checkpoint.manifest import dump_with_checksum
from ray_dmml.checkpoint.peer_files import PeerFiles
from ray_dmml.checkpoint.store import Checkpoint, CheckpointStore, WritePeers

FILES = {
    "a": {"weights.safetensors": b"0123456789", "training.pt": bytes(range(256))},
    "b": {"weights.safetensors": b"x" * 1000},
}
META = {"best": 0.5, "config": {"seed": 0}}


def writing(peers: Mapping[str, Mapping[str, bytes]]) -> WritePeers:
    """What peers with these files do in a new checkpoint."""

    def write(folder: Path) -> dict[str, PeerFiles]:
        written = {}
        for peer, files in peers.items():
            (folder / peer).mkdir()
            for name, content in files.items():
                (folder / peer / name).write_bytes(content)
            written[peer] = PeerFiles.written(folder / peer, files)
        return written

    return write


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def peer_state() -> dict[str, Any]:
    """A state with every kind of value that a peer's has."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last)
    return {
        "net": {"weight": weight, "count": torch.tensor(7)},
        "ema": {"weight": weight * 2, "count": torch.tensor(7)},
        "num_ema_updates": torch.tensor(3),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "m": weight}}, "groups": [{"lr": 0.1}]},
        "gradients": {"net.weight": weight.to(torch.bfloat16)},
        "scaler": {},
    }  # fmt: skip


def rewrite_manifest(checkpoint: Path, **changes: Any) -> None:
    """Changes fields of a manifest and renews its checksum, as a stranger could."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["checksum"]
    (checkpoint / "manifest.json").write_bytes(dump_with_checksum({**manifest, **changes}))


def load_without_warnings(store: CheckpointStore, which: str = "last") -> Checkpoint:
    checkpoint, warnings = store.load_with_warnings(which)
    assert warnings == []
    return checkpoint
