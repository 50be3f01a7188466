"""The four usual benchmarks with their official class-disjoint splits.

CUB-200-2011 (https://www.vision.caltech.edu/datasets/cub_200_2011/), Cars-196 (Krause et al., 3dRR 2013), Stanford
Online Products (https://cvgl.stanford.edu/projects/lifted_struct/) and In-Shop Clothes Retrieval
(https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html). The train and test lists of CUB and Cars split every class,
for classification. Retrieval trains on the first half of the classes and tests on the second half.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ray_dmml import interruption
from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.errors import UserError

logger = logging.getLogger(__name__)

Rows = list[tuple[str, int]]
"""(path of an image relative to the data set's folder, its class) of each image."""


class Lists(NamedTuple):
    """The images of a benchmark. ``num_queries``: the first test images are queries, the others the gallery."""

    train: Rows
    test: Rows
    class_names: dict[int, str]
    num_queries: int | None = None


def load(config: DataConfig, root: Path, cub_archive: Archive | None = None) -> tuple[ImageSet, ImageSet]:
    """Train and test images of ``cub200``, ``cars196``, ``sop`` or ``inshop``.

    ``root`` is its own folder, or the folder around that, to which ``cub_archive`` is downloaded.

    Raises:
        UserError: it is missing (with where to get it and where to put its files) or malformed.
    """
    benchmark, archive = BENCHMARKS[config.name], cub_archive or CUB_ARCHIVE
    folder = _find(benchmark, root)
    if folder is None and config.name == "cub200" and config.download:
        logger.info("downloading %s from %s to %s", benchmark.title, archive.url, root)
        _fetch(archive, root, benchmark)
        folder = _find(benchmark, root)
    if folder is None:
        raise UserError(f"{benchmark.title} is not in data.root {root}: {benchmark.by_hand}")
    try:
        lists = benchmark.read(folder)
        train, test = (_image_set(rows, lists.class_names, folder, config) for rows in (lists.train, lists.test))
    except FileNotFoundError as error:
        raise UserError(
            f"{benchmark.title} in {folder} is incomplete, {error.filename} is missing: {benchmark.by_hand}"
        ) from None
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"the lists of {benchmark.title} in {folder} are not in the official format ({error}): {benchmark.by_hand}"
        ) from error
    if lists.num_queries is not None:
        query, gallery = np.split(np.arange(len(test)), [lists.num_queries])
        test = replace(test, query=query, gallery=gallery)
    counts = (len(train), train.num_classes, len(test), test.num_classes)
    if counts != benchmark.counts:
        text = "{} train images of {} classes and {} test images of {}"
        logger.warning(
            f"{benchmark.title} in {folder} has {text.format(*counts)}; the official numbers are "
            f"{text.format(*benchmark.counts)}, so results do not compare with published ones"
        )
    return train, test


def _image_set(rows: Rows, names: dict[int, str], folder: Path, config: DataConfig) -> ImageSet:
    classes, labels = np.unique([label for _, label in rows], return_inverse=True)
    return ImageSet(
        FileImages(folder, [path for path, _ in rows], config.decode_size, config.resize),
        labels.astype(np.int64),
        tuple(names.get(label, str(label)) for label in classes.tolist()),
    )


def _cub200(folder: Path) -> Lists:
    classes = {image: int(label) for image, label in _lines(folder / "image_class_labels.txt", 2)}
    names = {int(label): name for label, name in _lines(folder / "classes.txt", 2)}
    return _by_class(
        [(f"images/{path}", classes[image]) for image, path in _lines(folder / "images.txt", 2)], 100, names
    )


def _cars196(folder: Path) -> Lists:
    if (folder / "cars_annos.mat").is_file():
        annotations, names = _mat(folder / "cars_annos.mat", "annotations", "class_names")
        rows = [(str(a["relative_im_path"]), int(a["class"])) for a in annotations]
    else:
        (names,) = _mat(folder / "devkit" / "cars_meta.mat", "class_names")
        rows = [
            (f"{images}/{a['fname']}", int(a["class"]))
            for images, file in (
                ("cars_train", "devkit/cars_train_annos.mat"),
                ("cars_test", "cars_test_annos_withlabels.mat"),
            )
            for a in _mat(folder / file, "annotations")[0]
        ]
    return _by_class(rows, 98, {label: str(name) for label, name in enumerate(names, start=1)})


def _sop(folder: Path) -> Lists:
    train, test = (
        [(path, int(label)) for _, label, _, path in _lines(folder / file, 4)[1:]]
        for file in ("Ebay_train.txt", "Ebay_test.txt")
    )
    return Lists(train, test, {})


