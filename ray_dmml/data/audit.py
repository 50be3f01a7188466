"""Looks a data set over before a long run: what cannot be read, what is there twice, what is small.

Two images are the same if their decoded squares are, to the bit (SHA-256): files that are equal
always are. They are nearly the same if their 16 x 16 colour thumbnails, each without its mean, have
a cosine of at least 0.98: a copy that was saved anew, scaled or made brighter has (0.995 and above
on photos), and so have two photos of one scene moments apart; a copy cut by 4 % or turned grey has
not. Of each image only the 8 most similar others are looked at, so that time and memory are bounded
in any data set: all pairs of 60,000 images are one matrix product of a minute or two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_dmml.config.schema import DataConfig
from ray_dmml.cores import num_cores
from ray_dmml.data.dataset import BadImageError, ImageSet
from ray_dmml.data.datasets import load_splits

NEAR = 0.98
"""Cosine from which on two thumbnails are of nearly the same image."""

NEIGHBOURS = 8
SIDE = 16
_FLAT = 2.0  # grey levels: thumbnails that vary less are of nothing, and like no other

Log = Callable[[str], None]
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Member:
    """An image of a group."""

    name: str
    label: str
    split: str


@dataclass(frozen=True)
class Group:
    """Images that are the same, or each nearly the same as another of the group."""

    members: tuple[Member, ...]
    exact: bool
    """The same to the bit; else nearly the same."""

    @property
    def in_two_classes(self) -> bool:
        return len({member.label for member in self.members}) > 1

    @property
    def in_train_and_test(self) -> bool:
        """Training classes held out for validation count as train: another seed trains on them."""
        return len({member.split == "test" for member in self.members}) > 1


@dataclass(frozen=True)
class Report:
    """What a look at a data set found."""

    splits: dict[str, tuple[int, int]]
    """(images, classes) of train, validation (if there is one) and test."""

    unreadable: tuple[tuple[str, str], ...]
    """(name, what is wrong) of each image that cannot be read."""

    groups: tuple[Group, ...]
    """Images that are there more than once, the exact ones first."""

    images_per_class: int
    """K: what a batch draws of each class."""

    small_classes: tuple[tuple[str, int], ...]
    """(class, images) of each class of train or validation with fewer than K."""

    class_sizes: tuple[int, ...]
    """Images of each class of all splits, ascending."""

    @property
    def exact(self) -> list[Group]:
        return [group for group in self.groups if group.exact]

    @property
    def near(self) -> list[Group]:
        return [group for group in self.groups if not group.exact]

    @property
    def in_two_classes(self) -> list[Group]:
        return [group for group in self.groups if group.in_two_classes]

    @property
    def in_train_and_test(self) -> list[Group]:
        return [group for group in self.groups if group.in_train_and_test]

    def is_clean(self) -> bool:
        """Nothing to mend. Near duplicates within one class are no fault: photos of one object."""
        return not (self.unreadable or self.exact or self.in_two_classes or self.small_classes)

    def to_json(self) -> dict[str, Any]:
        """All of it, with every name, as JSON has it."""
        return {
            "clean": self.is_clean(),
            "splits": {
                split: {"images": images, "classes": classes}
                for split, (images, classes) in self.splits.items()
            },
            "unreadable": [{"name": name, "reason": reason} for name, reason in self.unreadable],
            "duplicates": [
                {
                    "exact": group.exact,
                    "two_classes": group.in_two_classes,
                    "train_and_test": group.in_train_and_test,
                    "images": [asdict(member) for member in group.members],
                }
                for group in self.groups
            ],
            "images_per_class": self.images_per_class,
            "small_classes": [
                {"label": label, "images": images} for label, images in self.small_classes
            ],
            "class_sizes": list(self.class_sizes),
        }


def audit(config: DataConfig, log: Log | None = None, watch: Watch | None = None) -> Report:
    """Decodes every image once (into the cache of decoded images, where there is one).

    Args:
        config: which data set; ``on_bad_image`` and ``check_images`` play no part.
        log: takes one line for each thing worth knowing.
        watch: is told (images done, images) now and then.

    Raises:
        UserError: a run could not load the data set either.
    """
    loaded = load_splits(config, log, check=False)
    sets = {"train": loaded.train, "validation": loaded.validation, "test": loaded.test}
    splits = {split: images for split, images in sets.items() if images is not None}
    members: list[Member] = []
    prints: list[bytes] = []
    thumbnails: list[np.ndarray] = []
    unreadable: list[tuple[str, str]] = []
    total = sum(map(len, splits.values()))
    with ThreadPoolExecutor(num_cores()) as pool:
        for split, images in splits.items():
            for index, found in enumerate(_in_turn(pool, images)):
                name = images.source.name(index)
                if isinstance(found, str):
                    unreadable.append((name, found))
                else:
                    label = images.class_names[images.labels[index]]
                    members.append(Member(name, label, split))
                    prints.append(found[0])
                    thumbnails.append(found[1])
                if watch is not None:
                    watch(len(members) + len(unreadable), total)
    sizes = {split: np.bincount(images.labels).tolist() for split, images in splits.items()}
    return Report(
        splits={split: (len(images), images.num_classes) for split, images in splits.items()},
        unreadable=tuple(unreadable),
        groups=tuple(_groups(members, prints, thumbnails)),
        images_per_class=config.images_per_class,
        small_classes=tuple(
            (label, size)
            for split, images in splits.items()
            if split != "test"
            for label, size in zip(images.class_names, sizes[split], strict=True)
            if size < config.images_per_class
        ),
        class_sizes=tuple(sorted(size for found in sizes.values() for size in found)),
    )


def _in_turn(
    pool: ThreadPoolExecutor, images: ImageSet
) -> Iterator[tuple[bytes, np.ndarray] | str]:
    """(SHA-256 of the pixels, thumbnail) of each image, or why there are none."""

    def look(index: int) -> tuple[bytes, np.ndarray] | str:
        try:
            image = images.source.read(index)
        except BadImageError as error:
            return str(error)
        return hashlib.sha256(image.numpy().data).digest(), thumbnail(image)

    for start in range(0, len(images), 1024):  # so that not all are submitted at once
        yield from pool.map(look, range(start, min(start + 1024, len(images))))


def thumbnail(image: Tensor) -> np.ndarray:
    """uint8 (3, S, S) -> float32 (3 * 16 * 16,) without its mean, of length 1; shorter if flat."""
    small = torch.nn.functional.interpolate(image[None].float(), (SIDE, SIDE), mode="area")
    vector: np.ndarray = small.numpy().ravel()
    vector = vector - vector.mean()
    return vector / max(float(np.linalg.norm(vector)), _FLAT * vector.size**0.5)


def _groups(
    members: Sequence[Member], prints: Sequence[bytes], thumbnails: Sequence[np.ndarray]
) -> Iterator[Group]:
    """Exact groups, then near ones of at least two different images."""
    same: dict[bytes, list[int]] = {}
    for index, fingerprint in enumerate(prints):
        same.setdefault(fingerprint, []).append(index)
    classes = list(same.values())  # of images that are the same
    for indices in classes:
        if len(indices) > 1:
            yield Group(tuple(members[i] for i in indices), exact=True)
    if len(classes) < 2:
        return
    # One of each: a thousand copies of an image must not hide what else is like it.
    for near in _alike(np.stack([thumbnails[indices[0]] for indices in classes])):
        yield Group(tuple(members[i] for part in near for i in classes[part]), exact=False)


def _alike(vectors: np.ndarray) -> Iterable[list[int]]:
    """(N, D) -> the numbers of each group of at least two that a chain of near ones connects."""
    import faiss
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(vectors)
    cosines, others = faiss.knn(
        vectors, vectors, min(1 + NEIGHBOURS, count), metric=faiss.METRIC_INNER_PRODUCT
    )
    rows, columns = np.nonzero(cosines >= NEAR)
    targets = others[rows, columns]
    rows, targets = rows[rows != targets], targets[rows != targets]
    edges = coo_array((np.ones(len(rows), dtype=np.int8), (rows, targets)), shape=(count, count))
    _, component = connected_components(edges, directed=False)
    groups: dict[int, list[int]] = {}
    for index in np.unique(np.concatenate([rows, targets])).tolist():
        groups.setdefault(int(component[index]), []).append(index)
    return groups.values()
