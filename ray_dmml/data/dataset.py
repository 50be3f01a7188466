"""Images with their classes, and how a data set is split by class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from ray_dmml.data.decoding import (
    Box,
    Resize,
    crop,
    decode,
    decode_content,
    printable,
    read_file,
    reason_of,
    to_square,
)
from ray_dmml.errors import UserError
from ray_dmml.randomness import derive_seed

Stamp = tuple[int, int]
"""Size and time of change of an image's file. Another stamp means another content. The time is the file system's own
(ctime), because archives and copies set the other one back."""


class BadImageError(UserError):
    """An image cannot be read; the message names it and the reason."""


class ImageSource(Protocol):
    """Reads images by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The image's name in messages; unique within a data set."""

    def read(self, index: int) -> Tensor:
        """The image as uint8 (3, S, S), S the decode size. Every call returns the same pixels.

        Raises:
            BadImageError: it cannot be read.
        """

    def subset(self, indices: Sequence[int]) -> ImageSource:
        """A source of the images at these indices, in this order."""


class FileImages:
    """Image files under one folder, decoded to (3, S, S) uint8 RGB squares.

    Args:
        root: the folder.
        paths: the files, relative to it.
        decode_size: S, in pixels.
        resize: ``stretch`` resizes both sides to S. ``center_crop`` resizes the shorter side to S and cuts out the
            middle.
        boxes: the part of each file's upright image that is used; None: all of it.
    """

    def __init__(
        self,
        root: Path,
        paths: Iterable[str],
        decode_size: int,
        resize: Resize = "stretch",
        boxes: Iterable[Box | None] | None = None,
    ) -> None:
        self.root, self.paths, self.decode_size, self.resize = root, tuple(paths), decode_size, resize
        self.boxes = (None,) * len(self.paths) if boxes is None else tuple(boxes)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        box = self.boxes[index]
        return self.paths[index] if box is None else f"{self.paths[index]} ({box})"

    def subset(self, indices: Sequence[int]) -> FileImages:
        paths, boxes = (self.paths[index] for index in indices), (self.boxes[index] for index in indices)
        return FileImages(self.root, paths, self.decode_size, self.resize, boxes)

    def num_bytes(self, index: int) -> int | None:
        """Size of the file; None if it is missing."""
        try:
            return os.stat(self.root / self.paths[index]).st_size
        except OSError:
            return None

    def stamp(self, index: int) -> Stamp:
        """Size and time of change of the file now.

        Raises:
            BadImageError: the file is missing.
        """
        try:
            status = os.stat(self.root / self.paths[index])
        except OSError as error:
            raise self._bad(index, error) from error
        return status.st_size, status.st_ctime_ns

    def read(self, index: int) -> Tensor:
        try:
            image, box = decode(self.root / self.paths[index]), self.boxes[index]
            return to_square(image if box is None else crop(image, box), self.decode_size, self.resize)
        except Exception as error:  # a corrupt file makes decoders raise nearly anything
            raise self._bad(index, error) from error

    def picture(self, index: int, at_least: int) -> Tensor:
        """The image for a person: uint8 (3, H, W) in its own proportions.

        Args:
            at_least: the image may be decoded smaller, with both sides of so many pixels or more.

        Raises:
            BadImageError: it cannot be read.
        """
        try:
            content, box = read_file(self.root / self.paths[index]), self.boxes[index]
            return decode_content(content, at_least=at_least) if box is None else crop(decode_content(content), box)
        except Exception as error:
            raise self._bad(index, error) from error

    def _bad(self, index: int, error: Exception) -> BadImageError:
        return BadImageError(f"image {printable(self.name(index))} cannot be read: {reason_of(error)}")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one split with their classes.

    Attributes:
        source: reads the images.
        labels: (N,) int64: the class of each image, 0 to C-1. Every class has an image.
        class_names: (C,) the names of the classes.
        query: (Q,) int64 indices of the query images. None (with gallery): all against all.
        gallery: (G,) int64 indices of the images that queries are matched with.
        exclude: (N,) int64. Images of the same number, such as those of one camera burst, are not matched with each
            other. None: an image is not matched with itself.
        categories: (N,) the category of each image, a group of classes that results are also given for; None: there
            are none.
    """

    source: ImageSource
    labels: np.ndarray
    class_names: tuple[str, ...]
    query: np.ndarray | None = None
    gallery: np.ndarray | None = None
    exclude: np.ndarray | None = None
    categories: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def digest(self) -> str:
        """SHA-256 of the images' names, classes, queries and gallery, and of what is excluded.

        Two sets with equal digests have the same image at every index and are evaluated alike.
        """
        content = hashlib.sha256(self.labels.astype("<i8").tobytes())
        for index in range(len(self)):
            name = self.source.name(index)  # the name of a file may not be text
            content.update(name.encode("utf-8", "surrogatepass") + b"\0")
        for indices in (self.query, self.gallery, self.exclude):
            if indices is not None:
                content.update(b"\0" + indices.astype("<i8").tobytes())
        return content.hexdigest()

    def num_evaluated(self) -> int:
        """The number of queries that have another image of their class in the gallery. Only these are evaluated."""
        everything = np.arange(len(self))
        query = everything if self.query is None else self.query
        gallery = everything if self.gallery is None else np.unique(self.gallery)
        exclude = everything if self.exclude is None else self.exclude
        return int(np.sum(count_relevant(self.labels, exclude, query, gallery) > 0))

    def can_be_evaluated(self) -> bool:
        """Whether any query has another image of its class in the gallery."""
        return self.num_evaluated() > 0

    def subset(self, indices: np.ndarray | Sequence[int]) -> ImageSet:
        """The images at these indices (each at most once), in this order.

        Classes without an image are dropped, and the others are renumbered in their old order. Images that are not in
        the subset also leave query and gallery.
        """
        indices = np.asarray(indices, dtype=np.int64)
        kept, labels = np.unique(self.labels[indices], return_inverse=True)
        position = np.full(len(self), -1, dtype=np.int64)
        position[indices] = np.arange(len(indices))

        def renumbered(old: np.ndarray | None) -> np.ndarray | None:
            return None if old is None else position[old][position[old] >= 0]

        return ImageSet(
            source=self.source.subset(indices.tolist()),
            labels=labels.astype(np.int64),
            class_names=tuple(self.class_names[c] for c in kept),
            query=renumbered(self.query),
            gallery=renumbered(self.gallery),
            exclude=None if self.exclude is None else self.exclude[indices],
            categories=None if self.categories is None else tuple(self.categories[i] for i in indices.tolist()),
        )


def count_relevant(labels: np.ndarray, exclude: np.ndarray, query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """(Q,) int64: how many images each query can find, those of its class without those of its number.

    Args:
        labels: (N,) int64, the class of each image.
        exclude: (N,) int64. Images of the same number are not matched with each other.
        query: (Q,) int64 indices of the images.
        gallery: (G,) int64, each at most once.
    """
    classes, numbers = (np.unique(of, return_inverse=True)[1] for of in (labels, exclude))
    both = np.unique(classes * (numbers.max(initial=0) + 1) + numbers, return_inverse=True)[1]
    of_class, excluded = (np.bincount(of[gallery], minlength=len(labels))[of[query]] for of in (classes, both))
    return of_class - excluded


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set split by class: no class is in two of the three. With ``data.split_by: image`` they share classes and
    no image.

    ``validation`` is held out of training to choose checkpoints and settings; None: nothing is. ``test`` is None if
    there are only training classes. ``skipped`` are the names of unreadable images that were left out.
    """

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet | None
    skipped: tuple[str, ...] = ()

    def parts(self) -> dict[str, ImageSet]:
        """``training``, and those of ``validation`` and ``test`` that there are."""
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    def digests(self) -> dict[str, str]:
        """The digest of each split. Processes compare them to know that they read the same images."""
        return {name: part.digest() for name, part in self.parts().items()}


