"""The four usual benchmarks with their official class-disjoint splits.

CUB-200-2011 (https://www.vision.caltech.edu/datasets/cub_200_2011/), Cars-196 (Krause et al.,
3dRR 2013), Stanford Online Products (https://cvgl.stanford.edu/projects/lifted_struct/) and In-Shop
Clothes Retrieval (https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html). The train and test lists
of CUB and Cars split every class, for classification. Retrieval trains on the first half of the
classes and tests on the second half.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.data.decoding import Resize
from ray_dmml.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A file to download."""

    url: str

    md5: str
    """Its checksum, in hexadecimal."""

    filename: str
    """Its name. An intact file of this name in the folder is used instead of a download."""


CUB_ARCHIVE = Archive(
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
    "97eceeb196236b17998738112f37df78",
    "CUB_200_2011.tgz",
)


@dataclass(frozen=True)
class Benchmark:
    """The layout of a benchmark on the disk, and its size."""

    title: str

    folders: tuple[str, ...]
    """Names that its folder may have."""

    marks: tuple[str, ...]
    """Files one of which is in its folder."""

    by_hand: str
    """How to get it and where to put its files."""

    counts: tuple[int, int, int, int]
    """Training images and classes, test images and classes."""


BENCHMARKS = {
    "cub200": Benchmark(
        "CUB-200-2011",
        ("CUB_200_2011",),
        ("images.txt",),
        f"unpack CUB_200_2011.tgz from {CUB_ARCHIVE.url} so that there is "
        "CUB_200_2011/images.txt, image_class_labels.txt, classes.txt and images/",
        (5864, 100, 5924, 100),
    ),
    "cars196": Benchmark(
        "Cars-196",
        ("cars196", "CARS196", "stanford_cars"),
        ("cars_annos.mat", "devkit/cars_train_annos.mat"),
        "Stanford's links no longer work, so it is not downloaded; put there cars_annos.mat and "
        "car_ims/ of a copy (or, laid out as torchvision's StanfordCars, devkit/, cars_train/, "
        "cars_test/ and cars_test_annos_withlabels.mat; see "
        "https://github.com/pytorch/vision/issues/7545)",
        (8054, 98, 8131, 98),
    ),
    "sop": Benchmark(
        "Stanford Online Products",
        ("Stanford_Online_Products",),
        ("Ebay_train.txt",),
        "unpack Stanford_Online_Products.zip (its page: "
        "https://cvgl.stanford.edu/projects/lifted_struct/) so that there is "
        "Stanford_Online_Products/Ebay_train.txt, Ebay_test.txt and the folders of images",
        (59551, 11318, 60502, 11316),
    ),
    "inshop": Benchmark(
        "In-Shop Clothes Retrieval",
        ("In-shop Clothes Retrieval Benchmark", "inshop", "InShop"),
        ("list_eval_partition.txt", "Eval/list_eval_partition.txt"),
        "its owners give it to those who agree to their terms "
        "(https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html); put there "
        "list_eval_partition.txt (or Eval/list_eval_partition.txt) and the folder img/ of img.zip",
        (25882, 3997, 26830, 3985),
    ),
}

Rows = list[tuple[str, int]]
"""(path of an image relative to the data set's folder, its class) of each image."""


def load(
    name: str,
    root: Path,
    download: bool,
    decode_size: int,
    resize: Resize,
    cub_archive: Archive = CUB_ARCHIVE,
) -> tuple[ImageSet, ImageSet]:
    """Train and test images of ``cub200``, ``cars196``, ``sop`` or ``inshop``.

    Args:
        name: the benchmark.
        root: its own folder, or the folder around that.
        download: download ``cub200`` into ``root`` if it is missing.
        decode_size: side of the decoded squares, in pixels.
        resize: how images become square.
        cub_archive: the download of ``cub200``.

    Raises:
        UserError: it is missing (with where to get it and where to put its files) or malformed.
    """
    benchmark = BENCHMARKS[name]
    folder = _find(benchmark, root)
    if folder is None and name == "cub200" and download:
        logger.info("downloading %s from %s to %s", benchmark.title, cub_archive.url, root)
        fetch(cub_archive, root, benchmark.folders[0], benchmark.by_hand)
        folder = _find(benchmark, root)
    if folder is None:
        raise UserError(f"{benchmark.title} is not in data.root {root}: {benchmark.by_hand}")
    read = {"cub200": _cub200, "cars196": _cars196, "sop": _sop, "inshop": _inshop}[name]
    try:
        train, test = read(folder, decode_size, resize)
    except FileNotFoundError as error:
        raise UserError(
            f"{benchmark.title} in {folder} is incomplete, {error.filename} is missing: {benchmark.by_hand}"
        ) from None
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"the lists of {benchmark.title} in {folder} are not in the official format ({error}): {benchmark.by_hand}"
        ) from error
    counts = (len(train), train.num_classes, len(test), test.num_classes)
    if counts != benchmark.counts:
        logger.warning(
            "%s in %s has %s; the official numbers are %s, so results do not compare with published ones",
            benchmark.title, folder, _in_words(counts), _in_words(benchmark.counts),
        )  # fmt: skip
    return train, test


