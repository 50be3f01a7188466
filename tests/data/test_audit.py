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
from ray_dmml.config.schema import Config, DataConfig
from ray_dmml.data.audit import AuditReport, Group, audit, histogram
from ray_dmml.errors import UserError
from ray_dmml.training.images import read_images


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
    return DataConfig(name="imagefolder", root=root, decode_size=64, validation_fraction=0, classes_per_batch=2)


def names(group: Group) -> list[str]:
    return [image.name for image in group.images]


def check(root: Path, *more: str) -> Any:
    options = ["name=imagefolder", f"root={root}", "decode_size=64", "validation_fraction=0", "classes_per_batch=2"]
    sets = [part for option in options for part in ("--set", f"data.{option}")]
    return CliRunner().invoke(app, ["data", "check", *sets, *more])


def test_a_clean_data_set(root: Path) -> None:
    """The exit code is 0, and the report has sizes and no findings."""
    ended = check(root)
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.count(": none") == 7 and "no problems" in ended.stdout
    report = audit(settings(root))
    assert (
        report.splits == {part: {"images": 16, "classes": 4} for part in ("train", "test")} and report.duplicates == []
    )
    assert report.class_sizes == [4] * 8


def test_unreadable_images_are_listed_with_the_reason(root: Path) -> None:
    """All of them are, whatever data.on_bad_image is. By default, a run would refuse them."""
    for number in range(4):
        (root / "c1" / f"bad{number}.png").write_bytes(b"broken" * number)
    ended = check(root)
    assert ended.exit_code == 2 and "unreadable images: 4" in ended.stdout
    assert check(root, "--set", "data.on_bad_image=skip").exit_code == 1
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
    assert ended.exit_code == 0 and "near duplicates: 1 group\n" in ended.stdout


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
    assert ended.exit_code == 2
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


def test_all_faults_of_a_folder_are_found_in_one_go(root: Path) -> None:
    """A run would end at the first of them. The images that can be used are audited."""
    (root / "c8").mkdir()
    (root / "c9").mkdir()
    (root / "c9" / "x.arw").touch()
    (root / "up").symlink_to(".")
    for number in range(4):
        (root / "c3" / f"{number}.png").write_bytes(b"broken")
    (root / "c1" / "copy.png").write_bytes((root / "c0" / "0.png").read_bytes())
    (root / "c2" / "3.png").unlink()
    options = ("--set", "data.classes_per_batch=5", "--set", "data.train_fraction=0.6")
    report = json.loads(check(root, *options, "--json").stdout)
    assert len(report["faults"]) == 4
    for part in (
        "c8 has no images",
        "c9 has no images in a known format; it has 1 .arw",
        "up is a link to",
        "only 4 cl",
    ):
        assert any(part in fault for fault in report["faults"]), part
    assert len(report["unreadable"]) == 4 and report["duplicates"][0]["two_classes"]
    assert report["small_classes"] == [{"label": "c2", "images": 3}]
    assert "1 .arw, such as c9/x.arw" in report["notes"][0]
    ended = check(root, *options)
    assert ended.exit_code == 2
    for part in ("c8 has no images", "unreadable images: 4", "exact duplicates: 1", "fewer than 4 images: 1", "1 .arw"):
        # A long path is broken anywhere, also in the name at its end.
        assert part.replace(" ", "") in "".join(ended.stdout.split()), part


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"classes_per_batch": 5}, "data.classes_per_batch is 5 but only 4 classes"),
        ({"classes_per_batch": 4, "images_per_class": 5}, "needs more than the 16 training images"),
        ({"train_fraction": 0.9}, "is 7 to train"),
        ({"validation_fraction": 0.7}, "leaves fewer than 2 to train on"),
    ],
)
def test_settings_that_no_batch_fits_are_faults(root: Path, options: dict[str, Any], fault: str) -> None:
    """As a run says it."""
    config = DataConfig.model_validate({**settings(root).model_dump(), **options})
    report = audit(config)
    assert any(fault in each for each in report.faults) and not report.is_clean()
    with pytest.raises(UserError, match=fault):
        read_images(Config.model_validate({"data": config}))


