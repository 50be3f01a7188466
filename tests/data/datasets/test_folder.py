"""Folders of images, and what `load_splits` does with unreadable ones."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError


def save(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 5, 250 - colour)).save(path)


def names_of(images: ImageSet) -> list[str]:
    return [images.source.name(i) for i in range(len(images))]


def make_folder(root: Path, classes: int = 6, each: int = 3) -> None:
    for c in range(classes):
        for i in range(each):
            save(root / f"c{c}" / f"{i}.png", 10 * c + i)


def folder_config(root: Path, **changes: object) -> DataConfig:
    settings = {"name": "imagefolder", "root": root, "decode_size": 8, "validation_fraction": 0}
    return DataConfig.model_validate({**settings, **changes})


def test_imagefolder_splits_by_class_in_name_order(tmp_path):
    """The first half of the classes trains. Nested and upper-case files are used, hidden ones are not."""
    make_folder(tmp_path)
    save(tmp_path / "c0" / "deep" / "er" / "A.JPG")
    save(tmp_path / "c0" / ".hidden.png")
    save(tmp_path / "c0" / ".thumbs" / "x.png")
    save(tmp_path / ".cache" / "x.png")
    (tmp_path / "c0" / "notes.txt").write_text("no image")
    splits = load_splits(folder_config(tmp_path))
    assert splits.train.class_names == ("c0", "c1", "c2")
    assert splits.test.class_names == ("c3", "c4", "c5")
    assert names_of(splits.train)[:5] == [
        "c0/0.png", "c0/1.png", "c0/2.png", "c0/deep/er/A.JPG", "c1/0.png",
    ]  # fmt: skip
    assert splits.train.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert splits.validation is None and splits.skipped == ()


def test_imagefolder_split_can_be_drawn(tmp_path):
    """split_seed draws the training classes, and train_fraction is their share."""
    make_folder(tmp_path, classes=12, each=2)
    drawn = []
    for seed in (None, 1, 1, 2):
        config = folder_config(tmp_path, train_fraction=0.75, split_seed=seed)
        splits = load_splits(config)
        assert splits.train.num_classes == 9
        assert not set(splits.train.class_names) & set(splits.test.class_names)
        drawn.append(splits.test.class_names)
    assert drawn[0] == ("c7", "c8", "c9")  # the last in name order: c0, c1, c10, c11, c2, ...
    assert drawn[1] == drawn[2] and len(set(drawn)) == 3


def test_imagefolder_mistakes_are_named(tmp_path):
    """A missing root, too few classes, an empty class and a bad fraction have a message each."""
    with pytest.raises(UserError, match=r"nowhere is not an existing folder"):
        load_splits(folder_config(tmp_path / "nowhere"))
    make_folder(tmp_path, classes=3)
    with pytest.raises(UserError, match=r"3 class folders.*at least 4"):
        load_splits(folder_config(tmp_path))
    (tmp_path / "zebra").mkdir()
    with pytest.raises(UserError, match="zebra has no images"):
        load_splits(folder_config(tmp_path))
    save(tmp_path / "zebra" / "1.png")
    with pytest.raises(UserError, match=r"train_fraction 0.9 of 4 classes is 4 to train"):
        load_splits(folder_config(tmp_path, train_fraction=0.9))


def test_unreadable_images_fail_or_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`fail` names the first; `skip` leaves all out with a warning, and other loaders take the names."""
    make_folder(tmp_path)
    for name in ("c1/1.png", "c4/0.png"):
        (tmp_path / name).write_text("broken")
    with pytest.raises(UserError, match=r"image c1/1\.png cannot .*1 more.*on_bad_image=skip"):
        load_splits(folder_config(tmp_path))
    first = load_splits(folder_config(tmp_path, on_bad_image="skip"))
    assert first.skipped == ("c1/1.png", "c4/0.png")
    (message,) = caplog.messages
    assert "left out 2" in message and "c1/1.png" in message
    assert len(first.train) == 8 and len(first.test) == 8
    second = load_splits(folder_config(tmp_path), skip=frozenset(first.skipped), check=False)
    assert second.skipped == first.skipped
    assert names_of(second.train) == names_of(first.train)
    assert np.array_equal(second.test.labels, first.test.labels)
    unchecked = load_splits(folder_config(tmp_path, check_images=False))
    assert len(unchecked.train) == 9


def folder_of(root: Path, each: int = 2) -> DataConfig:
    """4 classes."""
    make_folder(root, 4, each)
    return folder_config(root)


def all_names(config: DataConfig) -> list[str]:
    splits = load_splits(config)
    return names_of(splits.train) + names_of(splits.test)


