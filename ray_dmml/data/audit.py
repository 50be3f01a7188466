"""Audits a data set before a long run: what a run would refuse, unreadable and duplicate images, small classes.

All faults are reported together: what is wrong is left out, and the audit goes on with the rest.

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
from ray_dmml.data.dataset import BadImageError, Splits
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.decoding import printable
from ray_dmml.data.findings import Findings, notes_on_validation
from ray_dmml.data.sampler import ClassBalancedSampler
from ray_dmml.errors import UserError

NEAR = 0.98  # the least cosine of the thumbnails of near duplicates
NEIGHBOURS = 8
SIDE = 16
FLAT = 2.0  # grey levels: thumbnails that vary less show nothing, and resemble no other
SHOWN = 3  # findings of a kind that are printed; the JSON has all
SHOWN_FAULTS = 20
BAR = 40


@dataclass(frozen=True)
class AuditedImage:
    name: str
    label: str
    split: str


@dataclass(frozen=True)
class Group:
    """Images that are duplicates (exact or near), each of at least one other of the group.

    ``train_and_test``: training classes held out for validation count as train, because another seed trains on them.
    """

    exact: bool
    two_classes: bool
    train_and_test: bool
    images: list[AuditedImage]


@dataclass(frozen=True)
class AuditReport:
    """The findings of an audit.

    Attributes:
        faults: why a run would refuse the data set, each a sentence.
        splits: ``images`` and ``classes`` of train, validation (if there is one) and test.
        unreadable: ``name`` and ``reason`` of each image that cannot be read.
        duplicates: groups of images, the exact duplicates first.
        images_per_class: K, the images of each class in a batch.
        small_classes: ``label`` and ``images`` of each class that trains (now or with another seed) with fewer than K.
        class_sizes: images of each class of all splits, ascending.
        notes: what of the data set is not used, such as files that are not images, and whether validation is coarse.
    """

    faults: list[str]
    splits: dict[str, dict[str, int]]
    unreadable: list[dict[str, str]]
    duplicates: list[Group]
    images_per_class: int
    small_classes: list[dict[str, Any]]
    class_sizes: list[int]
    notes: list[str]

    def is_clean(self) -> bool:
        """Nothing needs repair. Near duplicates within a class are no fault: photos of one object."""
        duplicates = any(group.exact or group.two_classes for group in self.duplicates)
        return not (self.faults or self.unreadable or duplicates or self.small_classes)

    def to_json(self) -> dict[str, Any]:
        return {"clean": self.is_clean(), **asdict(self)}


def audit(config: DataConfig, watch: Callable[[int, int], None] | None = None) -> AuditReport:
    """Decodes every image once (into the cache of decoded images, if there is one).

    Args:
        config: the data set; ``on_bad_image`` and ``check_images`` do not apply.
        watch: called with (images done, images in all) after each image.

    Raises:
        UserError: there is no data set, such as where its folder is missing.
    """
    loaded, findings = _load(config)
    sets = {} if loaded is None else {"train": loaded.train, "validation": loaded.validation, "test": loaded.test}
    splits = {split: images for split, images in sets.items() if images is not None}
    places = [(split, index) for split, images in splits.items() for index in range(len(images))]
    images_of: dict[bytes, list[AuditedImage]] = {}
    thumbnails: dict[bytes, np.ndarray] = {}
    unreadable: list[dict[str, str]] = []

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
                unreadable.append({"name": name, "reason": result})
            else:
                fingerprint, small = result
                thumbnails[fingerprint] = small
                image = AuditedImage(name, images.class_names[images.labels[index]], split)
                images_of.setdefault(fingerprint, []).append(image)
            if watch is not None:
                watch(done, len(places))
    if unreadable:  # data.on_bad_image: skip leaves them out
        _, without = _load(config, frozenset(row["name"] for row in unreadable))
        findings.faults += [
            f"without the unreadable images: {fault}" for fault in without.faults if fault not in findings.faults
        ]
    sizes = {split: np.bincount(images.labels).tolist() for split, images in splits.items()}
    size_of = Counter[str]()  # a class may be in several splits
    for split, images in splits.items():
        size_of.update(dict(zip(images.class_names, sizes[split], strict=True)))
    copies = list(images_of.values())
    near = _similar(np.stack(list(thumbnails.values()))) if len(copies) > 1 else []
    return AuditReport(
        faults=findings.faults,
        splits={split: {"images": len(images), "classes": images.num_classes} for split, images in splits.items()},
        unreadable=unreadable,
        duplicates=[
            *(_group(images, exact=True) for images in copies if len(images) > 1),
            # One of each is compared: a thousand copies of an image must not hide what else resembles it.
            *(_group([image for i in indices for image in copies[i]], exact=False) for indices in near),
        ],
        images_per_class=config.images_per_class,
        small_classes=[
            {"label": label, "images": size}
            for split, images in splits.items()
            # Held-out classes train with another seed; of held-out images, each class trains with its others.
            if split == "train" or (split == "validation" and config.split_by == "class")
            for label, size in zip(images.class_names, sizes[split], strict=True)
            if size < config.images_per_class
        ],
        class_sizes=sorted(size_of.values()),
        notes=[*findings.notes, *notes_on_validation(splits.get("validation"))],
    )


def _load(config: DataConfig, skip: frozenset[str] = frozenset()) -> tuple[Splits | None, Findings]:
    """The images that a run could use, None if there are none, and all faults for which it would refuse the others."""
    findings = Findings(collects_faults=True)
    try:
        splits = load_splits(config, skip=skip, check=False, findings=findings)
    except UserError as error:
        if not findings.faults:
            raise
        findings.fault(str(error))
        return None, findings
    try:
        ClassBalancedSampler(splits.train.labels, config.classes_per_batch, config.images_per_class, seed=0)
    except UserError as error:
        findings.fault(str(error))
    return splits, findings


def _group(images: list[AuditedImage], exact: bool) -> Group:
    labels, in_test = {image.label for image in images}, {image.split == "test" for image in images}
    return Group(exact, len(labels) > 1, len(in_test) > 1, images)


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
    for split, size in report.splits.items():
        table.add_row(split, str(size["images"]), str(size["classes"]))
    console.print(table)
    out = partial(console.print, highlight=False, markup=False)
    for note in report.notes:
        out(f"\n{note}")
    groups = [(group, _describe(group)) for group in report.duplicates]
    small = [f"{printable(row['label'])}: {row['images']}" for row in report.small_classes]
    for title, lines, unit in (
        ("faults for which a run would refuse the data set", report.faults, ""),
        ("unreadable images", [row["reason"] for row in report.unreadable], ""),
        ("exact duplicates", [text for group, text in groups if group.exact], "group"),
        ("near duplicates", [text for group, text in groups if not group.exact], "group"),
        ("one image under two labels", [text for group, text in groups if group.two_classes], "group"),
        ("one image in train and test", [text for group, text in groups if group.train_and_test], "group"),
        (f"training classes of fewer than {report.images_per_class} images", small, ""),
    ):
        number = f"{len(lines)} {unit}{'' if len(lines) == 1 else 's'}" if unit else str(len(lines))
        out(f"\n{title}: " + (number if lines else "none"))
        shown = SHOWN_FAULTS if lines is report.faults else SHOWN
        for line in lines[:shown]:
            out(f"  {line}")
        if len(lines) > shown:
            out(f"  ... and {len(lines) - shown} more")
    if report.class_sizes:
        out("\nclasses by number of images")
    for line in histogram(report.class_sizes):
        out(f"  {line}")
    out("\nno problems" if report.is_clean() else "\nthere are problems to repair")


def histogram(sizes: Iterable[int]) -> list[str]:
    """A line for each power of two: 1, 2-3, 4-7, and so on."""
    counts = Counter(size.bit_length() - 1 for size in sizes)
    lines = []
    for power in range(min(counts, default=0), max(counts, default=-1) + 1):
        low, high = 2**power, 2 ** (power + 1) - 1
        bar = "#" * -(-BAR * counts[power] // max(counts.values()))
        lines.append(f"{low if low == high else f'{low}-{high}':>13}  {counts[power]:>7}  {bar}".rstrip())
    return lines


def _describe(group: Group) -> str:
    lines = [f"{printable(image.name)} ({printable(image.label)}, {image.split})" for image in group.images[:SHOWN]]
    more = len(group.images) - SHOWN
    return "\n    = ".join(lines) + (f"\n    and {more} more" if more > 0 else "")
