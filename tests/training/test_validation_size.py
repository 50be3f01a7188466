"""A run warns where its validation figures say little."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_dmml import Config
from ray_dmml.training.images import read_images


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 classes of 20 images of 4 x 4 pixels."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for number in range(25):
        (folder / f"class{number:02d}").mkdir()
        for image in range(20):
            pixels = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{number:02d}" / f"{image}.bmp")
    return folder


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (0.4, None),
        (0.36, "it is of 9 classes and 180 queries, and one query is 0.56 points"),
        (0.08, "it is of 2 classes and 40 queries, and one query is 2.5 points"),
        (0, None),
    ],
)
def test_few_classes_or_queries(
    root: Path, caplog: pytest.LogCaptureFixture, fraction: float, message: str | None
) -> None:
    """10 classes with 200 queries are enough, and without validation classes there is nothing to warn of."""
    data = {"name": "imagefolder", "root": root, "decode_size": 8, "train_fraction": 1, "check_images": False}
    config = Config.parse({"data": {**data, "validation_fraction": fraction, "classes_per_batch": 4}})
    with caplog.at_level(logging.WARNING):
        splits = read_images(config)
    assert (splits.validation.num_classes if splits.validation else 0) == round(25 * fraction)
    assert ("validation Recall@1 is coarse" in caplog.text) == (message is not None)
    assert message is None or message in caplog.text
