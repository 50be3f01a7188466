"""Atomic, verified, portable checkpoints of a whole cohort.

    RUN/checkpoints/
        index.json                      which step is last, which is best on validation
        step-00000300/
            manifest.json               step, config, sizes and SHA-256 of every file
            peer0/weights.safetensors   the net: what evaluation and --init-from need
            peer0/averaged.safetensors  its averaged weights, where it keeps them
            peer0/training.pt           what resuming needs besides, read with weights_only=True

A checkpoint is written beside its place, synced and renamed; the index is replaced in one move after
it. So whatever is interrupted, `last` names a complete checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_dmml.errors import UserError

FORMAT = 1
"""Rises when an older reader could not read what a newer one writes."""

PeerFiles = dict[str, bytes]
"""A peer's state as it is stored and as it travels: file names to contents."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint read back."""

    path: Path
    step: int
    """Finished steps."""

    meta: dict[str, Any]
    """What the trainer stored beside the peers: config, best validation so far."""

    peers: dict[str, PeerFiles]


class CheckpointStore:
    """The checkpoints of a run: the last one and the best one are kept.

    Args:
        folder: RUN/checkpoints; made at the first save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(
        self, step: int, peers: Mapping[str, PeerFiles], meta: Mapping[str, Any], *, best: bool
    ) -> Path:
        """Writes a checkpoint, makes it the last (and the best), removes those no longer named.

        Raises:
            UserError: it cannot be written; what was there before is untouched.
        """
        name = f"step-{step:08d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            index = self.index()
            if name not in index.values():
                if (self.folder / name).exists():  # of a save that ended before its index
                    shutil.rmtree(self.folder / name)
                self._write(name, step, peers, meta)
            index = {**index, "last": name, **({"best": name} if best else {})}
            _write_synced(self.folder / "index.json.tmp", json.dumps(index).encode())
            os.replace(self.folder / "index.json.tmp", self.folder / "index.json")
            _sync_folder(self.folder)
        except OSError as error:
            raise UserError(f"checkpoint of step {step} cannot be written: {error}") from None
        for old in self.folder.iterdir():
            if old.is_dir() and old.name not in index.values():
                shutil.rmtree(old, ignore_errors=True)
        return self.folder / name

    def index(self) -> dict[str, str]:
        """``{"last": name, "best": name}``, as far as there are any."""
        try:
            found = json.loads((self.folder / "index.json").read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(f"{self.folder / 'index.json'} is damaged: {error}") from None
        return {key: str(found[key]) for key in ("last", "best") if key in found}

    def path(self, which: str) -> Path:
        """Folder of the ``last`` or the ``best`` checkpoint, which there is."""
        return self.folder / self.index()[which]

    def adopt(self, checkpoint: Path) -> None:
        """Takes the folder of another run's checkpoint as its own last one, and its only one.

        Raises:
            UserError: it is damaged.
        """
        name = f"step-{read_checkpoint(checkpoint).step:08d}"
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(checkpoint, self.folder / name)
        _write_synced(self.folder / "index.json", json.dumps({"last": name}).encode())

    def load(self, which: str) -> Checkpoint:
        """Reads and verifies the ``last`` or the ``best`` checkpoint.

        Raises:
            UserError: there is none, a file is missing or damaged, or a newer version wrote it.
        """
        index = self.index()
        if which not in index:
            held_out = " (no validation classes were held out)" if which == "best" and index else ""
            raise UserError(f"{self.folder} has no {which} checkpoint{held_out}")
        return read_checkpoint(self.folder / index[which])

    def _write(
        self, name: str, step: int, peers: Mapping[str, PeerFiles], meta: Mapping[str, Any]
    ) -> None:
        aside = self.folder / f".{name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            files = {}
            for peer, contents in peers.items():
                (aside / peer).mkdir(parents=True)
                for file, content in contents.items():
                    _write_synced(aside / peer / file, content)
                    files[f"{peer}/{file}"] = {
                        "size": len(content),
                        "sha256": hashlib.sha256(content).hexdigest(),
                    }
            manifest = {"format": FORMAT, "step": step, "files": files, "meta": dict(meta)}
            _write_synced(aside / "manifest.json", json.dumps(manifest, indent=1).encode())
            for folder in [*(aside / peer for peer in peers), aside]:
                _sync_folder(folder)
            os.rename(aside, self.folder / name)
            _sync_folder(self.folder)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint folder and verifies every file against its manifest.

    Raises:
        UserError: a file is missing or damaged (named), or a newer version wrote it.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] > FORMAT:
            raise UserError(
                f"checkpoint {path} has format {manifest['format']}; this version reads up to "
                f"{FORMAT}: update ray-dmml"
            )
        peers: dict[str, PeerFiles] = {}
        for name, expected in manifest["files"].items():
            content = (path / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != expected["sha256"]:
                raise UserError(
                    f"checkpoint file {path / name} is damaged: {len(content)} bytes that do not match "
                    f"the manifest's checksum ({expected['size']} bytes were written)"
                )
            peer, file = name.split("/")
            peers.setdefault(peer, {})[file] = content
        return Checkpoint(path, int(manifest["step"]), manifest["meta"], peers)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'manifest.json'} is damaged: {error!r}") from None


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
