"""Atomic, verified, portable checkpoints of a whole cohort.

    RUN/checkpoints/
        index.json                      which step is last, which is best on validation
        step-00000300/
            manifest.json               step, config, sizes and SHA-256 of every file, and its own
            peer0/weights.safetensors   the net: what evaluation and --init-from need
            peer0/ema.safetensors  its averaged weights, where it keeps them
            peer0/training.pt           what resuming needs besides, read with weights_only=True

A checkpoint is written beside its place, synced and renamed; the index is replaced in one move after
it, and only then do older ones go. So whatever is interrupted, `last` names a complete checkpoint. No
folder is ever written a second time: a step saved again while its folder is still of use gets
another, such as step-00000300-2.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ray_dmml.errors import CheckpointError, UserError

FORMAT = 1
"""Rises when an older reader could not read what a newer one writes."""

STEP_FOLDER = re.compile(r"step-(\d{8,12})(?:-(\d{1,6}))?")
"""Step, and which of several of that step."""

_PEER_FILE = re.compile(r"(?!\.\.?/)[^/\\\0]+/(?!\.\.?$)[^/\\\0]+")
_LARGEST_MANIFEST = 64 * 2**20

PeerFiles = dict[str, bytes]
"""A peer's state as it is stored and as it travels: file names to contents."""


class DamagedError(UserError):
    """A checkpoint is not as it was written; the message names the file and says what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint read back."""

    path: Path
    step: int
    """Finished steps."""

    meta: dict[str, Any]
    """What the trainer stored beside the peers: config, best validation so far."""

    peers: dict[str, PeerFiles]

    version: str | None = None
    """Of ray-dmml when it was written; None: one before versions were recorded."""


def ignore(warning: str) -> None:
    """For those who need not know."""


