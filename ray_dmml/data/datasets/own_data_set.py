"""A data set that a function of one's own reads: ``data.name: module:function``."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ray_dmml.config.loading import shorten
from ray_dmml.config.parts import call_part, describe, find_part, place_of
from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import BadImageError, ImageSet
from ray_dmml.data.decoding import printable
from ray_dmml.data.staging import fetch
from ray_dmml.errors import UserError


def load(config: DataConfig) -> tuple[ImageSet, ImageSet | None]:
    """Calls ``function(config, root, **data.args)``, which returns the training images and the test images (or None).

    ``root`` is the folder of ``data.root``, or of the copy of ``data.source``; None if neither is set.

    Raises:
        UserError: the function cannot be found or fails, or returns something else.
    """
    root = fetch(config) if config.root is not None or config.source is not None else None
    part = find_part("data.name", config.name)
    sets: Any = call_part("data.name", config.name, part, config.args, config, root)
    what = f"data.name: {config.name} must return the training images and the test images, each a ray_dmml.ImageSet"
    is_pair = isinstance(sets, tuple) and len(sets) == 2
    if not (is_pair and isinstance(sets[0], ImageSet) and isinstance(sets[1], (ImageSet, type(None)))):
        got = [type(each).__name__ for each in sets] if isinstance(sets, tuple) else type(sets).__name__
        raise UserError(f"{what}, and returns {got}")
    for images, split in zip(sets, ("training", "test"), strict=True):
        if images is None:
            continue
        try:
            problem = _problem(images, config.decode_size)
        except BadImageError:
            continue  # all images are checked later, and bad ones reported or skipped
        except Exception as error:  # own code, which may raise anything
            problem = f"an image cannot be read{place_of(error)}: {describe(error)}"
        if problem:
            raise UserError(f"{what}; in the {split} images {problem}")
    train, test = sets
    if test is not None and config.split_by == "class" and (both := set(train.class_names) & set(test.class_names)):
        raise UserError(
            f"data.name: {config.name}: {len(both)} classes are both in training and in test, such as "
            f"{shorten(printable(sorted(both)[0]))!r}, which needs data.split_by: image"
        )
    return train, test


def _problem(images: ImageSet, size: int) -> str | None:
    """What is wrong with a set, seen without reading all images."""
    labels: Any = images.labels
    names = list(images.class_names)
    if not len(images.source):
        return "there is none"
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        return f"class_names must be different texts, and are {shorten(repr(names))}"
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.shape != (len(images.source),):
        return f"labels must be an int64 array with one entry for each of the {len(images.source)} images"
    if not np.array_equal(np.unique(labels), np.arange(images.num_classes)):
        return f"labels must be 0 to {images.num_classes - 1}, the positions in class_names, each at least once"
    for which in ("query", "gallery"):
        indices: Any = getattr(images, which)
        if indices is not None and not _are_indices(indices, len(labels)):
            return f"{which} must be None or an int64 array of indices, 0 to {len(labels) - 1}"
    exclude, categories = images.exclude, images.categories
    if exclude is not None and not (_are_numbers(exclude) and exclude.shape == labels.shape):
        return f"exclude must be None or an int64 array with one entry for each of the {len(labels)} images"
    if categories is not None and not (
        len(categories) == len(labels) and all(isinstance(name, str) for name in categories)
    ):
        return f"categories must be None or a text for each of the {len(labels)} images"
    if not isinstance(name := images.source.name(0), str):
        return f"name() must give a text, and gives a {type(name).__name__}"
    image: Any = images.source.read(0)
    if not isinstance(image, Tensor) or str(image.dtype) != "torch.uint8" or image.shape != (3, size, size):
        got = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        return f"read() must give uint8 (3, {size}, {size}), of data.decode_size, and gives {got}"
    return None


def _are_indices(indices: Any, number: int) -> bool:
    return _are_numbers(indices) and bool(np.all((indices >= 0) & (indices < number)))


def _are_numbers(numbers: Any) -> bool:
    return isinstance(numbers, np.ndarray) and numbers.dtype == np.int64 and numbers.ndim == 1
