"""Files of a checkpoint between the driver and a peer whose node cannot reach the run's folder.

They go in chunks, so the driver holds one chunk at a time, however many peers there are. The peer holds its files in
memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_dmml.checkpoint.peer_files import CHUNK, PeerFiles

Ask = Callable[[Any], Any]
"""Waits for the result of a call on the peer."""


def fetch(actor: Any, ask: Ask, folder: Path) -> PeerFiles:
    """Writes the state of a peer into an empty folder of this process. Raises OSError."""
    try:
        entries = ask(actor.encode.remote())
        for name, entry in entries.items():
            with (folder / name).open("wb") as file:
                for start in range(0, entry.size, CHUNK):
                    file.write(ask(actor.read_chunk.remote(name, start, CHUNK)))
    finally:
        actor.forget.remote()
    files = PeerFiles.written(folder, entries)
    if files.entries != entries:
        raise OSError(f"{folder}: the files were damaged on their way from the peer")
    return files


def send(actor: Any, ask: Ask, files: PeerFiles, weights_only: bool) -> None:
    """Restores the state of a peer from files that this process reads. Raises DamagedError."""
    files.verify()
    try:
        for name in files:
            for chunk in files.chunks(name, CHUNK):
                ask(actor.write_chunk.remote(name, chunk))
        ask(actor.load_chunks.remote(files.entries, weights_only))
    finally:
        actor.forget.remote()
