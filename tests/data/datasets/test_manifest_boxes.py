"""Columns of open-metric-learning's manifests beyond paths and labels: boxes are used, others are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.cache import CachedImages
from ray_dmml.data.dataset import ImageSet, check_images
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.findings import Findings
from ray_dmml.errors import UserError

HEAD = "path,label,split,x_1,x_2,y_1,y_2\n"
COLOURS = ("red", "lime", "blue", "white")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """0.png to 3.png: each 40 x 20 with four colours side by side, ten columns each."""
    (tmp_path / "photos").mkdir()
    for number in range(4):
        image = Image.new("RGB", (40, 20))
        for place, colour in enumerate(COLOURS):
            image.paste(colour, (10 * place, 0, 10 * place + 10, 20))
        image.putpixel((0, 0), (number, number, number))
        image.save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def settings(root: Path, rows: str, head: str = HEAD, **changes: object) -> DataConfig:
    manifest = root.parent / "m.csv"
    manifest.write_text(head + rows, encoding="utf-8")
    values = {"name": "manifest", "root": root, "manifest": manifest, "decode_size": 8, "validation_fraction": 0}
    return DataConfig.model_validate({**values, **changes})


def boxes(split: str, photo: int, labels: str = "abcd") -> str:
    """Four rows of one photo, each with another colour's box."""
    return "".join(
        f"{photo}.png,{label},{split},{10 * place},{10 * place + 10},0,20\n" for place, label in enumerate(labels)
    )


GOOD = boxes("train", 0) + boxes("train", 1) + boxes("validation", 2, "efgh") + boxes("validation", 3, "efgh")


def colours(images: ImageSet) -> list[list[int]]:
    """The colour in the middle of each image."""
    return [images.source.read(index)[:, 4, 4].tolist() for index in range(len(images))]


def test_a_box_is_cut_out(root: Path) -> None:
    """Several objects of one photo are images of their own, of several classes."""
    splits = load_splits(settings(root, GOOD))
    wanted = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert colours(splits.train) == wanted * 2 and colours(splits.test) == wanted * 2
    assert splits.train.labels.tolist() == [0, 1, 2, 3] * 2
    assert splits.train.source.read(1).float().std(dim=(1, 2)).max() == 0  # nothing of its neighbours
    names = [splits.train.source.name(index) for index in range(8)]
    assert len(set(names)) == 8 and names[1] == "0.png (x 10 to 20, y 0 to 20)"


def test_cached_boxes_are_the_decoded_ones(root: Path, tmp_path: Path) -> None:
    """A box of a photo has a place of its own in the cache, also in a later run with other boxes."""
    cache = {"cache_dir": tmp_path / "cache"}
    first = load_splits(settings(root, GOOD, **cache))
    assert isinstance(first.train.source, CachedImages)
    plain = load_splits(settings(root, GOOD, cache_gib=0))
    for _ in range(2):
        again = load_splits(settings(root, GOOD, **cache))
        for index in range(8):
            assert torch.equal(again.train.source.read(index), plain.train.source.read(index))
    shifted = GOOD.replace(",0,10,0,20", ",0,10,0,10").replace("0.png,b,train,10,20", "0.png,b,train,21,29")
    moved = load_splits(settings(root, shifted, **cache))
    assert colours(moved.train)[:3] == [[255, 0, 0], [0, 0, 255], [0, 0, 255]]
    assert colours(load_splits(settings(root, GOOD, **cache)).train)[1] == [0, 255, 0]


def test_other_boxes_are_another_data_set(root: Path) -> None:
    """Their digest differs, so that a run is not resumed with them."""
    digests = [
        load_splits(settings(root, GOOD.replace("10,20,0,20", more))).digests() for more in ("10,20,0,20", "10,20,0,19")
    ]
    assert digests[0]["training"] != digests[1]["training"]


