"""Decoded images of a data set in one file, shared by the processes and the runs of a machine.

The file has a header and one record an image, in the order of the images' names::

    header: magic, JSON of what the file is (format, decoders, sizes), zeros to HEADER_BYTES
    record: crc32 of the pixels | stamp of the image's file | uint8 pixels (3, S, S) | zeros

Records are written as images are first decoded, by whichever process does so; two that decode the
same image write the same bytes. A record counts only if its checksum is right, at every read, and
its stamp is that of the image's file, at each process's first: half-written, lost and outdated
records are decoded again. Records are read and written by plain reads and writes, not through a
memory map: the kernel keeps the pages once for all processes in either case, but a map of a file
that is cut short or on a full disk kills its process.

Who has a cache open holds a shared lock on it, so that nobody makes room by removing it; who opens
or makes one holds the folder's lock meanwhile.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_dmml.data.dataset import FileImages, ImageSet, Stamp

FORMAT = 2
"""Rises with every change of the file's layout or of how images are decoded."""

HEADER_BYTES = 4096
SUFFIX = ".images"
LOCK_S = 20.0
"""Seconds until a lock that is never granted is given up."""

_MAGIC = b"ray-dmml images\n"
_RECORD = struct.Struct("<Iqq")  # checksum of the pixels, and the two numbers of the stamp
_DECODERS = ("torch", "torchvision", "pillow")

Log = Callable[[str], None]


