"""Which files of the class folders are images, and what is said of the others."""

from __future__ import annotations

import logging
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image, features
from typer.testing import CliRunner

from ray_dmml.cli.main import app
from ray_dmml.config.schema import Config, DataConfig
from ray_dmml.data.audit import audit
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.findings import Findings
from ray_dmml.data.formats import suffixes
from ray_dmml.errors import UserError
from ray_dmml.training.images import read_images

PILLOW_WRITES = {
    "jfif": "JPEG", "jpe": "JPEG", "jpg": "JPEG", "PNG": "PNG", "apng": "PNG", "jp2": "JPEG2000", "avif": "AVIF",
    "ppm": "PPM", "pgm": "PPM", "tga": "TGA", "mpo": "MPO", "dib": "DIB", "ico": "ICO", "pcx": "PCX", "sgi": "SGI",
    "qoi": "QOI", "dds": "DDS",
}  # fmt: skip
if not features.check("avif"):
    del PILLOW_WRITES["avif"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """4 classes of 2 PNGs."""
    for number in range(8):
        path = tmp_path / "photos" / f"c{number // 2}" / f"{number % 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (30 * number, 5, 250)).save(path)
    return tmp_path / "photos"


def settings(root: Path) -> DataConfig:
    return DataConfig(name="imagefolder", root=root, decode_size=8, validation_fraction=0, images_per_class=2)


def notes(root: Path) -> list[str]:
    findings = Findings()
    load_splits(settings(root), findings=findings)
    return findings.notes


def num_images(root: Path) -> int:
    splits = load_splits(settings(root))
    return len(splits.train) + len(splits.test)


@pytest.mark.parametrize("suffix", PILLOW_WRITES)
def test_what_pillow_reads_is_used(root: Path, suffix: str) -> None:
    """Whatever the suffix is called."""
    image = Image.new("L" if suffix == "pgm" else "RGB", (16, 16), "white")
    image.save(root / "c0" / f"x.{suffix}", PILLOW_WRITES[suffix])
    assert num_images(root) == 9 and notes(root) == []
    source = load_splits(settings(root)).train.source
    assert source.name(2) == f"c0/x.{suffix}" and source.read(2).min() > 240


def test_files_that_are_not_images_are_counted_in_one_note(root: Path) -> None:
    """By suffix, the most frequent first, with the package that reads them where there is one."""
    for name in ("c0/1.arw", "c0/2.ARW", "c1/3.arw", "c1/notes.txt", "c1/README", "c2/Thumbs.db"):
        (root / name).write_bytes(b"not read")
    (note,) = notes(root)
    assert "3 .arw, " in note and "1 .txt" in note and "1 .db" in note and "1 without a suffix" in note
    assert note.index("3 .arw") < note.index("1 .txt") and num_images(root) == 8
    (root / "c0" / "b.xyz").touch()
    (root / "c0" / ".hidden.xyz").touch()
    assert "1 .xyz" in notes(root)[0]


def test_the_format_of_an_installed_plug_in_is_used(root: Path) -> None:
    """An iPhone's photos."""
    pytest.importorskip("pillow_heif")
    assert ".heic" in suffixes()
    Image.new("RGB", (64, 64), "white").save(root / "c0" / "x.HEIC", "HEIF")
    assert notes(root) == [] and num_images(root) == 9


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="the plug-in is installed")
def test_a_plug_in_that_is_missing_is_named(root: Path) -> None:
    """With the command that installs it."""
    (root / "c0" / "x.HEIC").touch()
    assert "1 .heic (to use them: pip install pillow-heif)" in notes(root)[0] and num_images(root) == 8


def test_train_and_data_check_say_it(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once each. Without such files they say nothing."""
    config = Config.parse({"data": {**settings(root).model_dump(mode="json"), "classes_per_batch": 2}})
    read_images(config)
    assert not [each for each in caplog.messages if "not used" in each]
    (root / "c3" / "x.arw").touch()
    with caplog.at_level(logging.WARNING):
        read_images(config)
    assert [each for each in caplog.messages if "1 .arw, such as c3/x.arw" in each and str(root) in each]
    ended = CliRunner().invoke(
        app,
        ["data", "check", "--set", "data.name=imagefolder", "--set", f"data.root={root}",
         "--set", "data.validation_fraction=0", "--set", "data.images_per_class=2"],
    )  # fmt: skip
    assert " ".join(ended.stdout.split()).count("1 .arw, such as c3/x.arw") == 1
    assert len(audit(settings(root)).notes) == 1


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "#recycle", "@Recycle", "$RECYCLE.BIN"])
def test_folders_of_a_nas_are_left_out(root: Path, name: str) -> None:
    """They hold thumbnails and deleted files. They are no class and no part of one, and their files are counted."""
    for folder in (root / name, root / "c1" / name, root / "c1" / "deep" / name / "deeper"):
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "SYNOPHOTO_THUMB_M.jpg")
    assert num_images(root) == 8
    (note,) = notes(root)
    assert f"3 in {name} " in note


@pytest.mark.parametrize("name", [".thumbnails", ".AppleDouble", ".DS_Store"])
def test_hidden_folders_are_left_out(root: Path, name: str) -> None:
    """Without a word, as everywhere."""
    (root / "c1" / name).mkdir()
    Image.new("RGB", (8, 8)).save(root / "c1" / name / "x.jpg")
    (root / "c1" / "._0.png").write_bytes(b"AppleDouble")
    assert num_images(root) == 8 and notes(root) == []


def test_images_outside_of_the_classes_are_counted(root: Path) -> None:
    """They have no class."""
    Image.new("RGB", (8, 8)).save(root / "stray.jpg")
    (root / "list.csv").touch()
    (note,) = notes(root)
    assert "1 images in no class folder, such as stray.jpg" in note and num_images(root) == 8


def test_links_to_folders_in_a_class_are_counted(root: Path, tmp_path: Path) -> None:
    """They are not followed, because they may form a circle. A class of nothing else is refused."""
    (root / "c1" / "more").symlink_to(root / "c2")
    (root / "c0" / "around").symlink_to(root)
    (note,) = notes(root)
    assert "2 links to folders, such as c0/around" in note and num_images(root) == 8
    (root / "c9").mkdir()
    (root / "c9" / "photos").symlink_to(root / "c2")
    with pytest.raises(UserError, match=r"c9 has no images .*; it has 1 links to folders, such as c9/photos: fill or"):
        load_splits(settings(root))


def test_a_class_without_images_names_what_it_has(root: Path) -> None:
    """A folder full of raw photos is not empty."""
    (root / "c9").mkdir()
    (root / "c9" / "1.arw").touch()
    with pytest.raises(UserError, match=r"c9 has no images in a known format; it has 1 \.arw: fill or remove it"):
        load_splits(settings(root))


def test_class_folders_of_one_name_are_refused(root: Path) -> None:
    """A Mac and a Linux machine write é in two ways, and nobody sees the difference."""
    for form in ("NFC", "NFD"):
        (root / unicodedata.normalize(form, "café")).mkdir()
        Image.new("RGB", (8, 8)).save(root / unicodedata.normalize(form, "café") / "x.png")
    with pytest.raises(UserError, match=r"two class folders 'café'.* only in their Unicode form"):
        load_splits(settings(root))