def test_rows_without_a_box_are_whole_images(root: Path) -> None:
    """pandas writes numbers as 10.0 in a column with gaps. Fractions are rounded outward."""
    rows = GOOD + "0.png,a,train,,,,\n1.png,a,train,10.2,19.9,0.0,9.5\n"
    train = load_splits(settings(root, rows)).train
    assert train.source.name(8) == "0.png"
    assert train.source.name(9) == "1.png (x 10 to 20, y 0 to 10)"


def test_a_box_beyond_the_image_is_cut_to_it(root: Path) -> None:
    """Detectors write such boxes. A box that is outside altogether is an unreadable image."""
    rows = GOOD + "0.png,d,train,29.5,47,-3,99\n"
    assert colours(load_splits(settings(root, rows)).train)[-1] == [255, 255, 255]
    with pytest.raises(
        UserError, match=r"0\.png \(x 50 to 60, y 0 to 20\) cannot be read: the box is outside of its 40 x 20"
    ):
        load_splits(settings(root, GOOD + "0.png,d,train,50,60,0,20\n"))


def test_a_box_is_of_the_upright_image(root: Path) -> None:
    """As a viewer shows it, in which boxes are drawn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(root / "0.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(root / "0.png", exif=exif)
    assert colours(load_splits(settings(root, GOOD)).train)[:2] == [[255, 0, 0], [0, 255, 0]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0.png,a,train,10,,0,20", "line 18: x_1 '10', x_2 '', y_1 '0', y_2 '20' is not a box"),
        ("0.png,a,train,20,10,0,20", "line 18: x_1 '20', x_2 '10'.* x_1 < x_2"),
        ("0.png,a,train,10,10,0,20", "line 18: .* is not a box"),
        ("0.png,a,train,one,20,0,20", "line 18: x_1 'one'"),
        ("0.png,a,train,nan,nan,nan,nan", "line 18: .* is not a box"),
        ("0.png,a,train,0,1e999,0,20", "line 18: .* is not a box"),
        ("0.png,a,train,0,10,0,20", "line 18: 0.png is listed a second time"),
        ("0.png,a,train,0,9,0,20,7", "line 18: there are more cells than columns"),
    ],
)
def test_mistakes_in_boxes_are_named(root: Path, row: str, message: str) -> None:
    """With their line."""
    with pytest.raises(UserError, match=message):
        load_splits(settings(root, GOOD + row + "\n"))


def test_a_missing_column_of_the_box_is_named(root: Path) -> None:
    """All four or none."""
    with pytest.raises(UserError, match="has no column 'y_2'"):
        load_splits(settings(root, GOOD, HEAD.replace("y_2", "height")))


def test_columns_that_are_not_used_are_named_once(root: Path) -> None:
    """Others of open-metric-learning, and those of the user."""
    head = "path,label,split, category ,sequence,x_1,x_2,y_1,y_2,colour\n"
    rows = GOOD.replace("train,", "train,cars,1,").replace("validation,", "validation,cars,,")
    findings = Findings()
    load_splits(settings(root, rows.replace("\n", ",red\n"), head), findings=findings)
    (note,) = findings.notes
    assert note.endswith("m.csv that are not used: colour")
    findings = Findings()
    load_splits(settings(root, rows.replace("\n", ",\n"), head, exclude_same="colour"), findings=findings)
    (note,) = findings.notes
    assert note.endswith("m.csv that are not used: sequence")
    findings = Findings()
    load_splits(settings(root, GOOD), findings=findings)
    assert findings.notes == []


def test_an_unreadable_box_can_be_skipped(root: Path) -> None:
    """The other boxes of its photo are used."""
    config = settings(root, GOOD + "0.png,d,train,50,60,0,20\n", on_bad_image="skip")
    splits = load_splits(config)
    assert splits.skipped == ("0.png (x 50 to 60, y 0 to 20)",) and len(splits.train) == 8
    assert check_images(splits.train, 2) == [] and np.bincount(splits.train.labels).tolist() == [2] * 4
