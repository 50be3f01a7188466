"""Images read by number, with their classes; class-disjoint splits; held-out validation classes."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ray_dmml.data.image_header import claimed_size
from ray_dmml.errors import UserError
from ray_dmml.randomness import derive_seed

Resize = Literal["stretch", "center_crop"]

Stamp = tuple[int, int]
"""Size and time of change of an image's file: what tells that it is another one. The time is the
file system's own (ctime): archives and copies set the other one back."""


MAX_PIXELS = 178_956_970
"""Of an image, as its header claims them: 0.5 GiB as uint8 RGB. Pillow refuses at the same size."""

MAX_FILE_BYTES = 2**30
"""Of an image's file: what so many pixels take at 16 bits a channel, not compressed."""

FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF"),
    "WEBP",
)
"""What an image's file may be, by Pillow's names."""

_TOO_LARGE = f"at most {MAX_PIXELS} are decoded"
_MAX_ASPECT_RATIO = 16


class BadImageError(UserError):
    """An image cannot be read; the message names it and the reason."""


def printable(name: str) -> str:
    """A file's name for a message: what is no text, or would move a terminal's cursor, is escaped."""
    if name.isprintable():
        return name
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)


class ImageSource(Protocol):
    """Reads images by number."""

    def __len__(self) -> int:
        """How many images there are."""

    def name(self, index: int) -> str:
        """What to call an image in a message; unique within a data set."""

    def read(self, index: int) -> Tensor:
        """The image as uint8 (3, S, S), S the decode size; the same at every call.

        Raises:
            BadImageError: it cannot be read.
        """


class FileImages:
    """Image files under one folder, decoded to (3, S, S) uint8 RGB squares.

    Args:
        root: the folder.
        paths: the files, relative to it.
        decode_size: S, in pixels.
        resize: ``stretch`` resizes both sides to S; ``center_crop`` the shorter one, and cuts the middle.
    """

    def __init__(
        self, root: Path, paths: Sequence[str], decode_size: int, resize: Resize = "stretch"
    ) -> None:
        self.root = root
        self.paths = tuple(paths)
        self.decode_size = decode_size
        self.resize = resize

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def stamp(self, index: int) -> Stamp:
        """Of the file as it is now.

        Raises:
            BadImageError: it is not there.
        """
        try:
            found = os.stat(self.root / self.paths[index])
        except OSError as error:
            raise self._bad(index, error) from error
        return found.st_size, found.st_ctime_ns

    def read(self, index: int) -> Tensor:
        try:
            return to_square(_decode(self.root / self.paths[index]), self.decode_size, self.resize)
        except Exception as error:  # a corrupt file makes decoders raise nearly anything
            raise self._bad(index, error) from error

    def _bad(self, index: int, error: Exception) -> BadImageError:
        return BadImageError(
            f"image {printable(self.name(index))} cannot be read: {_reason(error)}"
        )


