"""Data sets and their class-disjoint splits, by the name in the config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ray_dmml.config.schema import DataConfig
from ray_dmml.cores import num_cores
from ray_dmml.data.cache import through_cache
from ray_dmml.data.dataset import ImageSet, Splits, check_images, hold_out_classes
from ray_dmml.data.datasets import benchmarks, characters, folder, manifest
from ray_dmml.data.staging import fetch
from ray_dmml.errors import UserError

Log = Callable[[str], None]


def load_splits(
    config: DataConfig,
    log: Log | None = None,
    skip: frozenset[str] = frozenset(),
    check: bool = True,
) -> Splits:
    """Train, validation and test images: the same, in the same order, in every process.

    Whoever loads first checks the images; it hands ``Splits.skipped`` on as the ``skip`` of the
    others, who need no check of their own and agree with it on every image's number.

    Args:
        config: which data set and where; ``check_images`` and ``on_bad_image`` as they say.
        log: takes one line for each thing worth knowing; None: what does not work as asked goes to
            Python's logging, the rest nowhere.
        skip: names of images to leave out.
        check: False: do not decode the images, whatever the config says.

    Raises:
        UserError: files are missing, unreadable or not laid out as the data set needs.
    """
    told = log or (lambda message: None)
    train, test = _read(config, told)
    if config.cache_gib and config.name != "characters":
        limit = int(config.cache_gib * 2**30)
        train, test = through_cache([train, test], config.cache_dir, limit, log)
    left_out: list[str] = []
    if skip:
        train, test = (_without(images, _named(images, skip), left_out) for images in (train, test))
    if check and config.check_images and config.name != "characters":
        train, test = _without_bad(config, told, train, test, left_out)
    _require_two_classes(train, "training")
    _require_two_classes(test, "test")
    if not test.can_be_judged():
        raise UserError(
            "no test image has another of its class to find: every query needs an image of its "
            "class in the gallery (is_query and is_gallery of a manifest)"
        )
    train, validation = hold_out_classes(
        train, config.validation_fraction, config.validation_seed, config.validation_fold
    )
    return Splits(train, validation, test, tuple(sorted(left_out)))


def _read(config: DataConfig, log: Log) -> tuple[ImageSet, ImageSet]:
    size, resize = config.decode_size, config.resize
    if config.name == "characters":
        return characters.load(size)
    root = fetch(config, log)
    if not root.is_dir() and not (config.name == "cub200" and config.download):
        raise UserError(f"data.root {root} is not an existing folder")
    if config.name == "imagefolder":
        return folder.load(root, config.train_fraction, config.split_seed, size, resize)
    if config.name == "manifest":
        return manifest.load(config.manifest or Path(), root, size, resize)
    return benchmarks.load(config.name, root, config.download, size, resize, log)


def _without_bad(
    config: DataConfig, log: Log, train: ImageSet, test: ImageSet, left_out: list[str]
) -> tuple[ImageSet, ImageSet]:
    log(f"checking {len(train) + len(test)} images")
    threads = num_cores()
    bad = [check_images(images, threads) for images in (train, test)]
    messages = [message for found in bad for _, message in found]
    if messages and config.on_bad_image == "fail":
        more = f" ({len(messages) - 1} more are unreadable)" if len(messages) > 1 else ""
        raise UserError(
            f"{messages[0]}{more}; set data.on_bad_image=skip to train without such images"
        )
    train, test = (
        _without(images, [index for index, _ in found], left_out)
        for images, found in zip((train, test), bad, strict=True)
    )
    if messages:
        shown = "; ".join(messages[:3]) + ("; ..." if len(messages) > 3 else "")
        log(f"left out {len(messages)} unreadable images: {shown}")
    return train, test


def _named(images: ImageSet, names: frozenset[str]) -> list[int]:
    return [index for index in range(len(images)) if images.source.name(index) in names]


def _without(images: ImageSet, indices: list[int], left_out: list[str]) -> ImageSet:
    if not indices:
        return images
    left_out += [images.source.name(index) for index in indices]
    return images.subset(np.setdiff1d(np.arange(len(images)), indices))


def _require_two_classes(images: ImageSet, what: str) -> None:
    if images.num_classes < 2:
        raise UserError(
            f"the {what} images are of {images.num_classes} classes; at least 2 are needed"
        )