def default_folder() -> Path:
    """``ray-dmml`` in ``$XDG_CACHE_HOME``, or else in ``~/.cache``.

    Raises:
        OSError: there is no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "ray-dmml"
    try:
        return Path.home() / ".cache" / "ray-dmml"
    except RuntimeError:
        raise OSError(errno.ENOENT, "there is no home folder", "~/.cache") from None


class ImageCache:
    """The file: decoded images by slot, for any number of processes at once.

    Args:
        path: the file, made by :func:`open_cache`.
        capacity: records to use.
        size: S of the images, in pixels.
        log: is told, once, when the disk refuses.

    Raises:
        OSError: it cannot be opened or locked.
    """

    def __init__(self, path: Path, capacity: int, size: int, log: Log) -> None:
        self.path, self.capacity, self._log = path, capacity, log
        self._shape = (3, size, size)
        self._record_bytes = record_bytes(size)
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        _lock(self._file, shared=True)
        self._up_to_date = bytearray(capacity)
        self._writable = True
        self._refusing = threading.Lock()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def get(self, slot: int, stamp: Callable[[], Stamp]) -> Tensor | None:
        """uint8 (3, S, S), or None where it is not there as decoded from the file of that stamp."""
        image = torch.empty(self._shape, dtype=torch.uint8)
        header, pixels = bytearray(_RECORD.size), _bytes(image)
        try:
            count = os.preadv(self._file, [header, pixels], self._offset(slot))
        except OSError:  # a disk that fails costs time, not the run
            return None
        checksum, *stamped = _RECORD.unpack(header)
        # A record never written is all zeros, whose checksum is not zero.
        if count < len(header) + len(pixels) or checksum != zlib.crc32(pixels):
            return None
        if not self._up_to_date[slot]:
            if tuple(stamped) != stamp():
                return None
            self._up_to_date[slot] = 1
        return image

    def put(self, slot: int, stamp: Stamp, image: Tensor) -> None:
        """Keeps an image; where the disk refuses, says so once and keeps no more."""
        if not self._writable:
            return
        pixels = _bytes(image.contiguous())
        try:
            header = _RECORD.pack(zlib.crc32(pixels), *stamp)
            count = os.pwritev(self._file, [header, pixels], self._offset(slot))
            if count < len(header) + len(pixels):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (OSError, struct.error) as error:
            with self._refusing:
                if self._writable:
                    self._writable = False
                    self._log(_refusal(self.path, error))

    def _offset(self, slot: int) -> int:
        return HEADER_BYTES + slot * self._record_bytes


class CachedImages:
    """Image files read through a cache; the same images to the bit.

    Args:
        source: decodes what the cache has not.
        slots: of each image; those beyond the cache's capacity are decoded at every use.
    """

    def __init__(self, source: FileImages, cache: ImageCache, slots: Sequence[int]) -> None:
        self._source, self._cache, self._slots = source, cache, tuple(slots)

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def read(self, index: int) -> Tensor:
        slot = self._slots[index]
        if slot >= self._cache.capacity:
            return self._source.read(index)
        image = self._cache.get(slot, lambda: self._source.stamp(index))
        if image is None:
            # The stamp from before decoding: a file that is replaced meanwhile is read again.
            stamp = self._source.stamp(index)
            image = self._source.read(index)
            self._cache.put(slot, stamp, image)
        return image


def through_cache(
    sets: Sequence[ImageSet],
    folder: Path | None,
    limit_bytes: int,
    log: Log | None = None,
) -> list[ImageSet]:
    """The sets, read through one cache file; as they are where there can be none, which is said.

    Args:
        sets: image files of one root, size and resize.
        folder: of the cache files; None: the usual one.
        limit_bytes: of all cache files in the folder together.
        log: takes a sentence on what does not work as asked; None: the module's logger.
    """
    log = log or logging.getLogger(__name__).warning
    sources = [images.files() for images in sets]
    paths = sorted({path for source in sources for path in source.paths})
    if not hasattr(os, "preadv"):
        log("decoded images are not kept: this system has no os.preadv")
        return list(sets)
    try:
        folder = folder or default_folder()
        cache = open_cache(sources[0], paths, folder, limit_bytes, log)
    except OSError as error:
        log(_refusal(error.filename or folder or "the cache", error))
        return list(sets)
    slot_of = {path: slot for slot, path in enumerate(paths)}
    return [
        dataclasses.replace(
            images, source=CachedImages(source, cache, [slot_of[path] for path in source.paths])
        )
        for images, source in zip(sets, sources, strict=True)
    ]


def open_cache(
    like: FileImages, paths: Sequence[str], folder: Path, limit_bytes: int, log: Log
) -> ImageCache:
    """The cache file of these images, made, grown or made anew where needed.

    It is named by where and what the images are and by what decodes them, not by how they are
    split, so that every run on them finds it. Where all files of the folder would exceed the limit
    the longest unused go; those that somebody has open stay, and this one has less room. It takes
    at most half of what is free on the disk.

    Args:
        like: root, size and resize of the images.
        paths: of all of them, in the order of their slots.

    Raises:
        OSError: there can be none.
    """
    size = like.decode_size
    facts: dict[str, Any] = {
        "format": FORMAT,
        "size": size,
        "images": len(paths),
        "decoders": {name: _version(name) for name in _DECODERS},
    }
    key = [str(like.root.resolve()), like.resize, json.dumps(facts), *paths]
    name = hashlib.sha256("\0".join(key).encode(errors="surrogateescape")).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{SUFFIX}"
    with _folder_locked(folder):
        has, problem = _inspect(path, facts)
        if problem:
            log(f"the decoded images in {path} {problem}: they are decoded anew")
            path.unlink()  # who has it open goes on with it
            has = None
        whole = _file_bytes(len(paths), size)
        room = limit_bytes - _make_room(folder, path, limit_bytes - whole)
        # Half of what is free stays so: checkpoints need disk, too.
        held = path.stat().st_blocks * 512 if has else 0
        free = held + shutil.disk_usage(folder).free // 2
        capacity = min(len(paths), (min(room, free) - HEADER_BYTES) // record_bytes(size))
        if capacity <= 0:
            few = "data.cache_gib" if room <= free else "half of the free disk"
            raise OSError(errno.ENOSPC, f"{few} is less than one image", str(folder))
        if capacity < len(paths):
            log(f"{capacity} of {len(paths)} decoded images are kept in {folder}: more do not fit")
        if has is None or _file_bytes(has, size) > room:
            _create(path, {**facts, "capacity": capacity})
        elif has < capacity:
            _write_header(path, {**facts, "capacity": capacity})
        else:
            capacity = has
        os.utime(path)  # when it was used last
        return ImageCache(path, capacity, size, log)


def record_bytes(size: int) -> int:
    """Of one image; whole pages, so that no two machines write the same page of a shared disk."""
    return -(-(_RECORD.size + 3 * size * size) // 4096) * 4096


def _bytes(image: Tensor) -> memoryview:
    """The tensor's own memory."""
    return memoryview(image.numpy().data).cast("B")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a fork of another name
        return "unknown"