def _decode(path: Path) -> Tensor:
    """uint8 (3, H, W), upright according to its EXIF orientation, whatever its name says it is."""
    # More than a second to import, which a driver without files to read is spared.
    from torchvision.io import ImageReadMode, decode_image

    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # to read a pipe would wait for ever
        raise OSError("it is not a regular file")
    if found.st_size > MAX_FILE_BYTES:
        raise OSError(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
    array = np.fromfile(path, dtype=np.uint8)
    if not array.size:
        raise OSError("the file is empty")
    data = array.tobytes()
    size = claimed_size(data)
    if size is None:  # none of those that torchvision decodes within a bound
        return _decode_with_pillow(data)
    _refuse_huge(*size)
    try:
        image: Tensor = decode_image(
            torch.from_numpy(array), mode=ImageReadMode.RGB, apply_exif_orientation=True
        )
    except RuntimeError:  # rare kinds of JPEG; Pillow also says what is wrong
        return _decode_with_pillow(data)
    if image.dtype == torch.uint16:  # PNG with 16 bits a channel
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image


def _decode_with_pillow(data: bytes) -> Tensor:
    """BMP, TIFF, GIF (torchvision decodes all frames of one, we need the first) and rarer ones."""
    try:
        opened = Image.open(io.BytesIO(data), formats=_pillow_formats())
    except Image.DecompressionBombError:
        raise OSError(f"it claims too large a size, and {_TOO_LARGE}") from None
    with opened:
        _refuse_huge(*opened.size)
        upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I;16"):  # convert would cut off at 255
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise OSError("its pixels have 32 bits, and nothing says which value is white")
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


@functools.cache
def _pillow_formats() -> tuple[str, ...]:
    """Those that are pictures and decoded by Pillow itself: it would run Ghostscript for EPS."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _refuse_huge(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise OSError(f"it claims {width} x {height} pixels, and {_TOO_LARGE}")


def to_square(image: Tensor, size: int, resize: Resize) -> Tensor:
    """Resizes uint8 (3, H, W) to contiguous (3, size, size), bilinear with antialiasing."""
    height, width = image.shape[1:]
    if resize == "stretch":
        target = (size, size)
    else:
        shorter = min(height, width)
        # Of a thread of pixels only the middle is seen; all of it, enlarged, might be gigabytes.
        for side in (1, 2):
            longest = min(image.shape[side], _MAX_ASPECT_RATIO * shorter)
            image = image.narrow(side, (image.shape[side] - longest) // 2, longest)
        height, width = image.shape[1:]
        target = (round(height * size / shorter), round(width * size / shorter))
    if (height, width) != target:
        image = torch.nn.functional.interpolate(
            image[None], size=target, mode="bilinear", antialias=True
        )[0]
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    square: Tensor = image[:, top : top + size, left : left + size].contiguous()
    return square


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image in a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


class _Selection:
    """Some images of another source, in a given order."""

    def __init__(self, source: ImageSource, indices: np.ndarray) -> None:
        self.source: ImageSource = source
        self.indices = indices
        if isinstance(source, _Selection):  # one look-up however often a set is cut
            self.source, self.indices = source.source, source.indices[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> Tensor:
        return self.source.read(int(self.indices[index]))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one split with their class numbers."""

    source: ImageSource
    """Reads them."""

    labels: np.ndarray
    """(N,) int64: the class number of each image, 0 to C-1; every class has an image."""

    class_names: tuple[str, ...]
    """(C,) what the classes are called."""

    query: np.ndarray | None = None
    """(Q,) int64 numbers of the images that are queries; None (with gallery): all against all."""

    gallery: np.ndarray | None = None
    """(G,) int64 numbers of the images that queries are matched with."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def digest(self) -> str:
        """Of the images' names and classes, and of which are queries and gallery: equal where a number
        means the same image and all are judged alike."""
        content = hashlib.sha256(self.labels.astype("<i8").tobytes())
        for index in range(len(self)):
            name = self.source.name(index)  # a file's may be no text
            content.update(name.encode("utf-8", "surrogatepass") + b"\0")
        for numbers in (self.query, self.gallery):
            if numbers is not None:
                content.update(b"\0" + numbers.astype("<i8").tobytes())
        return content.hexdigest()

    def files(self) -> FileImages:
        """The files of the images, in their order.

        Raises:
            TypeError: they are not read from files.
        """
        source, indices = self.source, np.arange(len(self))
        if isinstance(source, _Selection):
            indices = source.indices
            source = source.source
        if not isinstance(source, FileImages):
            raise TypeError(f"{type(source).__name__} reads no files")
        paths = [source.paths[index] for index in indices]
        return FileImages(source.root, paths, source.decode_size, source.resize)

    def can_be_judged(self) -> bool:
        """Whether any query has another image of its class to find."""
        if self.query is None or self.gallery is None:
            return bool((np.bincount(self.labels) >= 2).any())
        gallery = {label: set[int]() for label in self.labels.tolist()}
        for index in self.gallery.tolist():
            gallery[int(self.labels[index])].add(index)
        return any(gallery[int(self.labels[q])] - {q} for q in self.query.tolist())

    def subset(self, indices: np.ndarray | Sequence[int]) -> ImageSet:
        """The images of these numbers (each at most once), in this order.

        Classes left without an image are dropped and the others renumbered in their old order;
        query and gallery keep those of their images that are left.
        """
        indices = np.asarray(indices, dtype=np.int64)
        kept, labels = np.unique(self.labels[indices], return_inverse=True)
        position = np.full(len(self), -1, dtype=np.int64)
        position[indices] = np.arange(len(indices))

        def moved(numbers: np.ndarray | None) -> np.ndarray | None:
            return None if numbers is None else position[numbers][position[numbers] >= 0]

        return ImageSet(
            source=_Selection(self.source, indices),
            labels=labels.astype(np.int64),
            class_names=tuple(self.class_names[c] for c in kept),
            query=moved(self.query),
            gallery=moved(self.gallery),
        )


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set cut by class: no class is in two of the three."""

    train: ImageSet
    """What the peers learn from."""

    validation: ImageSet | None
    """Training classes held out to choose checkpoints and settings; None: none are."""

    test: ImageSet
    """Classes to report on, once."""

    skipped: tuple[str, ...] = ()
    """Names of unreadable images that were left out."""

    def digests(self) -> dict[str, str]:
        """By which processes that each read the images themselves know that they read the same."""
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        return {name: part.digest() for name, part in parts.items() if part is not None}


def hold_out_classes(
    images: ImageSet, fraction: float, seed: int, fold: int = 0
) -> tuple[ImageSet, ImageSet | None]:
    """Cuts a set by class into (the rest, held-out classes); fraction 0 holds out none.

    ``round(fraction * C)`` classes, but at least 2 (one class alone is retrieved perfectly by any
    embedding), are drawn by ``seed``; the next as many by the next ``fold``.

    Raises:
        UserError: fewer than 2 held-out classes have 2 images, or fewer than 2 classes are left.
    """
    if fraction == 0:
        return images, None
    total = images.num_classes
    held = max(2, round(fraction * total))
    advice = "set data.validation_fraction=0 to train on all classes"
    if total - held < 2:
        raise UserError(
            f"data.validation_fraction {fraction} holds out {held} of {total} training classes "
            f"and leaves fewer than 2 to train on; {advice}"
        )
    generator = np.random.Generator(np.random.PCG64(derive_seed("validation classes", seed)))
    chosen = np.roll(generator.permutation(total), -fold * held)[:held]
    is_held = np.isin(images.labels, chosen)
    validation = images.subset(np.flatnonzero(is_held))
    if np.sum(np.bincount(validation.labels) >= 2) < 2 or not validation.can_be_judged():
        raise UserError(
            f"the {held} training classes held out by data.validation_fraction {fraction} cannot "
            "be judged: at least 2 of them need 2 images, and queries (of a manifest) an image of "
            f"their class in the gallery; take another data.validation_seed or {advice}"
        )
    return images.subset(np.flatnonzero(~is_held)), validation


def check_images(images: ImageSet, threads: int) -> list[tuple[int, str]]:
    """Decodes every image once; (number, message) of each that cannot be read, in order."""

    def complaint(index: int) -> str | None:
        try:
            images.source.read(index)
        except BadImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(complaint, range(len(images)), chunksize=1)
        return [(index, message) for index, message in enumerate(found) if message is not None]
