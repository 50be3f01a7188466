"""The files of a peer in a folder, with what they have to contain. None of them is held in memory."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ray_dmml.atomic_files import wait_for_disk
from ray_dmml.checkpoint.manifest import DamagedError

CHUNK = 2**24
"""Bytes of a file that are held at once where it is copied, sent or verified."""


class FileEntry(NamedTuple):
    """What a file was when it was written."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> FileEntry:
        return cls(len(content), hashlib.sha256(content).hexdigest())


class PeerFiles(Mapping[str, bytes]):
    """The files of a peer: a mapping of names to contents, each read and verified when it is asked for.

    Args:
        folder: where they are.
        entries: the name, size and SHA-256 of each file.

    Everything that reads raises DamagedError if a file is missing, damaged or no plain file; the message names it.
    """

    def __init__(self, folder: Path, entries: Mapping[str, FileEntry]) -> None:
        self.folder, self.entries = folder, dict(entries)

    @classmethod
    def written(cls, folder: Path, names: Iterable[str]) -> PeerFiles:
        """Describes files that have just been written, and waits until they are on the disk. Raises OSError."""
        entries = {}
        for name in names:
            path = folder / name
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
                os.fsync(file.fileno())
                entries[name] = FileEntry(file.tell(), digest.hexdigest())
        wait_for_disk(folder)
        return cls(folder, entries)

    def __getitem__(self, name: str) -> bytes:
        return b"".join(self.chunks(name, self.entries[name].size + 1))

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:  # that of Mapping reads the file
        return name in self.entries

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[bytes]:
        """The content of a file in parts of ``size`` bytes. DamagedError comes after the last part at the latest."""
        path, entry, digest = self.folder / name, self.entries[name], hashlib.sha256()
        try:
            self._check_size(name)
            with path.open("rb") as file:
                while chunk := file.read(size):
                    digest.update(chunk)
                    yield chunk
        except OSError as error:
            raise DamagedError(f"checkpoint file {path} cannot be read: {error}") from None
        if digest.hexdigest() != entry.sha256:
            raise DamagedError(f"{_problem(path)}: its content does not match the checksum")

    def absolute(self) -> PeerFiles:
        """The same files, for a process with another current folder."""
        return PeerFiles(self.folder.absolute(), self.entries)

    def check_sizes(self) -> None:
        """Reads no content: finds missing and truncated files, and whatever is no plain file."""
        for name in self:
            try:
                self._check_size(name)
            except (OSError, ValueError) as error:  # ValueError: a name that no file can have
                raise DamagedError(f"checkpoint file {self.folder / name} cannot be read: {error}") from None

    def verify(self) -> None:
        """Reads every file to its end."""
        self.check_sizes()
        for name in self:
            for _ in self.chunks(name):
                pass

    def copy_to(self, folder: Path, names: Iterable[str] | None = None) -> PeerFiles:
        """Copies files (None: all) into a new folder, and waits until they are on the disk. Raises OSError, too."""
        folder.mkdir()
        copied = {name: self.entries[name] for name in (self if names is None else names)}
        for name in copied:
            with (folder / name).open("wb") as target:
                target.writelines(self.chunks(name))
        return PeerFiles.written(folder, copied)

    def _check_size(self, name: str) -> None:
        path, entry = self.folder / name, self.entries[name]
        if not stat.S_ISDIR(os.lstat(self.folder).st_mode) or not stat.S_ISREG(os.lstat(path).st_mode):
            raise DamagedError(f"{_problem(path)}: it is not a plain file in a folder")
        if (size := path.stat().st_size) != entry.size:
            raise DamagedError(f"{_problem(path)}: {size} bytes instead of the {entry.size} bytes written")


def _problem(path: Path) -> str:
    return f"checkpoint file {path} is damaged"
