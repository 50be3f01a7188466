"""Decoded images of a data set in one file, so that a machine decodes each of them once.

The file has a header and one record an image, in the order of the images' numbers::

    header: magic, JSON of what the file is (version, decoders, sizes), zeros to HEADER_BYTES
    record: crc32 of the pixels | stamp of the image's file | uint8 pixels (3, S, S)

Records are written as images are first decoded, by whichever process does so; two that decode the
same image write the same bytes. A record counts only if its stamp is that of the file as it is now
and its checksum is right, which every process looks at once: half-written, lost and outdated records
are decoded again. Records are read and written by plain reads and writes, not through a memory map:
the kernel keeps the pages once for all processes in either case, but a map of a file that is cut
short or on a full disk kills its process.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_dmml.data.images import FileImages, ImageSet, Stamp

FORMAT = 1
"""Rises with every change of the file's layout or of how images are decoded."""

HEADER_BYTES = 4096
SUFFIX = ".images"
_MAGIC = b"ray-dmml images\n"
_RECORD = struct.Struct("<Iqq")  # checksum of the pixels, and the two numbers of the stamp
_DECODERS = ("torch", "torchvision", "pillow")

_logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """``ray-dmml`` in ``$XDG_CACHE_HOME``, or else in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ray-dmml"


class ImageCache:
    """The file: decoded images by slot, for any number of processes at once.

    Args:
        path: the file, made by :func:`open_cache`.
        capacity: records it has.
        size: S of the images, in pixels.
    """

    def __init__(self, path: Path, capacity: int, size: int) -> None:
        self.path, self.capacity = path, capacity
        self._shape = (3, size, size)
        self._record_bytes = _record_bytes(size)
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._verified = bytearray(capacity)
        self._writable = True

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def get(self, slot: int, stamp: Callable[[], Stamp]) -> Tensor | None:
        """uint8 (3, S, S), or None where it is not there as decoded from the file of that stamp."""
        image = torch.empty(self._shape, dtype=torch.uint8)
        header = bytearray(_RECORD.size)
        pixels = _bytes(image)
        try:
            count = os.preadv(self._file, [header, pixels], self._offset(slot))
        except OSError:  # a disk that fails costs time, not the run
            return None
        if count < self._record_bytes:
            return None
        if not self._verified[slot]:
            checksum, *stamped = _RECORD.unpack(header)
            # A record never written is all zeros, and so is its checksum: no image has that stamp.
            if tuple(stamped) != stamp() or checksum != zlib.crc32(pixels):
                return None
            self._verified[slot] = 1
        return image

    def put(self, slot: int, stamp: Stamp, image: Tensor) -> None:
        """Keeps an image; where the disk refuses, says so once and keeps no more."""
        if not self._writable:
            return
        pixels = _bytes(image.contiguous())
        header = _RECORD.pack(zlib.crc32(pixels), *stamp)
        try:
            if os.pwritev(self._file, [header, pixels], self._offset(slot)) < self._record_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._writable = False
            _logger.warning("%s", _refusal(self.path, error))

    def _offset(self, slot: int) -> int:
        return HEADER_BYTES + slot * self._record_bytes


class CachedImages:
    """Image files read through a cache; the same images to the bit.

    Args:
        source: decodes what the cache has not.
        first_slot: where image 0 is; images beyond the cache's capacity are always decoded.
    """

    def __init__(self, source: FileImages, cache: ImageCache, first_slot: int) -> None:
        self._source, self._cache, self._first_slot = source, cache, first_slot

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def read(self, index: int) -> Tensor:
        slot = self._first_slot + index
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
    sets: Sequence[ImageSet], folder: Path, limit_bytes: int, log: Callable[[str], None]
) -> list[ImageSet]:
    """The sets, read through one cache file; as they are where there can be none, which is said.

    Images that do not fit into ``limit_bytes`` are the last ones, and are decoded at every use.
    """
    sources = [images.files() for images in sets]
    if not hasattr(os, "preadv"):
        log("decoded images are not kept: this system has no os.preadv")
        return list(sets)
    try:
        cache = open_cache(sources, folder, limit_bytes, log)
    except OSError as error:
        log(_refusal(folder, error))
        return list(sets)
    if cache is None:
        return list(sets)
    found, first_slot = [], 0
    for images, source in zip(sets, sources, strict=True):
        cached = CachedImages(source, cache, first_slot)
        found.append(dataclasses.replace(images, source=cached))
        first_slot += len(source)
    return found


def open_cache(
    sources: Sequence[FileImages], folder: Path, limit_bytes: int, log: Callable[[str], None]
) -> ImageCache | None:
    """The cache file of these images, made or made anew where needed; None: not one image fits.

    It is named by the images' folder, names and size, so that every run on them finds it. Of other
    data sets' files in the folder the longest unused are removed where all would exceed the limit.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    size = sources[0].decode_size
    num_images = sum(map(len, sources))
    capacity = min(num_images, (limit_bytes - HEADER_BYTES) // _record_bytes(size))
    if capacity <= 0:
        return None
    names = hashlib.sha256()
    for source in sources:
        names.update(f"{source.root.resolve()}\0{source.aspect}\0{size}\0".encode())
        names.update("\0".join(source.paths).encode(errors="surrogateescape"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{names.hexdigest()[:24]}{SUFFIX}"
    facts = {
        "format": FORMAT,
        "size": size,
        "images": num_images,
        "capacity": capacity,
        "decoders": {name: version(name) for name in _DECODERS},
    }
    with _locked(folder / "lock"):
        problem = _problem(path, facts)
        if problem:
            if path.exists():
                log(f"the decoded images in {path} {problem}: they are decoded anew")
            _make_room(folder, path, limit_bytes - _file_bytes(facts))
            _create(path, facts)
        os.utime(path)  # when it was used last
        return ImageCache(path, capacity, size)


def _bytes(image: Tensor) -> memoryview:
    """The tensor's own memory."""
    return memoryview(image.numpy().data).cast("B")


def _record_bytes(size: int) -> int:
    return _RECORD.size + 3 * size * size


def _file_bytes(facts: dict[str, Any]) -> int:
    return HEADER_BYTES + int(facts["capacity"]) * _record_bytes(facts["size"])


def _problem(path: Path, facts: dict[str, Any]) -> str | None:
    """Why the file is not to be used; None: it is."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        if not header.startswith(_MAGIC):
            return "are no cache of this program"
        found = json.loads(header[len(_MAGIC) :].rstrip(b"\0"))
        if found != facts:
            changed = [
                key for key in facts if not isinstance(found, dict) or found.get(key) != facts[key]
            ]
            return f"are of another {', '.join(changed)}"
        if path.stat().st_size != _file_bytes(facts):
            return "are cut short"
    except FileNotFoundError:
        return "are missing"
    except ValueError:
        return "have a damaged header"
    return None


def _create(path: Path, facts: dict[str, Any]) -> None:
    """Aside and then renamed, with all of its disk reserved: a disk that is full says so now."""
    for left in path.parent.glob("*.part"):  # by one that was killed; we hold the lock
        left.unlink(missing_ok=True)
    aside = path.with_suffix(".part")
    file = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, _file_bytes(facts))
        else:  # macOS: a full disk is met when a record is written
            os.truncate(file, _file_bytes(facts))
        os.pwrite(file, _MAGIC + json.dumps(facts).encode(), 0)
        os.fsync(file)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def _make_room(folder: Path, keep: Path, allowed: int) -> None:
    """Removes the longest unused other files until they take ``allowed`` bytes; who has one open
    goes on with it."""
    others = [
        (found.stat().st_mtime, found.stat().st_size, found)
        for found in folder.glob(f"*{SUFFIX}")
        if found != keep
    ]
    total = sum(size for _, size, _ in others)
    for _, size, other in sorted(others):
        if total <= allowed:
            return
        other.unlink(missing_ok=True)
        total -= size


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of the machine at a time; the lock ends with its holder."""
    import fcntl  # Windows has none, and no cache either

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _refusal(where: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    return (
        f"decoded images cannot be kept in {where} ({reason}): the run goes on and decodes them at "
        "every use; see data.cache_dir and data.cache_gib"
    )
