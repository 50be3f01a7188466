"""Data sets and their class-disjoint splits, by the name in the config."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from ray_dmml.config.schema import DataConfig
from ray_dmml.cores import num_cores
from ray_dmml.data.cache import through_cache
from ray_dmml.data.dataset import ImageSet, Splits, check_images, hold_out_classes
from ray_dmml.data.datasets import benchmarks, characters, folder, manifest
from ray_dmml.data.staging import fetch, local_root
from ray_dmml.errors import UserError

logger = logging.getLogger(__name__)


def load_splits(config: DataConfig, skip: frozenset[str] = frozenset(), check: bool = True) -> Splits:
    """Train, validation and test images: the same, in the same order, in every process.

    The process that loads first checks the images. It passes its ``Splits.skipped`` to the others
    as ``skip``; they need no check of their own, and an index means the same image to all.

    Args:
        config: the data set and where it is; ``check_images`` and ``on_bad_image`` apply.
        skip: names of images to leave out.
        check: False: do not decode the images, whatever the config says.

    Raises:
        UserError: files are missing or unreadable, or not laid out as the data set needs.
    """
    train, test = _read(config)
    if config.cache_gib and config.name != "characters":
        limit = int(config.cache_gib * 2**30)
        train, test = through_cache([train, test], config.cache_dir, limit)
    skipped: list[str] = []
    if skip:
        train, test = (_without(images, _named(images, skip), skipped) for images in (train, test))
    if check and config.check_images and config.name != "characters":
        train, test = _without_unreadable(config, train, test, skipped)
    _require_two_classes(train, "training")
    _require_two_classes(test, "test")
    if not test.can_be_evaluated():
        raise UserError(
            "no test image has another of its class to find: every query needs an image of its "
            "class in the gallery (is_query and is_gallery of a manifest)"
        )
    train, validation = hold_out_classes(
        train, config.validation_fraction, config.validation_seed, config.validation_fold
    )
    return Splits(train, validation, test, tuple(sorted(skipped)))


def prepare(config: DataConfig) -> str:
    """Copies or downloads the images of a data set and reads its lists, as a first run would.

    An existing copy is compared with ``data.source``.

    Returns:
        A sentence with the number of images and classes, and where they are.

    Raises:
        UserError: as :func:`load_splits`.
    """
    fetch(config, again=True)
    splits = load_splits(config, check=False)
    parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    counts = ", ".join(
        f"{len(images)} {name} images of {images.num_classes} classes"
        for name, images in parts.items()
        if images is not None
    )
    return f"{counts}, {'built in' if config.name == 'characters' else f'in {local_root(config)}'}"


def _read(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    size, resize = config.decode_size, config.resize
    if config.name == "characters":
        return characters.load(size)
    root = fetch(config)
    if not root.is_dir() and not (config.name == "cub200" and config.download):
        raise UserError(f"data.root {root} is not an existing folder")
    if config.name == "imagefolder":
        return folder.load(root, config.train_fraction, config.split_seed, size, resize)
    if config.name == "manifest":
        return manifest.load(config.manifest or Path(), root, size, resize)
    return benchmarks.load(config.name, root, config.download, size, resize)


def _without_unreadable(
    config: DataConfig, train: ImageSet, test: ImageSet, skipped: list[str]
) -> tuple[ImageSet, ImageSet]:
    logger.debug("checking %s images", f"{len(train) + len(test):,}")
    threads = num_cores()
    unreadable = [check_images(images, threads) for images in (train, test)]
    messages = [message for part in unreadable for _, message in part]
    if messages and config.on_bad_image == "fail":
        more = f" ({len(messages) - 1} more are unreadable)" if len(messages) > 1 else ""
        raise UserError(f"{messages[0]}{more}; set data.on_bad_image=skip to train without such images")
    train, test = (
        _without(images, [index for index, _ in part], skipped)
        for images, part in zip((train, test), unreadable, strict=True)
    )
    if messages:
        shown = "; ".join(messages[:3]) + ("; ..." if len(messages) > 3 else "")
        logger.warning("left out %d unreadable images: %s", len(messages), shown)
    return train, test


def _named(images: ImageSet, names: frozenset[str]) -> list[int]:
    return [index for index in range(len(images)) if images.source.name(index) in names]


def _without(images: ImageSet, indices: list[int], skipped: list[str]) -> ImageSet:
    """The set without these images, whose names are appended to ``skipped``."""
    if not indices:
        return images
    skipped += [images.source.name(index) for index in indices]
    return images.subset(np.setdiff1d(np.arange(len(images)), indices))


def _require_two_classes(images: ImageSet, split: str) -> None:
    if images.num_classes < 2:
        raise UserError(f"the {split} images are of {images.num_classes} classes; at least 2 are needed")
