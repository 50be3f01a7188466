"""Atomic, verified, portable checkpoints of a whole cohort.

    RUN/checkpoints/
        index.json                      names of the last checkpoint and of the best on validation
        step-00000300/
            manifest.json               step, config, size and SHA-256 of every file
            peer0/weights.safetensors   the net, enough for evaluation and --init-from
            peer0/ema.safetensors       its averaged weights, if the peer has them
            peer0/training.pt           the rest of its state for resuming, read with weights_only=True

A checkpoint is written under a temporary name, synced and renamed. Then one rename replaces the index,
and only then older checkpoints are removed. After an interruption at any point, ``last`` names a complete
checkpoint. No folder is written twice: a step that is saved again gets a name such as step-00000300-2
while its first folder is still in use.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_dmml.checkpoint.manifest import (
    DamagedError,
    dump_manifest,
    dump_with_checksum,
    load_with_checksum,
    read_manifest,
)
from ray_dmml.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)

STEP_FOLDER = re.compile(r"step-(\d{8,12})(?:-(\d{1,6}))?")
"""Name of a checkpoint's folder: the step, and a number if the step was saved more than once."""

PeerFiles = dict[str, bytes]
"""The state of a peer as files: names to contents."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    step: int
    """Number of finished steps."""

    meta: dict[str, Any]
    """JSON data of the trainer, such as the config and the best validation result so far."""

    peers: dict[str, PeerFiles]


class CheckpointStore:
    """The checkpoints of a run. It keeps the last few and the best one.

    Args:
        folder: RUN/checkpoints; the first save creates it.
        num_to_keep: number of last checkpoints to keep, at least one. The best one is kept in addition.
    """

    def __init__(self, folder: Path, num_to_keep: int = 2) -> None:
        self.folder, self.num_to_keep = folder, num_to_keep
        self._index_file = folder / "index.json"
        self._damaged: set[str] = set()

    def save(self, step: int, peers: Mapping[str, PeerFiles], meta: Mapping[str, Any], *, best: bool) -> Path:
        """Writes a checkpoint, makes it the last one, and removes those that are no longer kept.

        Args:
            step: number of finished steps.
            peers: the files of each peer.
            meta: JSON data to store with them.
            best: make it the best one, too.

        Returns:
            the folder of the checkpoint.

        Raises:
            CheckpointError: it cannot be written. The earlier checkpoints are unchanged.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            index = self.index()
            self._remove_all_but(self._kept(index))  # leftovers of a killed run
            name = free_name(f"step-{step:08d}", os.listdir(self.folder))
            self._write(name, peers, dump_manifest(step, peers, meta, best=best))
            index = {**index, "last": name, **({"best": name} if best else {})}
            try:
                self._write_index(index)
            except OSError:
                if self.index().get("last") != name:
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                raise
        except OSError as error:
            raise CheckpointError(f"checkpoint of step {step} cannot be written: {error}") from None
        self._damaged.discard(name)
        self._remove_all_but(self._kept(index))
        return self.folder / name

    def index(self) -> dict[str, str]:
        """Names of the checkpoints, ``{"last": name, "best": name}``; without those that do not exist.

        If index.json is damaged or missing, the names come from the checkpoints themselves.
        """
        return self._read_index()[0]

    def names(self) -> list[str]:
        """Names of all checkpoints up to the last one, the oldest first.

        A checkpoint of a later step was never finished, or the run has gone back to an earlier step.
        """
        index = self.index()
        return self._up_to(index["last"]) if index else []

    def path(self, which: str) -> Path:
        """Folder of the ``last`` or the ``best`` checkpoint. Raises KeyError if there is none."""
        return self.folder / self.index()[which]

    def load(self, which: str) -> Checkpoint:
        """Reads and verifies the ``last`` or the ``best`` checkpoint.

        If the last checkpoint is damaged, the newest undamaged one is loaded and a warning is logged.

        Raises:
            UserError: there is no such checkpoint, the best one or all of them are damaged, or another
                version of ray-dmml wrote it.
        """
        checkpoint, warnings = self.load_with_warnings(which)
        for warning in warnings:
            logger.warning(warning)
        return checkpoint

    def load_with_warnings(self, which: str) -> tuple[Checkpoint, list[str]]:
        """Does the same as :meth:`load`, but returns the warnings."""
        index, warnings = self._read_index()
        if which not in index:
            reason = " (no validation classes were held out)" if which == "best" and index else ""
            raise UserError(f"{self.folder} has no {which} checkpoint{reason}")
        if which == "best":
            return read_checkpoint(self.folder / index["best"]), warnings
        damages = []
        for name in reversed(self._up_to(index["last"])):
            try:
                checkpoint = read_checkpoint(self.folder / name)
            except DamagedError as damage:
                self._damaged.add(name)
                damages.append(str(damage))
                continue
            if damages:
                instead = f"{checkpoint.path} of step {checkpoint.step} is used instead"
                warnings.append(f"{'; '.join(damages)}; {instead}")
            return checkpoint, warnings
        raise UserError(f"no checkpoint in {self.folder} can be used: {'; '.join(damages)}")

    def _read_index(self) -> tuple[dict[str, str], list[str]]:
        """The index, and warnings about the file."""
        try:
            index = load_with_checksum(self._index_file)
            if "last" not in index or not index.keys() <= {"last", "best"}:
                raise ValueError("it does not name the last checkpoint")
            for name in index.values():
                if not (isinstance(name, str) and STEP_FOLDER.fullmatch(name)):
                    raise ValueError(f"{name!r:.100} is not the name of a checkpoint")
            return index, []
        except (OSError, ValueError, RecursionError) as error:
            names = self._all_names()
            if not names:
                return {}, []
            problem = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
            best = [name for name in names if self._was_best(name)]
            index = {"last": names[-1], **({"best": best[-1]} if best else {})}
            warning = f"{self._index_file} is {problem}; the newest checkpoint beside it is the last"
            return index, [warning]

    def _write_index(self, index: Mapping[str, str]) -> None:
        temporary = self.folder / "index.json.tmp"
        try:
            _write_synced(temporary, dump_with_checksum(index))
            os.replace(temporary, self._index_file)
        except OSError:
            if temporary.is_file():
                temporary.unlink()
            raise
        sync(self.folder)

    def _was_best(self, name: str) -> bool:
        try:
            return read_manifest(self.folder / name).get("best") is True
        except (OSError, UserError):
            return False

    def _all_names(self) -> list[str]:
        """Names of all folders of checkpoints, the oldest first."""
        if not self.folder.is_dir():
            return []
        folders = [path.name for path in self.folder.iterdir() if path.is_dir()]
        return sorted(filter(STEP_FOLDER.fullmatch, folders), key=_age)

    def _up_to(self, last: str) -> list[str]:
        return [*(name for name in self._all_names() if _age(name) < _age(last)), last]

    def _kept(self, index: Mapping[str, str]) -> list[str]:
        if not index:
            return []
        undamaged = [name for name in self._up_to(index["last"]) if name not in self._damaged]
        return [*undamaged[-self.num_to_keep :], *index.values()]

    def _remove_all_but(self, kept: Collection[str]) -> None:
        for folder in self.folder.glob("*step-*"):
            name = folder.name
            is_ours = STEP_FOLDER.fullmatch(name) or (name[0] == "." and name.endswith(".tmp"))
            if folder.is_dir() and is_ours and name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _write(self, name: str, peers: Mapping[str, PeerFiles], manifest: bytes) -> None:
        temporary = self.folder / f".{name}.tmp"
        try:
            temporary.mkdir()
            for peer, contents in peers.items():
                (temporary / peer).mkdir()
                for file, content in contents.items():
                    _write_synced(temporary / peer / file, content)
            _write_synced(temporary / "manifest.json", manifest)
            for folder in [*(temporary / peer for peer in peers), temporary]:
                sync(folder)
            os.rename(temporary, self.folder / name)
            sync(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(self.folder / name, ignore_errors=True)
            raise


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the folder of a checkpoint and verifies every file against the manifest.

    It reads no file outside of the folder, whatever the manifest contains.

    Raises:
        DamagedError: a file is missing or damaged; the message names it.
        UserError: another version of ray-dmml wrote it.
    """
    try:
        manifest = read_manifest(path)
        peers: dict[str, PeerFiles] = {}
        for name, entry in manifest["files"].items():
            peer, file = name.split("/")
            peers.setdefault(peer, {})[file] = _read_verified(path / name, entry)
        return Checkpoint(path, manifest["step"], manifest["meta"], peers)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DamagedError(f"checkpoint {path} cannot be read: {error}") from None


def free_name(wanted: str, taken: Collection[str]) -> str:
    """The name of a checkpoint's folder, or the next one of the same step that is not taken."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = "-".join([*wanted.split("-")[:2], str(number)])
    return name


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    """The content of a peer's file. Raises OSError or DamagedError if it does not match the manifest."""
    if not stat.S_ISDIR(os.lstat(path.parent).st_mode) or not stat.S_ISREG(os.lstat(path).st_mode):
        raise DamagedError(f"checkpoint file {path} is damaged: it is not a plain file in a folder")
    size = os.lstat(path).st_size
    content = path.read_bytes() if size == entry["size"] else None
    if content is None or hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise DamagedError(
            f"checkpoint file {path} is damaged: {size} bytes that do not match the manifest's "
            f"checksum ({entry['size']} bytes were written)"
        )
    return content


def _age(name: str) -> tuple[int, int]:
    """A sort key of names: step, and number within the step."""
    match = STEP_FOLDER.fullmatch(name)
    assert match is not None, name
    return int(match[1]), int(match[2] or 1)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
