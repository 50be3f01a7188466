"""JPEG files to train on and to decode, so that no row needs a data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image


def photograph_like(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colour noise of several scales and a little grain, with about the entropy of a photo."""
    picture = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((3, 70), (9, 40), (30, 18), (90, 8)):
        noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        for channel in range(3):
            smooth = Image.fromarray(noise[:, :, channel]).resize((width, height), Image.Resampling.BICUBIC)
            picture[:, :, channel] += np.asarray(smooth)
    picture += 128 + rng.normal(0, 3, picture.shape).astype(np.float32)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def write_classes(root: Path, num_classes: int, images_per_class: int, width: int, height: int) -> None:
    """Writes ``root/class000/0.jpg`` and so on, quality 90."""
    rng = np.random.default_rng(0)
    for number in range(num_classes):
        folder = root / f"class{number:03d}"
        folder.mkdir(parents=True)
        for image in range(images_per_class):
            photograph_like(rng, width, height).save(folder / f"{image}.jpg", quality=90)


@contextmanager
def training_folder(given: Path | None) -> Iterator[Path]:
    """The given folder, or else a temporary one with 40 classes of 16 JPEGs, 128 px."""
    if given is not None:
        yield given
        return
    with TemporaryDirectory(prefix="benchmark-") as name:
        write_classes(Path(name), 40, 16, 128, 128)
        yield Path(name)
