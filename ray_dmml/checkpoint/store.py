"""Atomic, verified, portable checkpoints of a whole cohort.

    RUN/checkpoints/
        index.json                      names of the last checkpoint and of the best on validation
        step-00000300/
            manifest.json               step, config, size and SHA-256 of every file
            peer0/weights.safetensors   the net, enough for evaluation and --init-from
            peer0/ema.safetensors       its averaged weights, if the peer has them
            peer0/training.pt           the rest of its state for resuming, read with weights_only=True; not there
                                        if the run has ended with checkpoint.final: weights

A checkpoint is written under a temporary name, synced and renamed. Then one rename replaces the index,
and only then older checkpoints are removed. After an interruption at any point, ``last`` names a complete
checkpoint. No folder is written twice: a step that is saved again gets a name such as step-00000300-2
while its first folder is still in use.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import shutil
import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_dmml.atomic_files import wait_for_disk
from ray_dmml.checkpoint import manifest
from ray_dmml.checkpoint.manifest import DamagedError, read_manifest
from ray_dmml.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)

STEP_FOLDER = re.compile(r"step-(\d{8,12})(-\d{1,6})?")
"""Name of a checkpoint's folder: the step, and a number if the step was saved more than once."""

PeerFiles = dict[str, bytes]  # the state of a peer: names of files to contents

STATE_FILE = "training.pt"
"""The file of a peer that only resuming needs."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified: its peers after ``step`` steps, and JSON data of the trainer."""

    path: Path
    step: int
    meta: dict[str, Any]
    peers: dict[str, PeerFiles]

    def can_be_resumed(self) -> bool:
        """Whether it is more than weights."""
        return all(STATE_FILE in files for files in self.peers.values())


