"""Data sets and their splits, by the name in the config."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from ray_dmml.config.schema import DATA_SETS, DataConfig
from ray_dmml.cores import num_cores
from ray_dmml.data.cache import through_cache
from ray_dmml.data.dataset import ImageSet, Splits, check_images, hold_out_classes, hold_out_images
from ray_dmml.data.datasets import benchmarks, characters, folder, manifest, own_data_set
from ray_dmml.data.findings import Findings
from ray_dmml.data.staging import fetch, local_root
from ray_dmml.errors import UserError

logger = logging.getLogger(__name__)


def load_splits(
    config: DataConfig, skip: frozenset[str] = frozenset(), check: bool = True, findings: Findings | None = None
) -> Splits:
    """Train, validation and test images: the same, in the same order, in every process.

    The process that loads first checks the images. It passes its ``Splits.skipped`` to the others as ``skip``; they
    need no check of their own, and an index means the same image to all.

    Args:
        config: the data set and where it is; ``check_images`` and ``on_bad_image`` apply.
        skip: names of images to leave out.
        check: False: do not decode the images, whatever the config says.
        findings: gets the notes of the data set, and its faults if it collects them. The splits are then those of what
            is right.

    Raises:
        UserError: files are missing or unreadable, or not laid out as the data set needs.
    """
    findings = findings or Findings()
    train, test = _read(config, findings)
    if train is None:
        findings.fault(f"manifest {config.manifest} has no rows of split 'train'")
        if test is None:
            raise UserError(f"manifest {config.manifest} has no rows that can be used")
        train = test.subset(())
    sets, skipped = _usable([train] if test is None else [train, test], config, skip, check)
    train, test = sets[0], sets[1] if len(sets) > 1 else None
    has_two_classes = _require_two_classes(train, "training", findings)
    if test is not None:
        _require_queries(test, findings)
    hold_out = hold_out_images if config.split_by == "image" else hold_out_classes
    validation: ImageSet | None = None
    try:
        if has_two_classes:
            train, validation = hold_out(
                train, config.validation_fraction, config.validation_seed, config.validation_fold
            )
    except UserError as error:
        findings.fault(str(error))
    return Splits(train, validation, test, tuple(sorted(skipped)))


def load_images(config: DataConfig, findings: Findings) -> ImageSet:
    """All images of an ``imagefolder``, or of a ``manifest`` (only those of split ``validation`` if there are any), to
    be evaluated. ``check_images`` and ``on_bad_image`` apply. ``findings`` gets the notes of what is not used.

    Raises:
        UserError: as :func:`load_splits`.
    """
    train, test = _read(config.model_copy(update={"train_fraction": 1.0}), findings)
    images = train if test is None else test
    if images is None:
        raise UserError(f"manifest {config.manifest} has no rows")
    [images], _ = _usable([images], config, frozenset(), check=True)
    _require_queries(images, findings)
    return images


def _usable(
    sets: Sequence[ImageSet], config: DataConfig, skip: frozenset[str], check: bool
) -> tuple[list[ImageSet], list[str]]:
    """The sets read through the cache, without the images that cannot be read, and the names of those."""
    is_built_in = config.name == "characters"
    if config.cache_gib and not is_built_in:
        sets = through_cache(sets, config.cache_dir, int(config.cache_gib * 2**30))
    skipped: list[str] = []
    sets = [_without(images, skip, skipped) for images in sets]
    if check and config.check_images and not is_built_in:
        bad = _unreadable(config, *sets)
        sets = [_without(images, bad, skipped) for images in sets]
    return sets, skipped


def _require_two_classes(images: ImageSet, split: str, findings: Findings) -> bool:
    if images.num_classes < 2:
        findings.fault(f"the {split} images are of {images.num_classes} classes; at least 2 are needed")
    return images.num_classes >= 2


def _require_queries(images: ImageSet, findings: Findings) -> None:
    """It is a fault if the test images cannot be evaluated."""
    if not _require_two_classes(images, "test", findings) or images.can_be_evaluated():
        return
    if replace(images, exclude=None).can_be_evaluated():
        findings.fault(
            "no test image has another of its class to find, because those of its class have the same value in the "
            "column that data.exclude_same names; set data.exclude_same=null to match them"
        )
    else:
        findings.fault(
            "no test image has another of its class to find: every query needs an image of its "
            "class in the gallery (is_query and is_gallery of a manifest)"
        )


def prepare(config: DataConfig) -> str:
    """Copies or downloads the images of a data set and reads its lists, as a first run would.

    An existing copy is compared with ``data.source``.

    Returns:
        A sentence with the number of images and classes, and where they are.

    Raises:
        UserError: as :func:`load_splits`.
    """
    fetch(config, again=True)
    counts = ", ".join(
        f"{len(images)} {split} images of {images.num_classes} classes"
        for split, images in load_splits(config, check=False).parts().items()
    )
    if config.root is None and config.source is None:
        return f"{counts}, {'built in' if config.name == 'characters' else f'by {config.name}'}"
    return f"{counts}, in {local_root(config)}"


def _read(config: DataConfig, findings: Findings) -> tuple[ImageSet | None, ImageSet | None]:
    """The training images and the test images; a manifest may lack either of them."""
    if config.name == "characters":
        return characters.load(config.decode_size)
    if config.name not in DATA_SETS:
        return own_data_set.load(config)
    root = fetch(config)
    if not os.path.isdir(root) and not (config.name == "cub200" and config.download):
        raise UserError(f"data.root {root} is not an existing folder")
    if config.name == "imagefolder":
        return folder.load(config, root, findings)
    if config.name == "manifest":
        return manifest.load(config, root, findings)
    return benchmarks.load(config, root)


def _unreadable(config: DataConfig, *sets: ImageSet) -> set[str]:
    """The names of images that cannot be read."""
    logger.debug("checking %s images", f"{sum(map(len, sets)):,}")
    bad = {images.source.name(i): message for images in sets for i, message in check_images(images, num_cores())}
    messages = list(bad.values())
    if messages and config.on_bad_image == "fail":
        more = f" ({len(messages) - 1} more are unreadable)" if len(messages) > 1 else ""
        raise UserError(f"{messages[0]}{more}; set data.on_bad_image=skip to leave out such images")
    if messages:
        shown = "; ".join(messages[:3]) + ("; ..." if len(messages) > 3 else "")
        logger.warning("left out %d unreadable images: %s", len(messages), shown)
    return set(bad)


def _without(images: ImageSet, names: Collection[str], skipped: list[str]) -> ImageSet:
    """The set without the images of these names. Those that it has are appended to ``skipped``."""
    if not names:
        return images
    bad = [index for index in range(len(images)) if images.source.name(index) in names]
    skipped += [images.source.name(index) for index in bad]
    return images.subset(np.delete(np.arange(len(images)), bad)) if bad else images