class CheckpointStore:
    """The checkpoints of a run: the last few and the best one are kept.

    Args:
        folder: RUN/checkpoints; made at the first save.
        num_to_keep: so many of the last, at least one; the best besides.
    """

    def __init__(self, folder: Path, num_to_keep: int = 2) -> None:
        self.folder, self.num_to_keep = folder, num_to_keep
        self._index_file = folder / "index.json"
        self._found_damaged: set[str] = set()

    def save(
        self, step: int, peers: Mapping[str, PeerFiles], meta: Mapping[str, Any], *, best: bool
    ) -> Path:
        """Writes a checkpoint, makes it the last (and the best), then removes those not kept.

        Raises:
            CheckpointError: it cannot be written; what was there before is untouched.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            index = self.index()
            self._remove_all_but(self._kept(index))  # what a killed run has left
            name = free_name(f"step-{step:08d}", os.listdir(self.folder))
            self._write(name, step, peers, meta, best)
            index = {**index, "last": name, **({"best": name} if best else {})}
            try:
                self._write_index(index)
            except OSError:
                if self.index().get("last") != name:
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                raise
        except OSError as error:
            raise CheckpointError(f"checkpoint of step {step} cannot be written: {error}") from None
        self._found_damaged.discard(name)
        self._remove_all_but(self._kept(index))
        return self.folder / name

    def index(self) -> dict[str, str]:
        """``{"last": name, "best": name}``, as far as there are any.

        From the checkpoints themselves where index.json is damaged or missing.
        """
        return self._read_index(ignore)

    def kept(self) -> list[str]:
        """Names of the checkpoints that are kept, the oldest first."""
        return self._kept(self.index())

    def path(self, which: str) -> Path:
        """Folder of the ``last`` or the ``best`` checkpoint, which there is."""
        return self.folder / self.index()[which]

    def adopt(self, checkpoint: Path) -> None:
        """Takes the folder of another run's checkpoint as its own last one, and its only one.

        Raises:
            UserError: it is damaged, or cannot be written here.
        """
        found = read_checkpoint(checkpoint)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._found_damaged.clear()
        self.save(found.step, found.peers, found.meta, best=False)

    def load(self, which: str, warn: Callable[[str], None] = ignore) -> Checkpoint:
        """Reads and verifies the ``last`` or the ``best`` checkpoint.

        For a last one that is damaged there is the newest older one that is not.

        Args:
            which: ``last`` or ``best``.
            warn: is told what is damaged and what is used instead.

        Raises:
            UserError: there is none, the best or every one is damaged, or a newer version wrote it.
        """
        index = self._read_index(warn)
        if which not in index:
            held_out = " (no validation classes were held out)" if which == "best" and index else ""
            raise UserError(f"{self.folder} has no {which} checkpoint{held_out}")
        if which == "best":
            return read_checkpoint(self.folder / index["best"])
        damages = []
        for name in [index["last"], *reversed(self._up_to(index["last"])[:-1])]:
            try:
                found = read_checkpoint(self.folder / name)
            except DamagedError as damage:
                self._found_damaged.add(name)
                damages.append(str(damage))
                continue
            if damages:
                warn(f"{'; '.join(damages)}; {found.path} of step {found.step} is used instead")
            return found
        raise UserError(f"no checkpoint in {self.folder} can be used: {'; '.join(damages)}")

    def _read_index(self, warn: Callable[[str], None]) -> dict[str, str]:
        try:
            found = _load_with_checksum(self._index_file)
            if "last" not in found or not found.keys() <= {"last", "best"}:
                raise ValueError("it does not say which checkpoint is the last")
            if not all(
                isinstance(name, str) and STEP_FOLDER.fullmatch(name) for name in found.values()
            ):
                raise ValueError("it names what is no checkpoint")
            return found
        except (OSError, ValueError, RecursionError) as error:
            names = self._names()
            if not names:
                return {}
            wrong = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
            warn(f"{self._index_file} is {wrong}; the newest checkpoint beside it is the last")
            best = [name for name in names if self._was_best(name)]
            return {"last": names[-1], **({"best": best[-1]} if best else {})}

    def _write_index(self, index: Mapping[str, str]) -> None:
        aside = self.folder / "index.json.tmp"
        try:
            _write_synced(aside, dump_with_checksum(index))
            os.replace(aside, self._index_file)
        except OSError:
            if aside.is_file():
                aside.unlink()
            raise
        sync(self.folder)

    def _was_best(self, name: str) -> bool:
        try:
            return _read_manifest(self.folder / name).get("best") is True
        except (OSError, UserError):
            return False

    def _names(self) -> list[str]:
        """All there are, the oldest first."""
        if not self.folder.is_dir():
            return []
        folders = [path.name for path in self.folder.iterdir() if path.is_dir()]
        return sorted(filter(STEP_FOLDER.fullmatch, folders), key=_age)

    def _up_to(self, last: str) -> list[str]:
        """The last one and those before it. One of a later step was never finished, or is of a run
        that has gone back since."""
        return [*(name for name in self._names() if _age(name) < _age(last)), last]

    def _kept(self, index: Mapping[str, str]) -> list[str]:
        if not index:
            return []
        good = [name for name in self._up_to(index["last"]) if name not in self._found_damaged]
        return sorted({*good[-self.num_to_keep :], *index.values()}, key=_age)

    def _remove_all_but(self, kept: Collection[str]) -> None:
        for folder in self.folder.glob("*step-*"):
            name = folder.name
            aside = name.startswith(".") and name.endswith(".tmp")
            if folder.is_dir() and (aside or STEP_FOLDER.fullmatch(name)) and name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _write(
        self,
        name: str,
        step: int,
        peers: Mapping[str, PeerFiles],
        meta: Mapping[str, Any],
        best: bool,
    ) -> None:
        aside = self.folder / f".{name}.tmp"
        try:
            aside.mkdir()
            files = {}
            for peer, contents in peers.items():
                (aside / peer).mkdir()
                for file, content in contents.items():
                    _write_synced(aside / peer / file, content)
                    files[f"{peer}/{file}"] = {
                        "size": len(content),
                        "sha256": hashlib.sha256(content).hexdigest(),
                    }
            manifest = {
                "format": FORMAT,
                "version": _own_version(),
                "step": step,
                "best": best,
                "files": files,
                "meta": dict(meta),
            }
            _write_synced(aside / "manifest.json", dump_with_checksum(manifest))
            for folder in [*(aside / peer for peer in peers), aside]:
                sync(folder)
            os.rename(aside, self.folder / name)
            sync(self.folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(self.folder / name, ignore_errors=True)
            raise


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint folder and verifies every file against its manifest.

    Nothing outside of the folder is read, whatever the manifest says.

    Raises:
        DamagedError: a file is missing or damaged; it is named.
        UserError: a newer version wrote it.
    """
    try:
        manifest = _read_manifest(path)
        peers: dict[str, PeerFiles] = {}
        for name, expected in manifest["files"].items():
            peer, file = name.split("/")
            peers.setdefault(peer, {})[file] = _read_verified(path / name, expected)
        return Checkpoint(path, manifest["step"], manifest["meta"], peers, manifest.get("version"))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DamagedError(f"checkpoint {path} cannot be read: {error}") from None


