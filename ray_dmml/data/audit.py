"""Audits a data set before a long run: unreadable and duplicate images, and small classes.

Two images are exact duplicates if their decoded squares are equal to the bit (SHA-256); equal files always are. They
are near duplicates if their 16 x 16 colour thumbnails, each minus its mean, have a cosine of at least 0.98. A copy that
was saved again, scaled or brightened has that (0.995 and above on photos), and so have two photos of one scene moments
apart. A copy cut by 4 % or turned grey has not. Only the 8 most similar others of each image are compared, which bounds
time and memory: all pairs of 60,000 images are one matrix product of a minute or two.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from ray_dmml.config.schema import DataConfig
from ray_dmml.cores import num_cores
from ray_dmml.data.dataset import BadImageError
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.decoding import printable

NEAR = 0.98  # the least cosine of the thumbnails of near duplicates
NEIGHBOURS = 8
SIDE = 16
FLAT = 2.0  # grey levels: thumbnails that vary less show nothing, and resemble no other
SHOWN = 3  # findings of a kind that are printed; the JSON has all
BAR = 40


@dataclass(frozen=True)
class Member:
    name: str
    label: str
    split: str


@dataclass(frozen=True)
class Group:
    """Images that are duplicates (exact or near), each of at least one other of the group."""

    members: tuple[Member, ...]
    exact: bool

    @property
    def in_two_classes(self) -> bool:
        return len({member.label for member in self.members}) > 1

    @property
    def in_train_and_test(self) -> bool:
        """Training classes held out for validation count as train: another seed trains on them."""
        return len({member.split == "test" for member in self.members}) > 1


@dataclass(frozen=True)
class AuditReport:
    """The findings of an audit.

    Attributes:
        splits: (images, classes) of train, validation (if there is one) and test.
        unreadable: (name, reason) of each image that cannot be read.
        groups: duplicates, the exact ones first.
        images_per_class: K, the images of each class in a batch.
        small_classes: (class, images) of each class of train or validation with fewer than K.
        class_sizes: images of each class of all splits, ascending.
    """

    splits: dict[str, tuple[int, int]]
    unreadable: tuple[tuple[str, str], ...]
    groups: tuple[Group, ...]
    images_per_class: int
    small_classes: tuple[tuple[str, int], ...]
    class_sizes: tuple[int, ...]

    def is_clean(self) -> bool:
        """Nothing needs repair. Near duplicates within a class are no fault: photos of one object."""
        duplicates = any(group.exact or group.in_two_classes for group in self.groups)
        return not (self.unreadable or duplicates or self.small_classes)

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


def audit(config: DataConfig, watch: Callable[[int, int], None] | None = None) -> AuditReport:
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
    places = [(split, index) for split, images in splits.items() for index in range(len(images))]
    images_of: dict[bytes, list[Member]] = {}
    thumbnails: dict[bytes, np.ndarray] = {}
    unreadable: list[tuple[str, str]] = []

    def examine(place: tuple[str, int]) -> tuple[bytes, np.ndarray] | str:
        """(SHA-256 of the pixels, thumbnail) of an image, or why it cannot be read."""
        try:
            image = splits[place[0]].source.read(place[1])
        except BadImageError as error:
            return str(error)
        return hashlib.sha256(image.numpy().data).digest(), thumbnail(image)

    with ThreadPoolExecutor(num_cores()) as pool:
        chunks = (places[start : start + 1024] for start in range(0, len(places), 1024))
        results = (result for chunk in chunks for result in pool.map(examine, chunk))  # not all at once
        for done, ((split, index), result) in enumerate(zip(places, results, strict=True), start=1):
            images = splits[split]
            name = images.source.name(index)
            if isinstance(result, str):
                unreadable.append((name, result))
            else:
                fingerprint, small = result
                thumbnails[fingerprint] = small
                member = Member(name, images.class_names[images.labels[index]], split)
                images_of.setdefault(fingerprint, []).append(member)
            if watch is not None:
                watch(done, len(places))
    sizes = {split: np.bincount(images.labels).tolist() for split, images in splits.items()}
    copies = list(images_of.values())
    near = _similar(np.stack(list(thumbnails.values()))) if len(copies) > 1 else []
    return AuditReport(
        splits={split: (len(images), images.num_classes) for split, images in splits.items()},
        unreadable=tuple(unreadable),
        groups=(
            *(Group(tuple(members), exact=True) for members in copies if len(members) > 1),
            # One of each is compared: a thousand copies of an image must not hide what else resembles it.
            *(Group(tuple(member for i in group for member in copies[i]), exact=False) for group in near),
        ),
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


def thumbnail(image: Tensor) -> np.ndarray:
    """uint8 (3, S, S) -> float32 (3 * 16 * 16,) minus its mean, of length 1; shorter if flat."""
    small = torch.nn.functional.interpolate(image[None].float(), (SIDE, SIDE), mode="area")
    vector: np.ndarray = small.numpy().ravel()
    vector = vector - vector.mean()
    return vector / max(float(np.linalg.norm(vector)), FLAT * vector.size**0.5)


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
    table = Table(
        "split", Column("images", justify="right"), Column("classes", justify="right"), box=None, pad_edge=False
    )
    for split, (images, classes) in report.splits.items():
        table.add_row(split, str(images), str(classes))
    console.print(table)
    out = partial(console.print, highlight=False, markup=False)
    exact = [group for group in report.groups if group.exact]
    near = [group for group in report.groups if not group.exact]
    in_two_classes = [group for group in report.groups if group.in_two_classes]
    in_train_and_test = [group for group in report.groups if group.in_train_and_test]
    small = [f"{printable(label)}: {images}" for label, images in report.small_classes]
    for title, lines, unit in (
        ("unreadable images", [message for _, message in report.unreadable], ""),
        ("exact duplicates", list(map(_describe, exact)), " groups"),
        ("near duplicates", list(map(_describe, near)), " groups"),
        ("one image under two labels", list(map(_describe, in_two_classes)), " groups"),
        ("one image in train and test", list(map(_describe, in_train_and_test)), " groups"),
        (f"training classes of fewer than {report.images_per_class} images", small, ""),
    ):
        out(f"\n{title}: " + (f"{len(lines)}{unit}" if lines else "none"))
        for line in lines[:SHOWN]:
            out(f"  {line}")
        if len(lines) > SHOWN:
            out(f"  ... and {len(lines) - SHOWN} more")
    out("\nclasses by number of images")
    for line in histogram(report.class_sizes):
        out(f"  {line}")
    out("\nno problems" if report.is_clean() else "\nthere are problems to repair")


def histogram(sizes: Iterable[int]) -> list[str]:
    """A line for each power of two: 1, 2-3, 4-7, and so on."""
    counts = Counter(size.bit_length() - 1 for size in sizes)
    lines = []
    for power in range(min(counts), max(counts) + 1):
        low, high = 2**power, 2 ** (power + 1) - 1
        bar = "#" * -(-BAR * counts[power] // max(counts.values()))
        lines.append(f"{low if low == high else f'{low}-{high}':>13}  {counts[power]:>7}  {bar}".rstrip())
    return lines


def _describe(group: Group) -> str:
    lines = [f"{printable(image.name)} ({printable(image.label)}, {image.split})" for image in group.members[:SHOWN]]
    more = len(group.members) - SHOWN
    return "\n    = ".join(lines) + (f"\n    and {more} more" if more > 0 else "")
