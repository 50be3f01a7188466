"""Keeps decoded images in one file a data set, shared by the processes and runs of a machine.

The file has a header and one record an image, in the order of the images' names::

    header: magic, SHA-256 of the images' names and decoders, zeros to HEADER_BYTES
    record: crc32 of the pixels | stamp of the image's file | uint8 pixels (3, S, S) | zeros

Whichever process decodes an image first writes its record; two that decode the same image write the same bytes. A
reader trusts a record only if its checksum is right (at every read) and its stamp is that of the image's file (at the
first read of each process). It decodes other images again. Records are read and written without a memory map, which
would kill the process where the file is cut short or the disk is full. The kernel shares the pages of a file between
processes in either case.

A process holds a shared lock on each cache file that it has open, so that no other process removes the file to make
room. It holds the lock of the folder while it opens or creates one.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import struct
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from ray_dmml.data.cache_folder import default_folder
from ray_dmml.data.dataset import FileImages, ImageSet, Stamp
from ray_dmml.data.formats import decoder_versions

FORMAT = 5  # increases with every change of the file's layout or of how images are decoded
HEADER_BYTES = 4096
SUFFIX = ".images"
LOCK_S = 20.0  # a network file system may never grant the folder's lock

_MAGIC = b"ray-dmml images\n"
_RECORD = struct.Struct("<Iqq")  # checksum of the pixels, and the two numbers of the stamp

logger = logging.getLogger(__name__)


class ImageCache:
    """The open cache file of a data set: decoded images by slot.

    Args:
        path: the file, made by :func:`open_cache`.
        size: S of the images, in pixels.
        slots: slot of each image by its name.

    Raises:
        OSError: the file cannot be opened or locked.
    """

    def __init__(self, path: Path, size: int, slots: Mapping[str, int]) -> None:
        import fcntl  # Windows has none, and no cache either

        self.slots = slots
        self._path, self._shape, self._record_bytes = path, (3, size, size), record_bytes(size)
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self._up_to_date = set[int]()
        self._writable = True
        self._failing = threading.Lock()

    def __reduce__(self) -> tuple[type[ImageCache], tuple[Path, int, Mapping[str, int]]]:
        """Another process opens the file, and locks it, itself."""
        return ImageCache, (self._path, self._shape[-1], self.slots)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def get(self, slot: int, stamp: Callable[[], Stamp]) -> Tensor | None:
        """uint8 (3, S, S), or None if the slot has no image that was decoded from that stamp."""
        image = torch.empty(self._shape, dtype=torch.uint8)
        header, pixels = bytearray(_RECORD.size), _bytes(image)
        try:
            count = os.preadv(self._file, [header, pixels], self._offset(slot))
        except OSError:  # a failing disk costs time, not the run
            return None
        checksum, *written = _RECORD.unpack(header)
        # An unwritten record is all zeros, whose checksum is not zero.
        if count < len(header) + len(pixels) or checksum != zlib.crc32(pixels):
            return None
        if slot not in self._up_to_date:
            if tuple(written) != stamp():
                return None
            self._up_to_date.add(slot)
        return image

    def put(self, slot: int, stamp: Stamp, image: Tensor) -> None:
        """Writes an image. If the disk fails, warns once and writes no more."""
        if not self._writable:
            return
        pixels = _bytes(image.contiguous())
        try:
            header = _RECORD.pack(zlib.crc32(pixels), *stamp)
            count = os.pwritev(self._file, [header, pixels], self._offset(slot))
            if count < len(header) + len(pixels):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (OSError, struct.error) as error:
            with self._failing:
                if self._writable:
                    self._writable = False
                    _warn(self._path, error)

    def _offset(self, slot: int) -> int:
        return HEADER_BYTES + slot * self._record_bytes


class CachedImages:
    """Image files read through a cache: the same pixels, decoded once."""

    def __init__(self, source: FileImages, cache: ImageCache) -> None:
        self._source, self._cache = source, cache

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def num_bytes(self, index: int) -> int | None:
        return self._source.num_bytes(index)

    def picture(self, index: int, at_least: int) -> Tensor:
        return self._source.picture(index, at_least)

    def subset(self, indices: Sequence[int]) -> CachedImages:
        return CachedImages(self._source.subset(indices), self._cache)

    def read(self, index: int) -> Tensor:
        slot = self._cache.slots[self._source.name(index)]
        image = self._cache.get(slot, lambda: self._source.stamp(index))
        if image is None:
            # The stamp is taken first: if the file changes meanwhile, it is decoded again.
            stamp = self._source.stamp(index)
            image = self._source.read(index)
            self._cache.put(slot, stamp, image)
        return image


def through_cache(sets: Sequence[ImageSet], folder: Path | None, limit_bytes: int) -> list[ImageSet]:
    """The sets, read through one cache file. If there can be none, warns and returns them unchanged.

    Args:
        sets: image files of one root, size and resize.
        folder: folder of the cache files; None: :func:`default_folder`.
        limit_bytes: the most that all cache files in the folder may take.
    """
    sources = [images.source for images in sets if isinstance(images.source, FileImages)]
    kinds = {(source.root, source.decode_size, source.resize) for source in sources}
    if len(sources) < len(sets) or len(kinds) > 1:  # a data set of one's own has its own way
        return list(sets)
    try:
        folder = folder or default_folder()
        if not hasattr(os, "preadv"):
            raise OSError(errno.ENOSYS, "this system has no os.preadv")
        cache = open_cache(sources, folder, limit_bytes)
    except OSError as error:
        _warn(error.filename or folder, error)
        return list(sets)
    return [replace(images, source=CachedImages(source, cache)) for images, source in zip(sets, sources, strict=True)]


def open_cache(sources: Sequence[FileImages], folder: Path, limit_bytes: int) -> ImageCache:
    """Opens the cache file of these images, and creates it where needed.

    Its name depends on the images and their decoders, but not on the splits, so that every run on the images uses the
    same file. Other files that are not in use are removed, the longest unused first, until it fits within the limit.

    Raises:
        OSError: it does not fit, or the disk fails.
    """
    names = sorted({source.name(index) for source in sources for index in range(len(source))})
    root, resize, size = sources[0].root, sources[0].resize, sources[0].decode_size
    num_bytes = HEADER_BYTES + len(names) * record_bytes(size)
    key = (str(root.resolve()), resize, f"{FORMAT} {size}", torch.__version__, *decoder_versions(), *names)
    digest = hashlib.sha256("\0".join(key).encode(errors="surrogateescape")).hexdigest()
    header = (_MAGIC + digest.encode()).ljust(HEADER_BYTES, b"\0")
    path = folder / f"{digest[:24]}{SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock", timeout=LOCK_S, poll_interval=0.01):
        _make_room(folder, path, num_bytes, limit_bytes)
        if not _is_whole(path, header, num_bytes):
            if path.exists():
                logger.warning("%s is damaged or cut short: its images are decoded again", path)
            partial = path.with_suffix(".part")
            with partial.open("wb") as file:
                file.write(header)
                file.truncate(num_bytes)  # it takes disk only as images are decoded
            os.replace(partial, path)  # processes that have the old file open keep it
        os.utime(path)  # the time of its last use
        return ImageCache(path, size, {name: slot for slot, name in enumerate(names)})


def record_bytes(size: int) -> int:
    """Bytes of one record: whole pages, so that two machines never write one page of a shared disk."""
    return -(-(_RECORD.size + 3 * size * size) // 4096) * 4096


def _bytes(image: Tensor) -> memoryview:
    """The tensor's own memory."""
    return memoryview(image.numpy().data).cast("B")