class CheckpointStore:
    """The checkpoints of a run in RUN/checkpoints. It keeps the last ``num_to_keep`` ones and the best one."""

    def __init__(self, folder: Path, num_to_keep: int = 2) -> None:
        self.folder, self.num_to_keep = folder, num_to_keep
        self._index_file = folder / "index.json"
        self._damaged: set[str] = set()

    def save(self, step: int, peers: Mapping[str, PeerFiles], meta: Mapping[str, Any], *, best: bool) -> Path:
        """Writes the files of each peer, makes this the last checkpoint, and removes those that are not kept.

        ``step`` counts finished steps, ``meta`` is JSON data to store with the peers, and ``best`` makes it the
        best checkpoint, too. Returns its folder.

        Raises:
            CheckpointError: it cannot be written. The earlier checkpoints are unchanged.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_old()  # and what a killed run left
            name = free_name(f"step-{step:08d}", os.listdir(self.folder))
            index = {**self.index(), "last": name, **({"best": name} if best else {})}
            self._write(name, peers, manifest.dump_manifest(step, peers, meta, best=best), index)
        except OSError as error:
            raise CheckpointError(f"checkpoint of step {step} cannot be written: {error}") from None
        self._damaged.discard(name)
        self._remove_old()
        return self.folder / name

    def keep_weights(self) -> None:
        """Replaces the last and the best checkpoint by their weights alone, and removes all others.

        Raises:
            CheckpointError: they cannot be written, or one is damaged. What is not replaced is unchanged.
        """
        try:
            index = self.index()
            for name in set(index.values()):
                old = read_checkpoint(self.folder / name)
                if not any(STATE_FILE in files for files in old.peers.values()):
                    continue
                peers = {
                    peer: {file: content for file, content in files.items() if file != STATE_FILE}
                    for peer, files in old.peers.items()
                }
                new = free_name(name, os.listdir(self.folder))
                is_best = index.get("best") == name
                index = {which: new if was == name else was for which, was in index.items()}
                self._write(new, peers, manifest.dump_manifest(old.step, peers, old.meta, best=is_best), index)
        except (OSError, DamagedError) as error:
            raise CheckpointError(f"the checkpoints cannot be reduced to their weights: {error}") from None
        self._remove_old(num_to_keep=1)

    def index(self) -> dict[str, str]:
        """``{"last": name, "best": name}`` as far as they exist. Manifests replace a damaged index.json."""
        return self._read_index()[0]

    def names(self) -> list[str]:
        """Names of all checkpoints up to the last one, the oldest first.

        A checkpoint of a later step was never finished, or the run has gone back to an earlier step.
        """
        last = self.index().get("last")
        return [*(name for name in self._all_names() if _age(name) < _age(last)), last] if last else []

    def path(self, which: str) -> Path:
        """Folder of the ``last`` or the ``best`` checkpoint. Raises KeyError if there is none."""
        return self.folder / self.index()[which]

    def load(self, which: str) -> Checkpoint:
        """Reads and verifies the ``last`` or the ``best`` checkpoint.

        If the last checkpoint is damaged, the newest undamaged one is loaded and a warning is logged.

        Raises:
            UserError: there is no such checkpoint, none can be used, or another version of ray-dmml wrote it.
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
        for name in reversed(self.names()):
            try:
                checkpoint = read_checkpoint(self.folder / name)
            except DamagedError as damage:
                self._damaged.add(name)
                damages.append(str(damage))
                continue
            if damages:
                warnings.append(f"{'; '.join(damages)}; {checkpoint.path} of step {checkpoint.step} is used instead")
            return checkpoint, warnings
        raise UserError(f"no checkpoint in {self.folder} can be used: {'; '.join(damages)}")

    def _read_index(self) -> tuple[dict[str, str], list[str]]:
        """The index, and warnings about the file."""
        try:
            index = manifest.load_with_checksum(self._index_file)
            are_names = all(isinstance(name, str) and STEP_FOLDER.fullmatch(name) for name in index.values())
            if not are_names or "last" not in index or not index.keys() <= {"last", "best"}:
                raise ValueError("it does not name the last checkpoint")
            return index, []
        except (OSError, ValueError, RecursionError) as error:
            names = self._all_names()
            if not names:
                return {}, []
            index = {"last": names[-1]}
            for name in names:
                with suppress(OSError, UserError):
                    if read_manifest(self.folder / name).get("best") is True:
                        index["best"] = name
            problem = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
            return index, [f"{self._index_file} is {problem}; the newest checkpoint beside it is the last"]

    def _all_names(self) -> list[str]:
        """Names of all folders of checkpoints, the oldest first."""
        folders = [path.name for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(filter(STEP_FOLDER.fullmatch, folders), key=_age)

    def _remove_old(self, num_to_keep: int | None = None) -> None:
        undamaged = [name for name in self.names() if name not in self._damaged]
        kept = {*undamaged[-(num_to_keep or self.num_to_keep) :], *self.index().values()}
        for folder in self.folder.glob("*step-*"):
            is_ours = STEP_FOLDER.fullmatch(folder.name.removeprefix(".").removesuffix(".tmp"))
            if folder.is_dir() and is_ours and folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _write(self, name: str, peers: Mapping[str, PeerFiles], content: bytes, index: Mapping[str, str]) -> None:
        """Writes the checkpoint and then the index, or leaves both as they were."""
        temporary, temporary_index = self.folder / f".{name}.tmp", self.folder / "index.json.tmp"
        is_named = False
        try:
            temporary.mkdir()
            for peer, files in peers.items():
                (temporary / peer).mkdir()
                for file, data in files.items():
                    _write_synced(temporary / peer / file, data)
                wait_for_disk(temporary / peer)
            _write_synced(temporary / "manifest.json", content)
            wait_for_disk(temporary)
            os.rename(temporary, self.folder / name)
            wait_for_disk(self.folder)
            _write_synced(temporary_index, manifest.dump_with_checksum(index))
            os.replace(temporary_index, self._index_file)
            is_named = True
            wait_for_disk(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if not is_named:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            with suppress(OSError):
                temporary_index.unlink()
            raise


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the folder of a checkpoint, and nothing outside of it, and verifies every file.

    Raises:
        DamagedError: a file is missing or damaged; the message names it.
        UserError: another version of ray-dmml wrote it.
    """
    try:
        fields = read_manifest(path)
        peers: dict[str, PeerFiles] = {}
        for name, entry in fields["files"].items():
            peer, file = name.split("/")
            peers.setdefault(peer, {})[file] = _read_verified(path / name, entry["size"], entry["sha256"])
        return Checkpoint(path, fields["step"], fields["meta"], peers)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DamagedError(f"checkpoint {path} cannot be read: {error}") from None


def free_name(wanted: str, taken: Collection[str]) -> str:
    """The name of a checkpoint's folder, or the next one of the same step that is not taken."""
    base = "-".join(wanted.split("-")[:2])
    names = itertools.chain([wanted], (f"{base}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _read_verified(path: Path, size: int, sha256: str) -> bytes:
    problem = f"checkpoint file {path} is damaged"
    if not stat.S_ISDIR(os.lstat(path.parent).st_mode) or not stat.S_ISREG(os.lstat(path).st_mode):
        raise DamagedError(f"{problem}: it is not a plain file in a folder")
    has = path.stat().st_size
    content = path.read_bytes() if has == size else b""
    if has != size or hashlib.sha256(content).hexdigest() != sha256:
        raise DamagedError(f"{problem}: {has} bytes that do not match the checksum of the {size} bytes written")
    return content


def _age(name: str) -> tuple[int, int]:
    """A sort key of names: step, and number within the step."""
    _, step, *number = name.split("-")
    return int(step), int(number[0]) if number else 1


def _write_synced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    wait_for_disk(path)
