"""Atomic, verified, portable checkpoints of a whole cohort.

    RUN/checkpoints/
        index.json                      names of the last checkpoint and of the best on validation
        step-00000300/
            manifest.json               step, config, size and SHA-256 of every file
            peer0/weights.safetensors   the net, enough for evaluation and --init-from
            peer0/ema.safetensors       its averaged weights, if the peer has them
            peer0/training.pt           the rest of its state for resuming, read with weights_only=True; not there
                                        if the run has ended with checkpoint.final: weights

Every peer writes and syncs its own files in a folder with a temporary name. Once all have done so, the manifest is
written and the folder is renamed. Then one rename replaces the index, and only then older checkpoints are removed.
After an interruption at any point, ``last`` names a complete checkpoint. No folder is written twice: a step that is
saved again gets a name such as step-00000300-2 while its first folder is still in use. Temporary names are random, so a
process that outlives its run writes into no later checkpoint.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray_dmml.atomic_files import wait_for_disk
from ray_dmml.checkpoint import manifest
from ray_dmml.checkpoint.manifest import DamagedError, read_manifest
from ray_dmml.checkpoint.peer_files import FileEntry, PeerFiles
from ray_dmml.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)

STEP_FOLDER = re.compile(r"step-(\d{8,12})(-\d{1,6})?")
"""Name of a checkpoint's folder: the step, and a number if the step was saved more than once."""

_TEMPORARY = re.compile(rf"\.{STEP_FOLDER.pattern}\.[0-9a-f]{{16}}\.tmp")

WritePeers = Callable[[Path], Mapping[str, PeerFiles]]
"""Writes a folder for each peer into a folder, and returns what is in them. Raises OSError."""

STATE_FILE = "training.pt"
"""The file of a peer that only resuming needs."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its peers after ``step`` steps, and JSON data of the trainer."""

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
        self._set_aside: dict[str, DamagedError] = {}

    def save(self, step: int, write: WritePeers, meta: Mapping[str, Any], *, best: bool) -> Path:
        """Lets ``write`` write the files of each peer, makes this the last checkpoint, and removes those that are not
        kept.

        ``step`` counts finished steps, ``meta`` is JSON data to store with the peers, and ``best`` makes it the
        best checkpoint, too. Returns its folder.

        Raises:
            CheckpointError: it cannot be written. The earlier checkpoints are unchanged, as after any other error of
                ``write``.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_old()  # and what a killed run left
            name = free_name(f"step-{step:08d}", os.listdir(self.folder))
            index = {**self.index(), "last": name, **({"best": name} if best else {})}
            self._write(name, write, partial(manifest.dump_manifest, step, meta=meta, best=best), index)
        except (OSError, DamagedError) as error:
            raise CheckpointError(f"checkpoint of step {step} cannot be written: {error}") from None
        self._damaged.discard(name)
        self._set_aside.pop(name, None)
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
                old = read_checkpoint(self.folder / name, verify=False)
                if not any(STATE_FILE in files for files in old.peers.values()):
                    continue
                new = free_name(name, os.listdir(self.folder))
                is_best = index.get("best") == name
                index = {which: new if was == name else was for which, was in index.items()}
                dump = partial(manifest.dump_manifest, old.step, meta=old.meta, best=is_best)
                self._write(new, partial(_copy_weights, old.peers), dump, index)
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

    def load(self, which: str, *, verify: bool = True) -> Checkpoint:
        """Reads the ``last`` or the ``best`` checkpoint, but not the contents of its files.

        If the last checkpoint is damaged, the newest undamaged one is loaded and a warning is logged.

        Args:
            verify: read every file once, to find damaged ones. False: whoever reads a file finds out, and calls
                :meth:`set_aside`. Missing and truncated files are found anyway.

        Raises:
            UserError: there is no such checkpoint, none can be used, or another version of ray-dmml wrote it.
        """
        checkpoint, warnings = self.load_with_warnings(which, verify=verify)
        for warning in warnings:
            logger.warning(warning)
        return checkpoint

    def load_with_warnings(self, which: str, *, verify: bool = True) -> tuple[Checkpoint, list[str]]:
        """Does the same as :meth:`load`, but returns the warnings."""
        index, warnings = self._read_index()
        if which not in index:
            reason = " (no validation classes were held out)" if which == "best" and index else ""
            raise UserError(f"{self.folder} has no {which} checkpoint{reason}")
        if which == "best":
            return read_checkpoint(self.folder / index["best"], verify=verify), warnings
        damages = []
        for name in reversed(self.names()):
            try:
                if name in self._set_aside:
                    raise self._set_aside[name]
                checkpoint = read_checkpoint(self.folder / name, verify=verify)
            except DamagedError as damage:
                self._damaged.add(name)
                damages.append(str(damage))
                continue
            if damages:
                warnings.append(f"{'; '.join(damages)}; {checkpoint.path} of step {checkpoint.step} is used instead")
            return checkpoint, warnings
        raise UserError(f"no checkpoint in {self.folder} can be used: {'; '.join(damages)}")

    def set_aside(self, checkpoint: Checkpoint, damage: DamagedError) -> None:
        """From now on the checkpoint is not loaded as the last one: a reader of its files has found them damaged."""
        self._set_aside[checkpoint.path.name] = damage

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
            is_ours = STEP_FOLDER.fullmatch(folder.name) or _TEMPORARY.fullmatch(folder.name)
            if folder.is_dir() and is_ours and folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _write(
        self, name: str, write: WritePeers, dump: Callable[[Mapping[str, PeerFiles]], bytes], index: Mapping[str, str]
    ) -> None:
        """Writes the checkpoint, its manifest (``dump``) and then the index, or leaves all as it was."""
        temporary = self.folder / f".{name}.{secrets.token_hex(8)}.tmp"
        temporary_index = self.folder / "index.json.tmp"
        is_named = False
        try:
            temporary.mkdir()
            peers = write(temporary)
            _write_synced(temporary / "manifest.json", dump(peers))
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


def read_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Reads the manifest in the folder of a checkpoint, and nothing outside of the folder.

    Args:
        verify: read every file once. False: look at their sizes only.

    Raises:
        DamagedError: a file is missing or damaged; the message names it.
        UserError: another version of ray-dmml wrote it.
    """
    try:
        fields = read_manifest(path)
    except OSError as error:
        raise DamagedError(f"checkpoint {path} cannot be read: {error}") from None
    entries: dict[str, dict[str, FileEntry]] = {}
    for name, entry in fields["files"].items():
        peer, file = name.split("/")
        entries.setdefault(peer, {})[file] = FileEntry(entry["size"], entry["sha256"])
    peers = {peer: PeerFiles(path / peer, files) for peer, files in entries.items()}
    for files in peers.values():
        files.verify() if verify else files.check_sizes()
    return Checkpoint(path, fields["step"], fields["meta"], peers)


def free_name(wanted: str, taken: Collection[str]) -> str:
    """The name of a checkpoint's folder, or the next one of the same step that is not taken."""
    base = "-".join(wanted.split("-")[:2])
    names = itertools.chain([wanted], (f"{base}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _copy_weights(peers: Mapping[str, PeerFiles], folder: Path) -> dict[str, PeerFiles]:
    return {
        peer: files.copy_to(folder / peer, [name for name in files if name != STATE_FILE])
        for peer, files in peers.items()
    }


def _age(name: str) -> tuple[int, int]:
    """A sort key of names: step, and number within the step."""
    _, step, *number = name.split("-")
    return int(step), int(number[0]) if number else 1


def _write_synced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    wait_for_disk(path)