def _inshop(folder: Path) -> Lists:
    partition = folder / "list_eval_partition.txt"
    if not partition.is_file():
        partition = folder / "Eval" / "list_eval_partition.txt"
    inside = "Img/" if (folder / "Img" / "img").is_dir() else ""
    items: dict[str, Rows] = {"train": [], "query": [], "gallery": []}
    names = {}
    for path, item, status in (line.split() for line in partition.read_text("utf-8").splitlines()[2:]):
        label = int(item.removeprefix("id_"))
        names[label] = item
        items[status].append((inside + path, label))
    return Lists(items["train"], items["query"] + items["gallery"], names, len(items["query"]))


def _by_class(rows: Rows, last_train: int, names: dict[int, str]) -> Lists:
    """Splits by class: those up to ``last_train`` train, the others test."""
    return Lists([row for row in rows if row[1] <= last_train], [row for row in rows if row[1] > last_train], names)


def _lines(path: Path, columns: int) -> list[list[str]]:
    lines = [line.split(maxsplit=columns - 1) for line in path.read_text("utf-8").splitlines()]
    if any(len(line) != columns for line in lines):
        raise ValueError(f"{path.name} has a line without {columns} columns")
    return lines


def _mat(path: Path, *names: str) -> list[np.ndarray]:
    from scipy.io import loadmat  # heavy, and only this data set needs it

    content = loadmat(str(path), squeeze_me=True)
    return [np.atleast_1d(content[name]) for name in names]


class Archive(NamedTuple):
    """A file to download. An intact file of this name in the folder is used instead."""

    url: str
    md5: str


CUB_ARCHIVE = Archive(
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78"
)


class Benchmark(NamedTuple):
    """The layout of a benchmark on the disk, and its size."""

    title: str
    read: Callable[[Path], Lists]
    folders: tuple[str, ...]  # names that its folder may have
    marks: tuple[str, ...]  # files one of which is in its folder
    by_hand: str  # how to get it and where to put its files
    counts: tuple[int, int, int, int]  # training images and classes, test images and classes


BENCHMARKS = {
    "cub200": Benchmark(
        "CUB-200-2011",
        _cub200,
        ("CUB_200_2011",),
        ("images.txt",),
        f"unpack CUB_200_2011.tgz from {CUB_ARCHIVE.url} so that there is "
        "CUB_200_2011/images.txt, image_class_labels.txt, classes.txt and images/",
        (5864, 100, 5924, 100),
    ),
    "cars196": Benchmark(
        "Cars-196",
        _cars196,
        ("cars196", "CARS196", "stanford_cars"),
        ("cars_annos.mat", "devkit/cars_train_annos.mat"),
        "Stanford's links no longer work, so it is not downloaded; put there cars_annos.mat and car_ims/ of a copy "
        "(or, laid out as torchvision's StanfordCars, devkit/, cars_train/, cars_test/ and "
        "cars_test_annos_withlabels.mat; see https://github.com/pytorch/vision/issues/7545)",
        (8054, 98, 8131, 98),
    ),
    "sop": Benchmark(
        "Stanford Online Products",
        _sop,
        ("Stanford_Online_Products",),
        ("Ebay_train.txt",),
        "unpack Stanford_Online_Products.zip (its page: https://cvgl.stanford.edu/projects/lifted_struct/) so that "
        "there is Stanford_Online_Products/Ebay_train.txt, Ebay_test.txt and the folders of images",
        (59551, 11318, 60502, 11316),
    ),
    "inshop": Benchmark(
        "In-Shop Clothes Retrieval",
        _inshop,
        ("In-shop Clothes Retrieval Benchmark", "inshop", "InShop"),
        ("list_eval_partition.txt", "Eval/list_eval_partition.txt"),
        "its owners give it to those who agree to their terms (https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html);"
        " put there list_eval_partition.txt (or Eval/list_eval_partition.txt) and the folder img/ of img.zip",
        (25882, 3997, 26830, 3985),
    ),
}


def _find(benchmark: Benchmark, root: Path) -> Path | None:
    for folder in (root, *(root / name for name in benchmark.folders)):
        if any((folder / mark).is_file() for mark in benchmark.marks):
            return folder
    return None


def _fetch(archive: Archive, root: Path, benchmark: Benchmark) -> None:
    """Downloads an archive and unpacks the benchmark's folder into ``root``, completely or not at all."""
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive

    folder = benchmark.folders[0]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch,
            interruption.at_end(lambda: shutil.rmtree(scratch, ignore_errors=True)),
        ):
            source = root / Path(archive.url).name
            if not check_integrity(str(source), archive.md5):
                download_url(archive.url, scratch, source.name, archive.md5)
                source = Path(scratch) / source.name
            unpacked = Path(scratch) / "unpacked"
            extract_archive(str(source), str(unpacked))
            if not (root / folder).exists():  # another process may have been faster
                os.replace(unpacked / folder, root / folder)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{archive.url} could not be downloaded to {root} ({error}); by hand: {benchmark.by_hand}"
        ) from error
