"""The script that renders the images of the ablation on objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from conftest import EXPERIMENTS
from PIL import Image

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.datasets import load_splits

FEW = "cf4ce3838ba9"
"""Start of the digest of 6 classes of 2 images, equal on all machines."""


def test_the_objects_are_the_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images have known pixels, and the loader reads their folder. Images of a class differ, and so do classes."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import make_objects

    digest = make_objects.write(tmp_path / "one", num_classes=6, images_per_class=2)
    assert digest.startswith(FEW), "other images than before: render the whole set and change make_objects.DIGEST, too"
    with pytest.raises(typer.BadParameter, match="already exists"):
        make_objects.main(tmp_path / "one")

    splits = load_splits(DataConfig(name="imagefolder", root=tmp_path / "one", validation_fraction=0, cache_gib=0))
    assert splits.train.class_names == ("object-000", "object-001", "object-002")
    assert splits.test is not None and len(splits.train) == len(splits.test) == 6

    def pixels(name: str) -> np.ndarray:
        with Image.open(tmp_path / "one" / name) as image:
            return np.asarray(image).astype(float)

    first, again, other = (pixels(name) for name in ("object-000/00.png", "object-000/01.png", "object-001/00.png"))
    assert first.shape == (64, 64, 3)
    assert np.abs(first - again).mean() > 5 and np.abs(first - other).mean() > 5


def test_a_ball_is_traced_where_the_camera_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outline and the points of a sphere are those that geometry gives."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    from objects import camera, shapes, things, vectors

    radius, distance = 0.5, 4.0
    white = ((1.0, 1.0, 1.0),) * 2
    ball = things.Part(
        shapes.ellipsoid, (0, 0, 0), vectors.rotation_of((1, 2, 3, 4)), (radius,) * 3, white, shapes.plain, 1.0
    )
    thing = things.Thing([ball], is_mirrored=False, softness=0.1)
    tangent = np.linspace(0, 0.2, 400, dtype=np.float32)
    ray = vectors.unit((tangent, 0 * tangent, 0 * tangent - 1))
    hit, point = camera.trace(thing, (0.0, 0.0, distance), ray)
    sine = tangent / np.sqrt(1 + tangent**2)
    expected = np.flatnonzero(sine * distance < radius)
    assert abs(len(hit) - len(expected)) <= 4 and set(expected[:-4]) <= set(hit.tolist())
    np.testing.assert_allclose(vectors.length(point), radius, atol=0.01)
