"""Where images are: a folder, the rows of a manifest, or a bucket."""

from __future__ import annotations

import csv
import errno
import functools
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ray_dmml.data.datasets.listed_files import ListedFiles
from ray_dmml.data.datasets.manifest import BOX_COLUMNS, lines_of
from ray_dmml.data.decoding import MAX_FILE_BYTES, printable, read_file
from ray_dmml.data.formats import suffixes
from ray_dmml.data.image_files import SYSTEM_FOLDERS, iterate_images, suffix
from ray_dmml.errors import UserError
from ray_dmml.filesystem import open_uri, reason, without_secrets

WAITS_S = (1.0, 5.0)
"""Between the attempts to read a file of a bucket. pyarrow makes several in each."""

_NO_FAULT_OF_THE_FILE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}


@dataclass(frozen=True)
class Place:
    """A folder or bucket with images. It can be sent to other processes.

    Attributes:
        root: an absolute path, or a URI, which may contain secrets.
    """

    root: str

    @property
    def name(self) -> str:
        """For people and files."""
        return without_secrets(self.root) if self.is_uri else self.root

    @property
    def is_uri(self) -> bool:
        """Whether it is a bucket, or another file system that is not mounted."""
        return "://" in self.root

    def read(self, path: str) -> np.ndarray:
        """The content of a file, uint8 (bytes,).

        Args:
            path: relative to the root.

        Raises:
            OSError: it cannot be read.
            UserError: nothing can be read here any more.
        """
        for wait_s in (*WAITS_S, None):
            try:
                return self._read_from_uri(path) if self.is_uri else read_file(os.path.join(self.root, path))
            except OSError as error:
                if error.errno in _NO_FAULT_OF_THE_FILE:
                    raise UserError(f"{self.name} cannot be read on {socket.gethostname()}: {error.strerror}") from None
                if not self.is_uri or isinstance(error, FileNotFoundError) or wait_s is None:
                    self.require()
                    raise
            time.sleep(wait_s)
        raise AssertionError

    def require(self) -> None:
        """Raises UserError if there is nothing: a folder is not mounted here, or a bucket does not answer."""
        try:
            if self.is_uri:
                from pyarrow import fs

                files, base = _opened(self.root)
                is_there = files.get_file_info(base).type == fs.FileType.Directory
            else:
                with os.scandir(self.root) as entries:
                    is_there = any(True for _ in entries)
        except OSError as error:
            raise UserError(
                f"{self.name} cannot be read on {socket.gethostname()}: {error.strerror or reason(error)}"
            ) from None
        if not is_there:
            advice = "" if self.is_uri else "; all nodes need the folder at the same path, or the URI of a bucket"
            raise UserError(f"{self.name} is empty or missing on {socket.gethostname()}{advice}")

    def _read_from_uri(self, path: str) -> np.ndarray:
        files, base = _opened(self.root)
        with files.open_input_file(f"{base}/{path}") as file:
            size = file.size()
            if not 0 < size <= MAX_FILE_BYTES:  # FileNotFoundError: another attempt will not help
                large = f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB"
                raise FileNotFoundError(large if size else "the file is empty")
            content = np.empty(size, np.uint8)
            if (received := file.readinto(content)) != size:
                raise OSError(f"only {received} of {size} bytes could be read")
        return content


@functools.lru_cache(maxsize=4)
def _opened(uri: str) -> Any:
    return open_uri(uri, make=False)


def find_images(images: str, root: Path | None) -> tuple[Place, Iterator[bytes]]:
    """Where images are, and their paths relative to that: in order, byte by byte, each once.

    Args:
        images: a folder, a manifest or a URI.
        root: the folder that the paths of a manifest are relative to. None: that of the manifest.

    Raises:
        UserError: there is no such place, or it cannot be read. Some are raised only where the paths are read.
    """
    is_manifest = "://" not in images and os.path.isfile(images)
    if root is not None and not is_manifest:
        raise UserError(f"a root is for the paths of a manifest, and {printable(images)} is none")
    if "://" in images:
        return Place(images), _paths_at(images)
    if is_manifest:
        folder = root or Path(images).parent
        return Place(os.path.abspath(folder)), iter(_listed_paths(Path(images), folder))
    if not os.path.isdir(images):
        what = "is neither a folder nor a manifest (CSV)" if os.path.lexists(images) else "does not exist"
        raise UserError(f"{printable(images)} {what}: give a folder of images, a manifest or a URI")
    return Place(os.path.abspath(images)), (os.fsencode(path) for path in iterate_images(images))


def _paths_at(uri: str) -> Iterator[bytes]:
    """Images by their suffix, without hidden ones, as in a folder."""
    from pyarrow import fs

    name = without_secrets(uri)
    try:
        files, base = _opened(uri)
        infos = files.get_file_info(fs.FileSelector(base, recursive=True))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{name} is not understood: {reason(error)}") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {reason(error)}") from None
    readable = suffixes()
    inside = (info.path.removeprefix(base).lstrip("/") for info in infos if info.type == fs.FileType.File)
    yield from sorted(path.encode() for path in inside if suffix(path) in readable and not _is_hidden(path))


def _is_hidden(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return any(part[0] == "." for part in parts) or any(part.lower() in SYSTEM_FOLDERS for part in parts[:-1])


def _listed_paths(manifest: Path, root: Path) -> list[bytes]:
    """The paths of a manifest. Its other columns do not matter."""
    files, paths = ListedFiles(root), set()
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(lines_of(file))
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            if "path" not in reader.fieldnames:
                raise UserError(f"manifest {manifest} has no column 'path' in its first line")
            for row in reader:
                path, where = (row["path"] or "").strip(), f"manifest {manifest}, line {reader.line_num}"
                relative = files.relative(path) if path and "\0" not in path else None
                if relative is None:
                    why = f"{printable(path)} is outside of {root}: name its folder (root)" if path else "path is empty"
                    raise UserError(f"{where}: {why}")
                if any((row.get(column) or "").strip() for column in BOX_COLUMNS):
                    raise UserError(
                        f"{where}: it has a box ({', '.join(BOX_COLUMNS)}), and only whole images are embedded"
                    )
                if not relative.isascii():  # it may be written in another Unicode form
                    relative = files.find(relative) or relative
                paths.add(os.fsencode(relative))
    except OSError as error:
        raise UserError(f"manifest {manifest} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"manifest {manifest} is not a CSV file in UTF-8: {error}") from None
    return sorted(paths)