def test_what_is_left_without_unreadable_images_counts(root: Path) -> None:
    """With data.on_bad_image: skip a run has no batch."""
    for number in range(4):
        (root / "c3" / f"{number}.png").write_bytes(b"broken")
    config = DataConfig.model_validate({**settings(root).model_dump(), "classes_per_batch": 4})
    (fault,) = audit(config).faults
    assert fault.startswith("without the unreadable images: data.classes_per_batch is 4 but only 3 classes")


HEAD = "path,label,split,is_query\n"
ROWS = "".join(
    f"c{n // 4}/{n % 4}.png,{'abcdefgh'[n // 4]},{'train' if n < 16 else 'validation'},\n" for n in range(32)
)


def manifest(root: Path, rows: str, **changes: Any) -> DataConfig:
    (root.parent / "m.csv").write_text(HEAD + rows)
    values = settings(root).model_dump() | {"name": "manifest", "manifest": root.parent / "m.csv"} | changes
    return DataConfig.model_validate(values)


def test_all_faults_of_a_manifest_are_found_in_one_go(root: Path) -> None:
    """Each bad row has its sentence, and the good ones are audited."""
    bad = (
        ",a,train,\nc0/0.png,a,train,\n../x.png,a,train,\nc0/9.png,a,train,\nc0/8.png,,train,\n"
        "c0/7.png,a,test,\nc0/6.png,a,train,maybe\n"
    )
    (root / "c9").mkdir()
    scene(0).save(root / "c9" / "9.png")
    report = audit(manifest(root, ROWS + bad + "c9/9.png,a,validation,\n"))
    parts = (
        "line 34: path is empty", "line 35: c0/0.png is listed a second time", "line 36: ../x.png is outside",
        "lists c0/9.png, which is not in", "line 38: label is empty", "line 39: split is 'test'",
        "line 40: is_query is 'maybe'", "label 'a' is in both splits",
    )  # fmt: skip
    for part in parts:
        assert sum(part in fault for fault in report.faults) == 1, part
    assert len(report.faults) == len(parts) and report.splits["train"] == {"images": 16, "classes": 4}
    (group,) = report.duplicates
    assert group.exact and group.train_and_test and names(group) == ["c0/0.png", "c9/9.png"]


@pytest.mark.parametrize("rows", ["", ",,,\n", "c0/0.png,a,test,\n", "nowhere.png,a,train,\n"])
def test_a_manifest_without_a_good_row(root: Path, rows: str) -> None:
    """There is nothing to audit, and the report says why."""
    report = audit(manifest(root, rows))
    assert report.faults and report.splits == {} and report.class_sizes == []
    assert any("no rows" in fault for fault in report.faults)


@pytest.mark.parametrize("seed", range(8))
def test_what_passes_the_check_is_accepted_by_a_run(root: Path, seed: int) -> None:
    """And what a run refuses does not pass."""
    rng = np.random.default_rng(seed)
    for path in sorted(root.glob("*/*.png")):
        if rng.random() < 0.15:
            path.unlink()
    values = {
        "train_fraction": float(rng.choice([0.3, 0.5, 1])), "validation_fraction": float(rng.choice([0, 0.3, 0.6])),
        "classes_per_batch": int(rng.integers(2, 5)), "images_per_class": int(rng.integers(2, 4)),
        "split_by": str(rng.choice(["class", "image"])),
    }  # fmt: skip
    config = DataConfig.model_validate({**settings(root).model_dump(), **values})
    report = audit(config)
    try:
        read_images(Config.model_validate({"data": config}))
    except UserError as error:
        assert str(error) == report.faults[0]
    else:
        assert report.faults == []


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