def hold_out_classes(images: ImageSet, fraction: float, seed: int, fold: int = 0) -> tuple[ImageSet, ImageSet | None]:
    """Splits a set by class into (the rest, held-out classes); fraction 0 holds out none.

    ``seed`` shuffles the classes, and the first ``round(fraction * C)`` are held out, but at least 2: any embedding
    retrieves a single class perfectly. Each further ``fold`` takes the next ones.

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
    if np.sum(np.bincount(validation.labels) >= 2) < 2 or not validation.can_be_evaluated():
        raise UserError(
            f"the {held} training classes held out by data.validation_fraction {fraction} cannot "
            "be evaluated: at least 2 of them need 2 images, and queries (of a manifest) an image "
            f"of their class in the gallery; take another data.validation_seed or {advice}"
        )
    return images.subset(np.flatnonzero(~is_held)), validation


def hold_out_images(images: ImageSet, fraction: float, seed: int, fold: int = 0) -> tuple[ImageSet, ImageSet | None]:
    """Splits each class by image into (the rest, held-out images), see :func:`part_of_each_class`; fraction 0 holds out
    none.

    ``seed`` shuffles the images of each class. Each further ``fold`` takes the next ones.

    Raises:
        UserError: the held-out images cannot be evaluated.
    """
    if fraction == 0:
        return images, None
    generator = np.random.Generator(np.random.PCG64(derive_seed("validation images", seed)))
    is_held = part_of_each_class(images.labels, fraction, generator, fold)
    validation = images.subset(np.flatnonzero(is_held))
    if validation.num_classes < 2 or not validation.can_be_evaluated():
        raise UserError(
            f"the images held out by data.validation_fraction {fraction} cannot be evaluated: at least 2 classes need "
            "4 training images, and queries (of a manifest) an image of their class in the gallery; set "
            "data.validation_fraction=0 to train on all training images"
        )
    return images.subset(np.flatnonzero(~is_held)), validation


def part_of_each_class(
    labels: np.ndarray, fraction: float, generator: np.random.Generator | None, fold: int = 0
) -> np.ndarray:
    """Marks a part of the images of every class: (N,) int64 labels -> (N,) bool.

    Of a class of n images it is ``round(fraction * n)``, but at least 2, so that an image has another to find, and at
    most n - 2. A class of fewer than 4 images has none.

    Args:
        generator: shuffles the images of each class. None: the part is the last ones.
        fold: takes the part before, and at the beginning goes on from the end.
    """
    is_part = np.zeros(len(labels), dtype=bool)
    order = np.argsort(labels, kind="stable")
    for images in np.split(order, np.cumsum(np.bincount(labels))[:-1]):
        if generator is not None:
            images = generator.permutation(images)
        if len(images) >= 4:
            size = min(max(2, round(fraction * len(images))), len(images) - 2)
            is_part[np.roll(images, fold * size)[-size:]] = True
    return is_part


def check_images(images: ImageSet, threads: int) -> list[tuple[int, str]]:
    """Decodes every image once; returns (index, message) of each unreadable one, in order."""

    def check(index: int) -> str | None:
        try:
            images.source.read(index)
        except BadImageError as error:
            return str(error)
        except Exception as error:  # of a source of the user's own
            return f"image {printable(images.source.name(index))} cannot be read: {reason_of(error)}"
        return None

    with ThreadPoolExecutor(threads) as pool:
        messages = pool.map(check, range(len(images)))
        return [(index, message) for index, message in enumerate(messages) if message is not None]
