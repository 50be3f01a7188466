"""Audits a data set before a long run: unreadable and duplicate images, and small classes.

Two images are exact duplicates if their decoded squares are equal to the bit (SHA-256); equal files
always are. They are near duplicates if their 16 x 16 colour thumbnails, each minus its mean, have a
cosine of at least 0.98. A copy that was saved again, scaled or brightened has that (0.995 and above
on photos), and so have two photos of one scene moments apart. A copy cut by 4 % or turned grey has
not. Only the 8 most similar others of each image are compared, which bounds time and memory: all
pairs of 60,000 images are one matrix product of a minute or two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ray_dmml.config.schema import DataConfig
from ray_dmml.cores import num_cores
from ray_dmml.data.dataset import BadImageError, ImageSet
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.decoding import printable

NEAR = 0.98
"""The least cosine of the thumbnails of near duplicates."""

NEIGHBOURS = 8
SIDE = 16
_FLAT = 2.0  # grey levels: thumbnails that vary less show nothing, and resemble no other

SHOWN = 3
"""Findings of a kind that are printed; the JSON has all."""

_BAR = 40

Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Member:
    """An image of a group."""

    name: str
    label: str
    split: str


@dataclass(frozen=True)
class Group:
    """Images that are duplicates, each of at least one other of the group."""

    members: tuple[Member, ...]
    exact: bool
    """Exact duplicates; else near ones."""

    @property
    def in_two_classes(self) -> bool:
        return len({member.label for member in self.members}) > 1

    @property
    def in_train_and_test(self) -> bool:
        """Training classes held out for validation count as train: another seed trains on them."""
        return len({member.split == "test" for member in self.members}) > 1


@dataclass(frozen=True)
class AuditReport:
    """The findings of an audit."""

    splits: dict[str, tuple[int, int]]
    """(images, classes) of train, validation (if there is one) and test."""

    unreadable: tuple[tuple[str, str], ...]
    """(name, reason) of each image that cannot be read."""

    groups: tuple[Group, ...]
    """Duplicates, the exact ones first."""

    images_per_class: int
    """K: a batch has so many images of each class."""

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
        """Nothing needs repair. Near duplicates within a class are no fault: photos of one object."""
        return not (self.unreadable or self.exact or self.in_two_classes or self.small_classes)

    def to_json(self) -> dict[str, Any]:
        """All findings, with every name, as JSON has them."""
        return {
            "clean": self.is_clean(),
            "splits": {
                split: {"images": images, "classes": classes} for split, (images, classes) in self.splits.items()
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
            "small_classes": [{"label": label, "images": images} for label, images in self.small_classes],
            "class_sizes": list(self.class_sizes),
        }


def audit(config: DataConfig, watch: Watch | None = None) -> AuditReport:
    """Decodes every image once (into the cache of decoded images, if there is one).

    Args:
        config: the data set; ``on_bad_image`` and ``check_images`` do not apply.
        watch: called with (images done, images in all) after each image.

    Raises:
        UserError: a run could not load the data set either.
    """
    loaded = load_splits(config, check=False)
    sets = {"train": loaded.train, "validation": loaded.validation, "test": loaded.test}
    splits = {split: images for split, images in sets.items() if images is not None}
    members: list[Member] = []
    fingerprints: list[bytes] = []
    thumbnails: list[np.ndarray] = []
    unreadable: list[tuple[str, str]] = []
    total = sum(map(len, splits.values()))
    with ThreadPoolExecutor(num_cores()) as pool:
        for split, images in splits.items():
            for index, result in enumerate(_examine(pool, images)):
                name = images.source.name(index)
                if isinstance(result, str):
                    unreadable.append((name, result))
                else:
                    label = images.class_names[images.labels[index]]
                    members.append(Member(name, label, split))
                    fingerprints.append(result[0])
                    thumbnails.append(result[1])
                if watch is not None:
                    watch(len(members) + len(unreadable), total)
    sizes = {split: np.bincount(images.labels).tolist() for split, images in splits.items()}
    return AuditReport(
        splits={split: (len(images), images.num_classes) for split, images in splits.items()},
        unreadable=tuple(unreadable),
        groups=tuple(_groups(members, fingerprints, thumbnails)),
        images_per_class=config.images_per_class,
        small_classes=tuple(
            (label, size)
            for split, images in splits.items()
            if split != "test"
            for label, size in zip(images.class_names, sizes[split], strict=True)
            if size < config.images_per_class
        ),
        class_sizes=tuple(sorted(size for part in sizes.values() for size in part)),
    )


def _examine(pool: ThreadPoolExecutor, images: ImageSet) -> Iterator[tuple[bytes, np.ndarray] | str]:
    """(SHA-256 of the pixels, thumbnail) of each image, or why it cannot be read."""

    def examine(index: int) -> tuple[bytes, np.ndarray] | str:
        try:
            image = images.source.read(index)
        except BadImageError as error:
            return str(error)
        return hashlib.sha256(image.numpy().data).digest(), thumbnail(image)

    for start in range(0, len(images), 1024):  # so that not all are submitted at once
        yield from pool.map(examine, range(start, min(start + 1024, len(images))))


def thumbnail(image: Tensor) -> np.ndarray:
    """uint8 (3, S, S) -> float32 (3 * 16 * 16,) minus its mean, of length 1; shorter if flat."""
    small = torch.nn.functional.interpolate(image[None].float(), (SIDE, SIDE), mode="area")
    vector: np.ndarray = small.numpy().ravel()
    vector = vector - vector.mean()
    return vector / max(float(np.linalg.norm(vector)), _FLAT * vector.size**0.5)


def _groups(
    members: Sequence[Member], fingerprints: Sequence[bytes], thumbnails: Sequence[np.ndarray]
) -> Iterator[Group]:
    """Exact groups, then near ones of at least two different images."""
    by_fingerprint: dict[bytes, list[int]] = {}
    for index, fingerprint in enumerate(fingerprints):
        by_fingerprint.setdefault(fingerprint, []).append(index)
    copies = list(by_fingerprint.values())
    for indices in copies:
        if len(indices) > 1:
            yield Group(tuple(members[i] for i in indices), exact=True)
    if len(copies) < 2:
        return
    # One of each: a thousand copies of an image must not hide what else resembles it.
    for near in _similar(np.stack([thumbnails[indices[0]] for indices in copies])):
        yield Group(tuple(members[i] for part in near for i in copies[part]), exact=False)


def _similar(vectors: np.ndarray) -> Iterable[list[int]]:
    """(N, D) -> the indices of each group of at least two that a chain of near ones connects."""
    import faiss
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(vectors)
    cosines, others = faiss.knn(vectors, vectors, min(1 + NEIGHBOURS, count), metric=faiss.METRIC_INNER_PRODUCT)
    rows, columns = np.nonzero(cosines >= NEAR)
    targets = others[rows, columns]
    rows, targets = rows[rows != targets], targets[rows != targets]
    edges = coo_array((np.ones(len(rows), dtype=np.int8), (rows, targets)), shape=(count, count))
    _, component = connected_components(edges, directed=False)
    groups: dict[int, list[int]] = {}
    for index in np.unique(np.concatenate([rows, targets])).tolist():
        groups.setdefault(int(component[index]), []).append(index)
    return groups.values()


def print_report(report: AuditReport, console: Console) -> None:
    """Prints sizes, findings, and a histogram of the classes' sizes within 80 columns."""
    table = Table(box=None, pad_edge=False)
    for heading in ("split", "images", "classes"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, (images, classes) in report.splits.items():
        table.add_row(split, str(images), str(classes))
    console.print(table)
    messages = [message for _, message in report.unreadable]
    small = [f"{printable(label)}: {images}" for label, images in report.small_classes]
    few = f"training classes of fewer than {report.images_per_class} images"
    for title, lines, unit in (
        ("unreadable images", messages, ""),
        ("exact duplicates", list(map(_describe, report.exact)), "groups"),
        ("near duplicates", list(map(_describe, report.near)), "groups"),
        ("one image under two labels", list(map(_describe, report.in_two_classes)), "groups"),
        ("one image in train and test", list(map(_describe, report.in_train_and_test)), "groups"),
        (few, small, ""),
    ):
        count = f"{len(lines)} {unit}".strip() if lines else "none"
        _print(console, f"\n{title}: {count}")
        for line in lines[:SHOWN]:
            _print(console, f"  {line}")
        if len(lines) > SHOWN:
            _print(console, f"  ... and {len(lines) - SHOWN} more")
    _print(console, "\nclasses by number of images")
    for line in histogram(report.class_sizes):
        _print(console, f"  {line}")
    _print(console, "\nno problems" if report.is_clean() else "\nthere are problems to repair")


def histogram(sizes: Iterable[int]) -> list[str]:
    """A line for each power of two: 1, 2-3, 4-7, and so on."""
    counts: dict[int, int] = {}
    for size in sizes:
        power = size.bit_length() - 1
        counts[power] = counts.get(power, 0) + 1
    lines = []
    for power in range(min(counts), max(counts) + 1):
        low, high = 2**power, 2 ** (power + 1) - 1
        count = counts.get(power, 0)
        bar = "#" * -(-_BAR * count // max(counts.values()))
        lines.append(f"{low if low == high else f'{low}-{high}':>13}  {count:>7}  {bar}".rstrip())
    return lines


def _describe(group: Group) -> str:
    lines = [
        f"{printable(member.name)} ({printable(member.label)}, {member.split})" for member in group.members[:SHOWN]
    ]
    more = len(group.members) - SHOWN
    return "\n    = ".join(lines) + (f"\n    and {more} more" if more > 0 else "")


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)