def _file_bytes(capacity: int, size: int) -> int:
    return HEADER_BYTES + capacity * record_bytes(size)


def _inspect(path: Path, facts: dict[str, Any]) -> tuple[int | None, str | None]:
    """The capacity of the file that is there, if any; and why it is not to be used, if so."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except FileNotFoundError:
        return None, None
    try:
        if not header.startswith(_MAGIC):
            return 0, "are no cache of this program"
        found = dict(json.loads(header[len(_MAGIC) :].rstrip(b"\0")))
        capacity = int(found.pop("capacity"))
    except (ValueError, TypeError, KeyError):
        return 0, "have a damaged header"
    if found != facts:
        return (
            0,
            f"are of another {', '.join(key for key in facts if found.get(key) != facts[key])}",
        )
    if path.stat().st_size < _file_bytes(capacity, facts["size"]):
        return 0, "are cut short"
    return capacity, None


def _create(path: Path, facts: dict[str, Any]) -> None:
    """Aside and then renamed. The disk is taken as images are decoded."""
    aside = path.with_suffix(".part")
    try:
        aside.touch()
        _write_header(aside, facts)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _write_header(path: Path, facts: dict[str, Any]) -> None:
    with path.open("r+b") as file:
        file.truncate(_file_bytes(facts["capacity"], facts["size"]))
        file.write((_MAGIC + json.dumps(facts).encode()).ljust(HEADER_BYTES, b"\0"))


def _make_room(folder: Path, keep: Path, allowed: int) -> int:
    """Removes the longest unused other files until they take ``allowed`` bytes, and what a killed
    process left half made; the bytes that the others still take."""
    for left in folder.glob("*.part"):  # we hold the lock: nobody is making one
        left.unlink(missing_ok=True)
    others = [
        (found.stat().st_mtime, found.stat().st_size, found)
        for found in folder.glob(f"*{SUFFIX}")
        if found != keep
    ]
    total = sum(size for _, size, _ in others)
    for _, size, other in sorted(others):
        if total > allowed and not _in_use(other):
            other.unlink(missing_ok=True)
            total -= size
    return total


def _in_use(path: Path) -> bool:
    """Whether a process has it open."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return not _try_lock(file, shared=False)
    finally:
        os.close(file)


@contextmanager
def _folder_locked(folder: Path) -> Iterator[None]:
    """One process of the machine at a time; the lock ends with its holder."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(file, shared=False)
        yield
    finally:
        os.close(file)


def _lock(file: int, *, shared: bool) -> None:
    """Waits for the lock, though not for ever: a network file system may never grant it.

    Raises:
        OSError: it was not granted.
    """
    deadline = time.monotonic() + LOCK_S
    while not _try_lock(file, shared=shared):
        if time.monotonic() > deadline:
            raise OSError(errno.EAGAIN, f"its lock was not granted within {LOCK_S:g} s")
        time.sleep(0.01)


def _try_lock(file: int, *, shared: bool) -> bool:
    import fcntl  # Windows has none, and no cache either

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refusal(where: Path | str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return (
        f"decoded images cannot be kept in {where} ({reason}): the run goes on and decodes them at "
        "every use; see data.cache_dir and data.cache_gib"
    )