def free_name(wanted: str, taken: Collection[str]) -> str:
    """The name, or one of the same step, that is none of those taken."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = "-".join([*wanted.split("-")[:2], str(number)])
    return name


def manifest_files(path: Path) -> list[str]:
    """What a checkpoint's folder holds besides its manifest.

    Raises:
        OSError: the manifest cannot be read.
        UserError: it is damaged, or a newer version wrote it.
    """
    return list(_read_manifest(path)["files"])


def dump_with_checksum(content: Mapping[str, Any]) -> bytes:
    """As JSON, with a SHA-256 of its own. The form is fixed, so that every version can tell a newer
    one's file from a damaged one."""
    plain = json.dumps(content, indent=1)
    checksum = hashlib.sha256(plain.encode()).hexdigest()
    return json.dumps({**content, "checksum": checksum}, indent=1).encode()


def sync(path: Path) -> None:
    """Returns when a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_with_checksum(path: Path) -> dict[str, Any]:
    """What :func:`dump_with_checksum` was given. Raises OSError or ValueError where the file is not that.

    Files of before there were checksums have none and are given as they are.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode) or os.lstat(path).st_size > _LARGEST_MANIFEST:
        raise ValueError("it is not a plain file of a reasonable size")
    raw = path.read_bytes()
    found = json.loads(raw)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    if found.pop("checksum", None) is None:
        if "version" in found:
            raise ValueError("it has no checksum")
    elif dump_with_checksum(found) != raw:
        raise ValueError("its checksum does not match")
    return found


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder, with the fields and the file names it must have.

    Raises:
        OSError: it cannot be read.
        DamagedError: it is damaged.
        UserError: a newer version wrote it.
    """
    file = path / "manifest.json"
    try:
        manifest = _load_with_checksum(file)
        if type(manifest["format"]) is int and manifest["format"] > FORMAT:
            raise UserError(
                f"checkpoint {path} was written by ray-dmml {manifest.get('version', '(unknown)')} in "
                f"format {manifest['format']}; this version ({_own_version()}) reads up to {FORMAT}: "
                "update ray-dmml"
            )
        for field, kind in {"format": int, "step": int, "files": dict, "meta": dict}.items():
            if type(manifest[field]) is not kind:
                raise ValueError(f"{field} is {manifest[field]!r:.100}")
        if not 0 <= manifest["step"] < 10**12:
            raise ValueError(f"step is {manifest['step']}")
        for name, expected in manifest["files"].items():
            if not _PEER_FILE.fullmatch(name):
                raise ValueError(f"{name!r:.100} is not the name of a peer's file")
            if not isinstance(expected, dict) or not expected.keys() >= {"size", "sha256"}:
                raise ValueError(f"{name!r:.100} has no size or no checksum")
    except (ValueError, KeyError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged: {error!r}") from None
    return manifest


def _read_verified(path: Path, expected: Mapping[str, Any]) -> bytes:
    """The content of a peer's file. Raises OSError or DamagedError where it is not what was written."""
    if not stat.S_ISDIR(os.lstat(path.parent).st_mode) or not stat.S_ISREG(os.lstat(path).st_mode):
        raise DamagedError(f"checkpoint file {path} is damaged: it is not a plain file in a folder")
    size = os.lstat(path).st_size
    content = path.read_bytes() if size == expected["size"] else None
    if content is None or hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise DamagedError(
            f"checkpoint file {path} is damaged: {size} bytes that do not match the manifest's "
            f"checksum ({expected['size']} bytes were written)"
        )
    return content


def _age(name: str) -> tuple[int, int]:
    found = STEP_FOLDER.fullmatch(name)
    assert found is not None, name
    return int(found[1]), int(found[2] or 1)


def _own_version() -> str:
    try:
        return metadata.version("ray-dmml")
    except metadata.PackageNotFoundError:
        return "unknown"


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
