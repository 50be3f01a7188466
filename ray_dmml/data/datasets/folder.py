"""A folder with one folder of images a class, split by class, or each class by image, into train and test."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import FileImages, ImageSet, part_of_each_class
from ray_dmml.data.datasets.class_folders import find_images
from ray_dmml.data.findings import Findings
from ray_dmml.errors import UserError
from ray_dmml.randomness import derive_seed


def load(config: DataConfig, root: Path, findings: Findings) -> tuple[ImageSet, ImageSet | None]:
    """Train and test images of ROOT/CLASS/**/IMAGE, see :func:`~ray_dmml.data.datasets.class_folders.find_images`.

    The first ``round(train_fraction * C)`` classes in name order train, or as many drawn by ``split_seed``. The others
    are the test classes; with ``train_fraction`` 1 there are none. With ``split_by: image``, the same holds for the
    images of each class, see :func:`~ray_dmml.data.dataset.part_of_each_class`.

    Raises:
        UserError: there are too few classes, or one has no images or cannot be read.
    """
    paths = find_images(root, findings)
    classes = list(paths)
    if config.train_fraction < 1 and config.split_by == "class":
        _require_both_splits(root, len(classes), config.train_fraction, findings)
    elif len(classes) < 2:
        findings.fault(
            f"{root} has {len(classes)} class folders; data.name 'imagefolder' needs at least 2 (ROOT/CLASS/image.jpg)"
        )
    if not classes:
        raise UserError(f"{root} has no images that can be used")
    labels = np.repeat(np.arange(len(classes)), list(map(len, paths.values())))
    files = FileImages(root, list(chain.from_iterable(paths.values())), config.decode_size, config.resize)
    images = ImageSet(files, labels, tuple(classes))
    if config.train_fraction == 1:
        return images, None
    is_test = _test_images(labels, config)
    if not is_test.any():
        findings.fault(
            f"data.split_by: image needs 4 images of a class, 2 to train and 2 to test, and no class of {root} has them"
        )
    return images.subset(np.flatnonzero(~is_test)), images.subset(np.flatnonzero(is_test))


def _test_images(labels: np.ndarray, config: DataConfig) -> np.ndarray:
    """Marks the test images: (N,) bool."""
    generator = None
    if config.split_seed is not None:
        generator = np.random.Generator(np.random.PCG64(derive_seed("split", config.split_seed)))
    if config.split_by == "image":
        return part_of_each_class(labels, 1 - config.train_fraction, generator)
    num_classes = int(labels.max()) + 1
    order = np.arange(num_classes) if generator is None else generator.permutation(num_classes)
    return np.isin(labels, order[round(config.train_fraction * num_classes) :])


def _require_both_splits(root: Path, num_classes: int, train_fraction: float, findings: Findings) -> None:
    """It is a fault if there are not 2 classes to train and 2 to test."""
    num_train = round(train_fraction * num_classes)
    advice = "set data.train_fraction=1 to train on all classes without a test"
    if num_classes < 4:
        findings.fault(
            f"{root} has {num_classes} class folders; data.name 'imagefolder' needs at least 4 "
            f"(ROOT/CLASS/image.jpg): 2 to train and 2 to test; {advice}"
        )
    elif not 2 <= num_train <= num_classes - 2:
        findings.fault(
            f"data.train_fraction {train_fraction} of {num_classes} classes is {num_train} to "
            f"train; at least 2 must train and 2 be left to test; {advice}"
        )
