"""A data set that a function of one's own reads: used like the others, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_dmml.config.code import read_code, use_code
from ray_dmml.config.schema import Config, DataConfig
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError

OWN = """
import dataclasses
import numpy as np
import torch
from ray_dmml import FileImages, ImageSet
from ray_dmml.data.dataset import BadImageError

class Colours:
    '''Images that are no files: one colour each.'''
    def __init__(self, values, size): self.values, self.size = values, size
    def __len__(self): return len(self.values)
    def name(self, index): return f"colour {self.values[index]}"
    def read(self, index): return torch.full((3, self.size, self.size), self.values[index], dtype=torch.uint8)
    def subset(self, indices): return Colours([self.values[i] for i in indices], self.size)

def colours(config, root, num_classes=8):
    def images_of(first):
        values = list(range(20 * first, 20 * first + 3 * num_classes))
        labels = np.arange(len(values)) // 3
        return ImageSet(Colours(values, config.decode_size), labels, tuple(f"{first}-{n}" for n in range(num_classes)))
    assert root is None
    return images_of(0), images_of(5)

def files(config, root):
    def images_of(names):
        paths = [f"{name}/{n}.png" for name in names for n in range(5)]
        return ImageSet(FileImages(root, paths, config.decode_size), np.repeat(np.arange(len(names)), 5), names)
    return images_of(tuple(f"class{n:02d}" for n in range(12))), images_of(tuple(f"class{n}" for n in range(12, 16)))

def no_test(config, root):
    return colours(config, root)[0], None

def known(config, root):
    train, test = colours(config, root)
    return train, ImageSet(test.source, test.labels, train.class_names)

def one_set(config, root):
    return colours(config, root)[0]

def wrong_labels(config, root):
    train, test = colours(config, root)
    return train, ImageSet(test.source, test.labels + 1, test.class_names)

def wrong_size(config, root):
    train, test = colours(config, root)
    return ImageSet(Colours(train.source.values, 9), train.labels, train.class_names), test

def changed(config, root, **changes):
    '''The images with other classes, queries or names.'''
    train, test = colours(config, root)
    for name in {"name", "read"} & set(changes):
        value = changes.pop(name)
        setattr(train.source, name, (lambda index: 1 / 0) if value == "fails" else lambda index: value)
    changes = {key: np.array(value) if key in ("query", "gallery") else value for key, value in changes.items()}
    return dataclasses.replace(train, **changes), test

class SomeBad(Colours):
    def read(self, index):
        if self.values[index] == 0: raise BadImageError("no colour")
        return super().read(index) if self.values[index] != 5 else 1 / 0
    def subset(self, indices): return SomeBad([self.values[i] for i in indices], self.size)

def some_bad(config, root):
    train, test = colours(config, root)
    return dataclasses.replace(train, source=SomeBad(train.source.values, 12)), test

def empty(config, root):
    return ImageSet(Colours([], 12), np.zeros(0, np.int64), ()), None

def broken(config, root):
    return open("no such file")
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path) -> Iterator[None]:
    """The module own_data."""
    (tmp_path / "own_data.py").write_text(OWN)
    use_code(read_code([tmp_path / "own_data.py"]))
    yield
    use_code({})


def settings(name: str, **given: Any) -> DataConfig:
    return DataConfig(name=f"own_data:{name}", decode_size=12, **given)


def test_images_that_are_no_files() -> None:
    """Without data.root, with args; validation classes are held out of the training images."""
    splits = load_splits(settings("colours", args={"num_classes": 10}, validation_fraction=0.3))
    assert splits.train.num_classes == 7 and splits.test.num_classes == 10
    assert splits.validation is not None and splits.validation.num_classes == 3
    image = splits.test.source.read(4)
    assert torch.equal(image, torch.full((3, 12, 12), 104, dtype=torch.uint8))


def test_there_may_be_no_test_images() -> None:
    assert load_splits(settings("no_test")).test is None


def test_a_class_may_be_in_training_and_test() -> None:
    """With split_by: image only, because the figures are of known classes then."""
    splits = load_splits(settings("known", split_by="image", validation_fraction=0))
    assert splits.test is not None and splits.test.class_names == splits.train.class_names
    with pytest.raises(
        UserError, match=r"8 classes are both in training and in test, such as '0-0', .*split_by: image"
    ):
        load_splits(settings("known"))


def test_files_are_checked_and_cached(image_folder: Path, tmp_path: Path) -> None:
    """As those of any data set."""
    config = settings("files", root=image_folder, cache_dir=tmp_path / "cache")
    splits = load_splits(config)
    assert splits.test.class_names == ("class12", "class13", "class14", "class15")
    assert list((tmp_path / "cache").glob("*.images"))
    plain = load_splits(config.model_copy(update={"cache_gib": 0.0}))
    assert torch.equal(splits.train.source.read(7), plain.train.source.read(7))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"^data.name 'own_data:nothing': module own_data .* has no nothing"),
        ("one_set", r"must return the training images and the test images, .* and returns ImageSet"),
        ("wrong_labels", r"in the test images labels must be 0 to 7"),
        (
            "wrong_size",
            r"in the training images read\(\) must give uint8 \(3, 12, 12\), .* gives .*\(3, 9, 9\)",
        ),
        ("broken", r"^data.name: own_data:broken fails at .*own_data.py, line 71: FileNotFoundError"),
    ],
)
def test_mistakes_are_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_splits(settings(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": [1, 2, 3, 4, 5, 6, 7, 8]}, r"class_names must be different texts, and are \[1, 2"),
        ({"class_names": list("abcdefga")}, r"class_names must be different texts"),
        ({"query": [0, 24]}, r"query must be None or an int64 array of indices, 0 to 23"),
        ({"gallery": [0.5]}, r"gallery must be None or an int64 array of indices, 0 to 23"),
        ({"exclude": [0, 1]}, r"exclude must be None or an int64 array with one entry for each of the 24 images"),
        ({"categories": ["a"]}, r"categories must be None or a text for each of the 24 images"),
        ({"name": 3}, r"name\(\) must give a text, and gives a int"),
        ({"read": "fails"}, r"an image cannot be read at .*own_data.py, line 53: ZeroDivisionError: division by zero"),
    ],
)
def test_mistakes_in_a_set_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"own_data:changed must return .*; in the training images {message}"):
        load_splits(settings("changed", args=changes))


def test_an_empty_set_is_named() -> None:
    with pytest.raises(UserError, match=r"own_data:empty must return .*; in the training images there is none"):
        load_splits(settings("empty"))


def test_images_that_cannot_be_read_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the source raises, and also if it is the first one."""
    splits = load_splits(settings("some_bad", on_bad_image="skip", validation_fraction=0))
    assert splits.skipped == ("colour 0", "colour 5") and len(splits.train) == 22
    assert "image colour 5 cannot be read: " in caplog.text
    with pytest.raises(UserError, match=r"^no colour \(1 more are unreadable\)"):
        load_splits(settings("some_bad"))


def test_settings_that_do_not_fit() -> None:
    """A name that is neither known nor written as module:function, and args of a data set of the package."""
    with pytest.raises(UserError, match=r"data.name: Input should be 'characters', .* or your own as module:name"):
        Config.parse({"data": {"name": "cub"}})
    with pytest.raises(UserError, match=r"data.args are those of a data set of your own, not of 'characters'"):
        Config.parse({"data": {"args": {"size": 1}}})