@contextmanager
def as_another_user() -> Iterator[None]:
    """Runs the block without the rights of root, who may read everything."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A folder that other users may read, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_an_unreadable_file_is_refused_or_skipped(open_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its permissions forbid reading."""
    config = folder_of(open_root, each=3).model_copy(update={"cache_gib": 0.0})
    (open_root / "c0" / "0.png").chmod(0)
    FileImages(open_root, ["c1/0.png"], 8).read(0)  # imports what the other user may not read
    with as_another_user():
        with pytest.raises(UserError, match=r"c0/0\.png cannot be read: Permission denied"):
            load_splits(config)
        splits = load_splits(config.model_copy(update={"on_bad_image": "skip"}))
    assert splits.skipped == ("c0/0.png",)
    (message,) = caplog.messages
    assert "left out 1" in message and "c0/0.png" in message


def test_an_unreadable_folder_is_refused(open_root: Path) -> None:
    """Its images would otherwise be missing without a word."""
    config = folder_of(open_root)
    (open_root / "c0" / "deep").mkdir(mode=0)
    with (
        as_another_user(),
        pytest.raises(UserError, match=r"c0/deep cannot be read: Permission denied"),
    ):
        load_splits(config)


def test_a_pipe_among_the_images_is_refused(tmp_path: Path) -> None:
    """Reading it would never end."""
    config = folder_of(tmp_path)
    os.mkfifo(tmp_path / "c0" / "pipe.png")
    with pytest.raises(UserError, match=r"c0/pipe\.png cannot be read: it is not a regular file"):
        load_splits(config)


ODD_NAMES = [
    "two words.png", "it's.png", 'a "quote".png', "comma, semicolon;.png", "naïve 画像 é.png",
    "#hash%20&?.png", "-dash.png", "[bold]x.png", "new\nline.png",
]  # fmt: skip


def test_odd_names_in_a_folder_are_used(tmp_path: Path) -> None:
    """Names of files and classes may have spaces, quotes, non-ASCII characters and even line ends."""
    config = folder_of(tmp_path)
    (tmp_path / "c0").rename(tmp_path / "ça, 'c' \"0\"")
    for name in ODD_NAMES:
        save(tmp_path / "c1" / name)
    names = all_names(config)
    assert {f"c1/{name}" for name in ODD_NAMES} < set(names)
    assert len(names) == 8 + len(ODD_NAMES)


def test_a_bad_name_cannot_garble_a_message(tmp_path: Path) -> None:
    """Bytes that are not text, and control characters, are escaped. The image can be skipped."""
    config = folder_of(tmp_path, each=3)
    bad = os.fsencode(tmp_path) + b"/c0/\xff\x1b[2J\n.png"
    with open(bad, "wb") as file:
        file.write(b"broken")
    with pytest.raises(UserError) as caught:
        load_splits(config)
    assert r"c0/\udcff\x1b[2J\n.png cannot be read" in str(caught.value)
    str(caught.value).encode()
    splits = load_splits(config.model_copy(update={"on_bad_image": "skip"}))
    assert len(splits.skipped) == 1 and len(splits.train) == 6


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    """A link of a file is unreadable; one within a class is not followed; one of a class is no class."""
    config = folder_of(tmp_path)
    (tmp_path / "c9").symlink_to("c9")
    (tmp_path / "c0" / "up").symlink_to("..")
    assert len(all_names(config)) == 8
    (tmp_path / "c0" / "self.png").symlink_to("self.png")
    with pytest.raises(UserError, match=r"c0/self\.png cannot be read: Too many levels"):
        load_splits(config)


@pytest.mark.parametrize("target", [".", ".."])
def test_a_class_that_links_to_all_classes_is_refused(tmp_path: Path, target: str) -> None:
    """Its images would be images of the other classes under another label."""
    config = folder_of(tmp_path / "root")
    (tmp_path / "root" / "c4").symlink_to(target)
    with pytest.raises(UserError, match=r"c4 is a link to .* which holds the other classes too"):
        load_splits(config)


def test_links_to_files_and_classes_elsewhere_are_used(tmp_path: Path) -> None:
    """The owner of the folder put them there."""
    config = folder_of(tmp_path / "root")
    save(tmp_path / "far.png")
    (tmp_path / "root" / "c0" / "far.png").symlink_to(tmp_path / "far.png")
    (tmp_path / "root" / "c1").rename(tmp_path / "class")
    (tmp_path / "root" / "c1").symlink_to(tmp_path / "class")
    assert len(all_names(config)) == 9