def fetch(archive: Archive, root: Path, folder: str, by_hand: str) -> None:
    """Downloads an archive and unpacks its ``folder`` into ``root``, completely or not at all.

    Raises:
        UserError: it cannot be downloaded or is broken; with the URL and how to get it by hand.
    """
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive

    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch:
            source = root / archive.filename
            if not check_integrity(str(source), archive.md5):
                source = Path(scratch) / archive.filename
                download_url(archive.url, scratch, archive.filename, archive.md5)
            unpacked = Path(scratch) / "unpacked"
            extract_archive(str(source), str(unpacked))
            if not (root / folder).exists():  # another process may have been faster
                os.replace(unpacked / folder, root / folder)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{archive.url} could not be downloaded to {root} ({error}); by hand: {by_hand}") from error


def _find(benchmark: Benchmark, root: Path) -> Path | None:
    for folder in (root, *(root / name for name in benchmark.folders)):
        if any((folder / mark).is_file() for mark in benchmark.marks):
            return folder
    return None


def _in_words(counts: tuple[int, int, int, int]) -> str:
    return "{} train images of {} classes and {} test images of {}".format(*counts)


def _cub200(folder: Path, decode_size: int, resize: Resize) -> tuple[ImageSet, ImageSet]:
    classes = {image: int(label) for image, label in _lines(folder / "image_class_labels.txt", 2)}
    names = {int(label): name for label, name in _lines(folder / "classes.txt", 2)}
    rows = [(f"images/{path}", classes[image]) for image, path in _lines(folder / "images.txt", 2)]
    return _by_class(rows, 100, names, folder, decode_size, resize)


def _cars196(folder: Path, decode_size: int, resize: Resize) -> tuple[ImageSet, ImageSet]:
    rows: Rows = []
    if (folder / "cars_annos.mat").is_file():
        annotations, names = _mat(folder / "cars_annos.mat", "annotations", "class_names")
        rows += [(str(a["relative_im_path"]), int(a["class"])) for a in annotations]
    else:
        (names,) = _mat(folder / "devkit" / "cars_meta.mat", "class_names")
        for images, file in (
            ("cars_train", folder / "devkit" / "cars_train_annos.mat"),
            ("cars_test", folder / "cars_test_annos_withlabels.mat"),
        ):
            (annotations,) = _mat(file, "annotations")
            rows += [(f"{images}/{a['fname']}", int(a["class"])) for a in annotations]
    named = {label: str(name) for label, name in enumerate(names, start=1)}
    return _by_class(rows, 98, named, folder, decode_size, resize)


def _sop(folder: Path, decode_size: int, resize: Resize) -> tuple[ImageSet, ImageSet]:
    train, test = (
        _image_set(
            [(path, int(label)) for _, label, _, path in _lines(folder / file, 4)[1:]],
            {},
            folder,
            decode_size,
            resize,
        )
        for file in ("Ebay_train.txt", "Ebay_test.txt")
    )
    return train, test


def _inshop(folder: Path, decode_size: int, resize: Resize) -> tuple[ImageSet, ImageSet]:
    partition = folder / "list_eval_partition.txt"
    if not partition.is_file():
        partition = folder / "Eval" / "list_eval_partition.txt"
    inside = "Img/" if (folder / "Img" / "img").is_dir() else ""
    lines = [line.split() for line in partition.read_text(encoding="utf-8").splitlines()[2:]]
    items: dict[str, Rows] = {"train": [], "query": [], "gallery": []}
    for path, item, status in lines:
        items[status].append((inside + path, int(item.removeprefix("id_"))))
    names = {int(item.removeprefix("id_")): item for _, item, _ in lines}
    test = _image_set(items["query"] + items["gallery"], names, folder, decode_size, resize)
    query, gallery = np.split(np.arange(len(test)), [len(items["query"])])
    return (
        _image_set(items["train"], names, folder, decode_size, resize),
        ImageSet(test.source, test.labels, test.class_names, query, gallery),
    )


def _by_class(
    rows: Rows,
    last_train: int,
    names: dict[int, str],
    folder: Path,
    decode_size: int,
    resize: Resize,
) -> tuple[ImageSet, ImageSet]:
    """Splits by class: those up to ``last_train`` train, the others test."""
    train = [row for row in rows if row[1] <= last_train]
    test = [row for row in rows if row[1] > last_train]
    return (
        _image_set(train, names, folder, decode_size, resize),
        _image_set(test, names, folder, decode_size, resize),
    )


def _image_set(rows: Rows, names: dict[int, str], folder: Path, decode_size: int, resize: Resize) -> ImageSet:
    classes, labels = np.unique([label for _, label in rows], return_inverse=True)
    return ImageSet(
        FileImages(folder, [path for path, _ in rows], decode_size, resize),
        labels.astype(np.int64),
        tuple(names.get(label, str(label)) for label in classes.tolist()),
    )


def _lines(path: Path, columns: int) -> list[list[str]]:
    lines = [line.split(maxsplit=columns - 1) for line in path.read_text("utf-8").splitlines()]
    if any(len(line) != columns for line in lines):
        raise ValueError(f"{path.name} has a line without {columns} columns")
    return lines


def _mat(path: Path, *names: str) -> list[np.ndarray]:
    from scipy.io import loadmat  # heavy, and only this data set needs it

    content = loadmat(str(path), squeeze_me=True)
    return [np.atleast_1d(content[name]) for name in names]
