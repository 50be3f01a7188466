"""Copies the images from a folder or bucket to each node: once, verified, and shared by all runs.

The first process to come holds the folder's lock and copies what is missing, and the others wait. A file gets its name
when it is complete, so an interrupted copy continues where it was. A run trusts a finished copy. `ray-dmml data fetch`
compares it with the source again: it copies what is missing or differs in size or digest, and removes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from filelock import FileLock

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.cache_folder import default_folder
from ray_dmml.errors import UserError

DIGESTS = "SHA256SUMS"
"""A file of the source, as `sha256sum` writes it. Files that it lists are verified by content, all others by size."""

MARK = ".fetched.json"  # the source of the copy, and whether the copy is finished
LOCK = ".fetch.lock"
NUM_THREADS = 16  # files copied at a time; small ones spend most of their time waiting

logger = logging.getLogger(__name__)


def local_root(config: DataConfig) -> Path:
    """The folder of the images on this machine, whether they are copied yet or not.

    Raises:
        UserError: it would be in the home folder, and there is none.
    """
    if config.root is not None:
        return config.root
    try:
        return (config.cache_dir or default_folder()) / "sources" / _digest(config.source)[:16]
    except OSError as error:
        raise UserError(f"data.source: no place for a copy ({error.strerror}); set data.root") from None


def fetch(config: DataConfig, *, again: bool = False) -> Path:
    """Copies ``data.source`` to this machine unless there is a finished copy.

    Args:
        config: the data set.
        again: compare a finished copy with the source. Do not do so while a run reads the copy.

    Returns:
        The folder of the images.

    Raises:
        UserError: the source cannot be read or is damaged, the disk is full, or the folder holds a copy of another
            source.
    """
    root = local_root(config)
    if config.source is None or (not again and _is_finished(root, config.source)):
        return root
    from ray_dmml.filesystem import reason, without_secrets  # their import takes half a second

    name = without_secrets(config.source)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / LOCK):
            # Another process may have finished the copy meanwhile.
            if again or not _is_finished(root, config.source):
                _copy(config.source, name, root)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"data.source {name} is not understood: {reason(error)}") from None
    except OSError as error:
        raise UserError(f"data.source {name} cannot be copied to {root}: {reason(error)}") from None
    return root


def _copy(source: str, name: str, root: Path) -> None:
    mark = _read_mark(root)
    if mark.get("source", _digest(source)) != _digest(source):
        raise UserError(
            f"data.root {root} holds a copy of {mark.get('name')}, and not of data.source {name}: "
            "give data.root another folder, or remove that copy"
        )
    listing = _list(source, name)
    missing = [path for path in listing.sizes if listing.fault(path, root / path)]
    num_bytes, free = sum(listing.sizes[path] for path in missing), shutil.disk_usage(root).free
    if num_bytes > free:
        raise UserError(
            f"data.source {name}: {_gib(num_bytes)} are to be copied to {root}, and {_gib(free)} "
            "are free: set data.root to a folder of a larger disk"
        )
    paths = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    paths = {path for path in paths if not any(part.startswith(".") for part in path.split("/"))}
    if extra := sorted(paths - listing.sizes.keys()):
        logger.warning(
            f"{root} has {len(extra)} files that are not in {name}, such as {extra[0]}: "
            "remove them if they should not be used"
        )
    if not missing and mark.get("finished"):
        logger.info("%s has all %d files of %s", root, len(listing.sizes), name)
        return
    mark = {"source": _digest(source), "name": name, "finished": False}
    _write_mark(root, mark)  # no run trusts half a copy
    counts = f"{len(missing)} of {len(listing.sizes)} files ({_gib(num_bytes)})"
    logger.info("copying %s from %s to %s", counts, name, root)
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        list(pool.map(lambda path: listing.copy(path, root / path), missing))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    os.sync()  # if the machine dies, the mark must not survive without the files
    _write_mark(root, mark | {"finished": True})


def _digest(source: str | None) -> str:
    """Stands for a URI, which may hold secrets."""
    return hashlib.sha256(str(source).encode()).hexdigest()


def _is_finished(root: Path, source: str) -> bool:
    mark = _read_mark(root)
    return bool(mark.get("finished") and mark.get("source") == _digest(source))


def _read_mark(root: Path) -> dict[str, Any]:
    """The mark of the copy in a folder; empty if there is none."""
    try:
        mark: Any = json.loads((root / MARK).read_text())
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}


def _write_mark(root: Path, mark: dict[str, Any]) -> None:
    partial = _partial(root / MARK)
    partial.write_text(json.dumps(mark))
    os.replace(partial, root / MARK)


class _Listing(NamedTuple):
    """The files of a source by path: their sizes, and the digests of those that ``SHA256SUMS`` lists."""

    name: str
    folder: Any
    sizes: Mapping[str, int]
    digests: Mapping[str, str]

    def fault(self, path: str, file: Path) -> str | None:
        """How a file differs from the source's; None: it does not."""
        try:
            if file.stat().st_size != self.sizes[path]:
                return f"{file.stat().st_size} bytes came, not {self.sizes[path]}"
            if path in self.digests:
                with file.open("rb") as content:
                    if hashlib.file_digest(content, "sha256").hexdigest() != self.digests[path]:
                        return f"not that of {DIGESTS}"
        except OSError as error:
            return str(error)
        return None

    def copy(self, path: str, target: Path) -> None:
        """Copies a file under another name, and renames it when it is complete and verified."""
        from pyarrow import fs

        partial = _partial(target)
        partial.parent.mkdir(parents=True, exist_ok=True)
        fs.copy_files(path, str(partial), self.folder, fs.LocalFileSystem())
        if fault := self.fault(path, partial):
            partial.unlink()
            raise UserError(f"data.source {self.name}: the content of {path} is damaged ({fault})")
        os.replace(partial, target)


def _list(source: str, name: str) -> _Listing:
    from pyarrow import fs

    from ray_dmml.filesystem import open_uri

    files, base = open_uri(source, make=False)
    folder = fs.SubTreeFileSystem(base, files)
    sizes = {
        info.path: int(info.size)
        for info in folder.get_file_info(fs.FileSelector("", recursive=True))
        if info.type == fs.FileType.File and info.path not in (MARK, LOCK)  # the source may be a copy itself
    }
    if not sizes:
        raise UserError(f"data.source {name} has no files")
    for path in sizes:
        if path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise UserError(f"data.source {name}: {path!r} is outside the folder")
    digests = _digests(folder, name) if DIGESTS in sizes else {}
    for path in digests:
        if path not in sizes:
            raise UserError(f"data.source {name} has no {path}, which its {DIGESTS} lists")
    return _Listing(name, folder, sizes, digests)


def _digests(folder: Any, name: str) -> Mapping[str, str]:
    with folder.open_input_stream(DIGESTS) as stream:
        lines = stream.read().decode("utf-8", "replace").splitlines()
    digests = {}
    for number, line in enumerate(lines, start=1):
        digest, gap, path = line[:64], line[64:66], line[66:].removeprefix("./")
        if gap not in ("  ", " *") or not path or set(digest) - set("0123456789abcdef"):
            raise UserError(f"data.source {name}: line {number} of {DIGESTS} is not what sha256sum writes")
        digests[path] = digest
    return digests


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes > 2**27 else f"{num_bytes / 2**20:.1f} MiB"
