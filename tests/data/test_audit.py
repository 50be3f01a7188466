"""`ray-dmml data check`: its findings, its output and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from typer.testing import CliRunner

from ray_dmml.cli.main import app
from ray_dmml.config.schema import DataConfig
from ray_dmml.data.audit import AuditReport, Group, audit, histogram


def scene(seed: int, side: int = 96) -> Image.Image:
    """A smooth image that resembles no other seed's, as photos do."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """c0 to c3 train, c4 to c7 test, 4 images each, all different."""
    for number in range(32):
        path = tmp_path / "images" / f"c{number // 4}" / f"{number % 4}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(number).save(path)
    return tmp_path / "images"


def settings(root: Path) -> DataConfig:
    return DataConfig(name="imagefolder", root=root, decode_size=64, validation_fraction=0)


def names(group: Group) -> list[str]:
    return [image.name for image in group.images]


def check(root: Path, *more: str) -> Any:
    options = ["name=imagefolder", f"root={root}", "decode_size=64", "validation_fraction=0"]
    sets = [part for option in options for part in ("--set", f"data.{option}")]
    return CliRunner().invoke(app, ["data", "check", *sets, *more])


def test_a_clean_data_set(root: Path) -> None:
    """The exit code is 0, and the report has sizes and no findings."""
    ended = check(root)
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.count(": none") == 6 and "no problems" in ended.stdout
    report = audit(settings(root))
    assert (
        report.splits == {part: {"images": 16, "classes": 4} for part in ("train", "test")} and report.duplicates == []
    )
    assert report.class_sizes == [4] * 8


def test_unreadable_images_are_listed_with_the_reason(root: Path) -> None:
    """All of them are, whatever data.on_bad_image is."""
    for number in range(4):
        (root / "c1" / f"bad{number}.png").write_bytes(b"broken" * number)
    ended = check(root)
    assert ended.exit_code == 1 and "unreadable images: 4" in ended.stdout
    flat = " ".join(ended.stdout.split())
    assert "image c1/bad0.png cannot be read: the file is empty" in flat and "and 1 more" in flat
    assert [row["name"] for row in audit(settings(root)).unreadable] == [f"c1/bad{number}.png" for number in range(4)]


def test_exact_duplicates(root: Path) -> None:
    """Files are duplicates if their pixels are: within a class, across labels, and across the split."""
    (root / "c0" / "copy.png").write_bytes((root / "c0" / "0.png").read_bytes())
    scene(1).save(root / "c1" / "copy.bmp")
    scene(2).save(root / "c5" / "copy.png", compress_level=0)
    report = audit(settings(root))
    groups = {tuple(names(group)): group for group in report.duplicates}
    assert set(groups) == {
        ("c0/0.png", "c0/copy.png"), ("c0/1.png", "c1/copy.bmp"), ("c0/2.png", "c5/copy.png"),
    }  # fmt: skip
    kinds = [(group.two_classes, group.train_and_test) for group in groups.values()]
    assert sorted(kinds) == [(False, False), (True, False), (True, True)]
    assert all(group.exact for group in report.duplicates) and not report.is_clean() and check(root).exit_code == 1


@pytest.mark.parametrize("how", ["saved again", "half as large", "brighter"])
def test_near_duplicates_across_classes(root: Path, how: str) -> None:
    """A copy that is not equal to the bit is reported, and is a fault between two classes."""
    copy, options = scene(3), {"quality": 40}
    if how == "half as large":
        copy = copy.resize((48, 48))
    elif how == "brighter":
        copy = ImageEnhance.Brightness(copy).enhance(1.1)
    copy.save(root / "c6" / "copy.jpg", **options)
    report = audit(settings(root))
    (group,) = report.duplicates
    assert names(group) == ["c0/3.png", "c6/copy.jpg"] and not group.exact
    assert group.two_classes and group.train_and_test and not report.is_clean()


def test_near_duplicates_within_a_class_are_no_fault(root: Path) -> None:
    """They are reported, and the exit code stays 0."""
    scene(3).save(root / "c0" / "copy.jpg")
    ended = check(root)
    assert ended.exit_code == 0 and "near duplicates: 1 groups" in ended.stdout


def test_many_copies_hide_nothing(root: Path) -> None:
    """Copies of one image are one group. An image near one of them is in a near group with all."""
    for number in range(20):
        scene(0).save(root / "c0" / f"copy{number:02d}.png")
    scene(0).save(root / "c7" / "near.jpg")
    report = audit(settings(root))
    assert [(group.exact, len(group.images)) for group in report.duplicates] == [(True, 21), (False, 22)]


def test_flat_images_are_not_alike(root: Path) -> None:
    """Almost uniform images are near no other."""
    for number, grey in enumerate((100, 101, 200)):
        pixels = np.full((64, 64, 3), grey, dtype=np.uint8)
        pixels[0, 0] += 1
        Image.fromarray(pixels).save(root / f"c{number}" / "flat.png")
    assert audit(settings(root)).duplicates == []


def test_small_classes(root: Path) -> None:
    """Training classes of fewer than K images are listed; test classes are not."""
    for name in ("c2/0.png", "c2/1.png", "c6/0.png"):
        (root / name).unlink()
    ended = check(root)
    assert ended.exit_code == 1 and "classes of fewer than 4 images: 1" in ended.stdout
    assert audit(settings(root)).small_classes == [{"label": "c2", "images": 2}]
    assert check(root, "--set", "data.images_per_class=2").exit_code == 0


def test_the_json_report_has_everything(root: Path) -> None:
    """It has all names, of which the table shows some. Nothing else is on standard output."""
    for number in range(5):
        (root / "c1" / f"copy{number}.png").write_bytes((root / "c1" / "0.png").read_bytes())
    (root / "c3" / "bad.png").write_bytes(b"")
    ended = check(root, "--json")
    assert ended.exit_code == 1
    found = json.loads(ended.stdout)
    assert found["clean"] is False and found["splits"]["train"] == {"images": 22, "classes": 4}
    assert found["unreadable"][0]["name"] == "c3/bad.png"
    (group,) = found["duplicates"]
    assert group["exact"] and not group["two_classes"] and len(group["images"]) == 6
    assert group["images"][0] == {"name": "c1/0.png", "label": "c1", "split": "train"}


def test_what_cannot_be_loaded_is_a_users_error(tmp_path: Path) -> None:
    """The exit code is 2, and a sentence names the folder that is missing."""
    ended = check(tmp_path / "nowhere")
    assert ended.exit_code == 2 and "is not an existing folder" in ended.stderr


def test_the_output_fits_a_screen(root: Path) -> None:
    """No line is longer than 80 columns, though names are."""
    long = "a very long class name, " * 6
    (root / "c0").rename(root / long)
    (root / long / "copy.png").write_bytes((root / long / "0.png").read_bytes())
    assert max(map(len, check(root).stdout.splitlines())) <= 80


@pytest.mark.slow
def test_built_in_data_can_be_checked() -> None:
    """It needs no file, and every image can be read."""
    report = audit(DataConfig(decode_size=32))
    assert isinstance(report, AuditReport) and report.unreadable == []
    assert set(report.splits) == {"train", "validation", "test"}


def test_the_histogram() -> None:
    """It has a row for each power of two up to the largest class, and its longest bar is 40."""
    rows = [line.split() for line in histogram([1, 1, 2, 3, 3, 9])]
    assert [row[:2] for row in rows] == [["1", "2"], ["2-3", "3"], ["4-7", "0"], ["8-15", "1"]]
    assert [len(row[2]) if len(row) > 2 else 0 for row in rows] == [27, 40, 0, 14]
