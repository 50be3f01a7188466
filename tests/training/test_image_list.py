"""A run knows its images: it resumes with the same ones only, wherever they are."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny

from ray_dmml import Config, UserError, train
from ray_dmml.data.dataset import FileImages, ImageSet, Splits
from ray_dmml.data.datasets import load_splits
from ray_dmml.training.image_list import ImageList, Row


def config_of(root: Path, steps: int = 1) -> Config:
    raw = tiny(root, train={"steps": steps, "evaluate_every": 0, "tensorboard": False})
    raw["evaluation"] |= {"untrained": False, "weights": "last"}
    return Config.parse(raw)


@pytest.fixture(scope="module")
def finished(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of one step and its images; not to be written into."""
    folder = tmp_path_factory.mktemp("remembers")
    root = shutil.copytree(image_folder, folder / "images")
    config = config_of(root)
    storage = config.checkpoint.model_copy(update={"storage_path": str(folder / "copy")})
    train(config.model_copy(update={"checkpoint": storage}), folder / "run", local=True)
    return folder / "run", root


def test_the_list_has_every_image(finished: tuple[Path, Path]) -> None:
    """Name, size, class and split of each, in a file that any tool reads."""
    run, root = finished
    with gzip.open(run / "images.csv.gz", "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} == {str(path.relative_to(root)) for path in root.glob("*/*.png")}
    for row in rows:
        assert int(row["bytes"]) == (root / row["name"]).stat().st_size
        assert row["label"] == row["name"].split("/")[0]
    splits = load_splits(config_of(root).data)
    assert splits.validation is not None and splits.test is not None
    for split, part in (("training", splits.train), ("validation", splits.validation), ("test", splits.test)):
        assert {row["label"] for row in rows if row["split"] == split} == set(part.class_names)
    assert (run.parent / "copy" / "images.csv.gz").read_bytes() == (run / "images.csv.gz").read_bytes()


@pytest.mark.parametrize("damage", ["header", "middle", "bomb", "other"])
def test_a_damaged_list_is_warned_of(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared with nothing then. There may be no list."""
    path = tmp_path / "images.csv.gz"
    assert ImageList.read(path) is None and not caplog.text
    ImageList([Row(f"{number}.png", str(number**3), "a", "test") for number in range(1000)]).write(path)
    content = bytearray(path.read_bytes())
    if damage == "bomb":
        monkeypatch.setattr("ray_dmml.training.image_list.MAX_BYTES", 1000)
    elif damage == "other":
        content = bytearray(gzip.compress(b"name,size\n", mtime=0))
    else:
        start = 0 if damage == "header" else len(content) // 2
        content[start : start + 9] = b"\xff" * 9
    path.write_bytes(content)
    assert ImageList.read(path) is None
    assert "images.csv.gz cannot be read, so the images are not compared with it: " in caplog.text


def lose_two(root: Path) -> None:
    (root / "class03" / "1.png").unlink()
    (root / "class12" / "0.png").unlink()


def add_one(root: Path) -> None:
    shutil.copy(root / "class01" / "0.png", root / "class01" / "00.png")


def enlarge_one(root: Path) -> None:
    with (root / "class02" / "4.png").open("ab") as file:
        file.write(b"more")


def move_one(root: Path) -> None:
    (root / "class00" / "0.png").rename(root / "class01" / "9.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_two, r"2 missing or unreadable \(class03/1\.png, class12/0\.png\)"),
        (add_one, r"1 new \(class01/00\.png\)"),
        (enlarge_one, r"1 of another size \(class02/4\.png\)"),
        (move_one, r"1 missing or unreadable \(class00/0\.png\), 1 new \(class01/9\.png\)"),
    ],
)
def test_a_run_does_not_go_on_with_other_images(
    finished: tuple[Path, Path], tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    """It says what has changed."""
    run, root = finished[0], shutil.copytree(finished[1], tmp_path / "changed")
    change(root)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"its images have changed: {message}"):
        train(config_of(root, steps=2), resume=run, local=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_with_images_that_have_moved(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """The same images in another folder, with other times."""
    run, root = shutil.copytree(finished[0], tmp_path / "run"), tmp_path / "moved"
    shutil.copytree(finished[1], root, copy_function=shutil.copyfile)
    assert train(config_of(root, steps=2), resume=run, local=True)["step"] == 2


def test_differences_are_named_by_kind() -> None:
    """Also another class, another split, and another order of the same images; three names of each kind are shown."""
    rows = [Row(f"{i}.png", "10", "a", "training") for i in range(5)]
    before = ImageList(rows)
    assert before.differences(ImageList(rows)) == ""
    assert before.differences(ImageList(rows[::-1])) == "they are in another order"
    assert before.differences(ImageList(rows[:1])).startswith("4 missing or unreadable (1.png, 2.png, 3.png, ...)")
    moved = [rows[0]._replace(label="b"), rows[1]._replace(split="test"), rows[2]._replace(role="query"), *rows[3:]]
    assert before.differences(ImageList(moved)) == (
        "1 of another class (0.png), 1 in another split (1.png), 1 with another is_query or is_gallery (2.png)"
    )


def test_queries_and_gallery_are_in_the_list() -> None:
    images = ImageSet(FileImages(Path(), ["a", "b", "c"], 1), np.zeros(3, np.int64), ("x",))
    assert [row.role for row in ImageList.of(Splits(images, None, images)).rows] == [""] * 6
    parted = dataclasses.replace(images, query=np.array([0, 1]), gallery=np.array([1, 2]))
    rows = ImageList.of(Splits(images, None, parted)).only("test").rows
    assert [row.role for row in rows] == ["query", "query gallery", "gallery"]


@pytest.mark.parametrize(
    "content", [b"", b"no gzip", gzip.compress(b"a,b\r\n1,2\r\n", mtime=0), gzip.compress(b"\xff\x00", mtime=0)]
)
def test_a_damaged_list_is_no_list(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "images.csv.gz").write_bytes(content)
    assert ImageList.read(tmp_path / "images.csv.gz") is None
    assert ImageList.read(tmp_path / "none.csv.gz") is None


def test_odd_names_come_back_as_they_were(tmp_path: Path) -> None:
    """Commas, quotes, line ends, and bytes that are no text. The file is the same whenever it is written."""
    names = ['a, "b".png', "line\nend\r.png", "\udcff.png", "Ä/ö.png", " leading.png"]
    images = ImageList(Row(name, str(i), name, "training") for i, name in enumerate(names))
    for file in ("one", "two"):
        images.write(tmp_path / file)
    read = ImageList.read(tmp_path / "one")
    assert read is not None and read.rows == images.rows
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