def _is_whole(path: Path, header: bytes, num_bytes: int) -> bool:
    if not path.exists() or path.stat().st_size < num_bytes:
        return False
    with path.open("rb") as file:
        return file.read(HEADER_BYTES) == header


def _make_room(folder: Path, path: Path, num_bytes: int, limit: int) -> None:
    """Removes the longest unused other files until ``path`` fits, and remains of killed processes.

    Raises:
        OSError: it does not fit beside the files in use.
    """
    for partial in folder.glob("*.part"):  # no other process is making one: we hold the lock
        partial.unlink(missing_ok=True)
    status = {file: file.stat() for file in folder.glob(f"*{SUFFIX}") if file != path}
    excess = num_bytes + sum(file.st_size for file in status.values()) - limit
    if excess <= 0:
        return
    unused = [file for file in sorted(status, key=lambda file: status[file].st_mtime) if not _in_use(file)]
    if sum(status[file].st_size for file in unused) < excess:
        if path.exists() and not _in_use(path):
            path.unlink()
        few = f"data.cache_gib {limit / 2**30:.3g} has no room for {num_bytes / 2**30:.3g} GiB"
        raise OSError(errno.ENOSPC, few, str(folder))
    for file in unused:
        if excess > 0:
            file.unlink(missing_ok=True)
            excess -= status[file].st_size


def _in_use(path: Path) -> bool:
    """Whether a process has the file open."""
    import fcntl

    with path.open("r+b") as file:  # NFS locks exclusively only what is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _warn(where: Path | str | None, error: Exception) -> None:
    logger.warning(
        "decoded images cannot be kept in %s (%s): the run goes on and decodes them at every use; "
        "see data.cache_dir and data.cache_gib",
        where,
        getattr(error, "strerror", None) or error,
    )
