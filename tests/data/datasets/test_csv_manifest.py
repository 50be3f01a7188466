"""Manifests: valid ones, and mistakes that are refused with their line."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import ImageSet
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.sampler import ClassBalancedSampler
from ray_dmml.errors import UserError


def save(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 5, 250 - colour)).save(path)


def names_of(images: ImageSet) -> list[str]:
    return [images.source.name(i) for i in range(len(images))]


def listed(tmp_path: Path, text: str, **changes: object) -> DataConfig:
    """A manifest, and every image that it names below a, b or c."""
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    settings = {
        "name": "manifest", "root": tmp_path, "manifest": tmp_path / "m.csv", "decode_size": 8,
        "validation_fraction": 0, "check_images": False,
    }  # fmt: skip
    for line in text.splitlines()[1:]:
        path = line.split(",")[0]
        if path[:2] in ("a/", "b/", "c/"):
            save(tmp_path / path)
    return DataConfig.model_validate({**settings, **changes})


TRAIN = "a/1.png,9,train,,\na/2.png,9,train,,\na/3.png,10,train,,\na/4.png,10,train,,\n"
FULL_HEAD = "path,label,split,is_query,is_gallery\n"


def test_manifest_query_and_gallery(tmp_path):
    """Flags may be 0/1, True/False or 1.0/0.0, and the file may have a byte-order mark."""
    rows = "b/1.png,x,validation,1,0\nb/2.png,x,validation,False,True\n"
    rows += "b/3.png,y,validation,1.0,1.0\nb/4.png,y,validation,0.0,1\nb/5.png,y,validation,,\n"
    splits = load_splits(listed(tmp_path, "\ufeff" + FULL_HEAD + TRAIN + rows))
    assert splits.train.class_names == ("9", "10")  # numbers in numeric order
    assert splits.train.labels.tolist() == [0, 0, 1, 1]
    assert names_of(splits.test) == [f"b/{i}.png" for i in range(1, 6)]
    assert splits.test.query.tolist() == [0, 2] and splits.test.gallery.tolist() == [1, 2, 3]


def test_flags_of_training_rows_count_once_they_are_held_out(tmp_path):
    """Held-out training classes are evaluated by the flags of their rows."""
    train = "".join(f"a/{c}{i}.png,{c},train,{int(i == 0)},{int(i > 0)}\n" for c in "pqrs" for i in range(3))
    test = "b/1.png,x,validation,1,0\nb/2.png,x,validation,0,1\nb/3.png,y,validation,0,1\n"
    config = listed(tmp_path, FULL_HEAD + train + test, validation_fraction=0.5)
    validation = load_splits(config).validation
    assert [names_of(validation)[i][-5] for i in validation.query] == ["0", "0"]
    assert [names_of(validation)[i][-5] for i in validation.gallery] == ["1", "2", "1", "2"]
    lonely = train.replace(",0,1\n", ",0,0\n")  # queries, and nothing to find
    with pytest.raises(UserError, match="in the gallery"):
        load_splits(listed(tmp_path, FULL_HEAD + lonely + test, validation_fraction=0.5))


def test_categories_and_sequences(tmp_path):
    """Images of one sequence exclude each other, those without one nobody; also once classes are held out."""
    head = "path,label,split,category,sequence,burst\n"
    train = "".join(f"a/{c}{i}.png,{c},train,fruit,{i // 2},\n" for c in "pqrs" for i in range(4))
    cells = (
        "1.png,x,validation,car,7,u",
        "2.png,x,validation,car,7,",
        "3.png,x,validation,,,u",
        "4.png,y,validation,,,",
    )
    config = listed(tmp_path, head + train + "".join(f"b/{row}\n" for row in cells), validation_fraction=0.5)
    splits = load_splits(config)
    assert splits.test.categories == ("car", "car", "", "")
    one, two, three, four = splits.test.exclude.tolist()
    assert one == two and len({two, three, four}) == 3
    assert splits.test.num_evaluated() == 3  # two images find the third one, which finds both
    assert splits.validation.categories == ("fruit",) * 8
    groups = splits.validation.exclude.reshape(2, 2, 2)
    assert (groups[..., 0] == groups[..., 1]).all() and (groups[:, 0] != groups[:, 1]).all()
    others = load_splits(config.model_copy(update={"exclude_same": "burst"}))
    one, two, three, four = others.test.exclude.tolist()
    assert one == three and len({one, two, four}) == 3 and others.train.exclude is None
    assert load_splits(config.model_copy(update={"exclude_same": None})).test.exclude is None
    table = config.manifest.read_text().splitlines()
    config.manifest.write_text("\n".join([f",{table[0]}", *(f"0,{row}" for row in table[1:])]))  # pandas' index
    assert load_splits(config.model_copy(update={"exclude_same": None})).test.exclude is None
    assert splits.test.digest() != others.test.digest()
    with pytest.raises(UserError, match=r"has no column 'shot', which data\.exclude_same names"):
        load_splits(config.model_copy(update={"exclude_same": "shot"}))


def test_an_accent_is_one_however_it_is_written(tmp_path):
    """In labels, categories and sequences: one character, or a letter and an accent."""
    rows = [f"b/{n}.png,{cell},validation,{cell},{cell}\n" for n, cell in enumerate(("é", "e\u0301"))]
    others = "b/2.png,é,validation,é,\nb/3.png,z,validation,,\n"
    config = listed(tmp_path, "path,label,split,category,sequence\n" + TRAIN + "".join(rows) + others)
    test = load_splits(config).test
    assert test.class_names == ("z", "é") and test.categories[:2] == ("é", "é")
    assert test.exclude[0] == test.exclude[1] != test.exclude[2]


def test_a_sequence_that_holds_a_whole_class_leaves_nothing_to_find(tmp_path):
    """It is a fault if that is so for all classes."""
    rows = "".join(f"b/{c}{i}.png,{c},validation,{c}\n" for c in "xy" for i in range(2))
    with pytest.raises(UserError, match=r"no test image .* the same value in the column that data\.exclude_same names"):
        load_splits(listed(tmp_path, "path,label,split,sequence\n" + TRAIN.replace(",,\n", ",\n") + rows))


@pytest.mark.parametrize("flags", ["", ",,"])
def test_manifest_without_flags_is_all_against_all(tmp_path, flags):
    """Columns that are absent or empty mean all against all; other columns are ignored."""
    text = "path,label,split" + (",is_query,is_gallery" if flags else "") + ",colour\n"
    for i, row in enumerate(["p,train", "p,train", "q,train", "q,train"]):
        text += f"a/{i}.png,{row}{flags},red\n"
    for i, row in enumerate(["x,validation", "x,validation", "y,validation"]):
        text += f"{tmp_path}/b/{i}.png,{row}{flags},red\n"  # absolute, inside the root
        save(tmp_path / f"b/{i}.png")
    splits = load_splits(listed(tmp_path, text))
    assert splits.test.query is None and splits.test.gallery is None
    assert names_of(splits.test) == ["b/0.png", "b/1.png", "b/2.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,split\na/1.png,train\n", "no column 'label'"),
        ("", "no column 'path'"),
        (FULL_HEAD, "no rows of split 'train'"),
        (FULL_HEAD + "a/1.png,9,validation,,\n", "no rows of split 'train'"),
        (FULL_HEAD + "a/1.png,9,test,,\n", "line 2: split is 'test'; allowed: train, validation"),
        (FULL_HEAD + TRAIN + "a/9.png,9,validation,,\n", "label '9' is in both splits"),
        (FULL_HEAD + "a/1.png,9,train,,\n../x.png,9,train,,\n", r"line 3: \.\./x\.png is outside"),
        (FULL_HEAD + "/etc/passwd,9,train,,\n", "line 2: /etc/passwd is outside"),
        (FULL_HEAD + TRAIN + "a/./1.png,9,train,,\n", "line 6: a/1.png is listed a second time"),
        (FULL_HEAD + TRAIN + "z/1.png,x,validation,,\nz/2.png,x,validation,,\n", "lists z/1.png.*2 files"),
        (FULL_HEAD + "a/1.png,9,train,maybe,\n", "line 2: is_query is 'maybe'"),
        (FULL_HEAD + "a/1.png,,train,,\n", "line 2: label is empty"),
        (
            FULL_HEAD + TRAIN + "b/1.png,x,validation,1,\nb/2.png,y,validation,,1\n",
            "no test image has another of its class to find",
        ),
        (
            FULL_HEAD + TRAIN + "b/1.png,x,validation,1,1\nb/2.png,y,validation,1,1\n",
            "no test image has another of its class to find",
        ),
        (FULL_HEAD + TRAIN + "b/1.png,x,validation,,\nb/2.png,x,validation,,\n", "test .* of 1 classes"),
    ],
)  # fmt: skip
def test_manifest_mistakes_are_named(tmp_path, text, message):
    """Every message names the line or the file."""
    with pytest.raises(UserError, match=message):
        load_splits(listed(tmp_path, text))


def test_manifest_that_cannot_be_read(tmp_path):
    """It is missing, or it is not text."""
    config = listed(tmp_path, FULL_HEAD, manifest=tmp_path / "other.csv")
    with pytest.raises(UserError, match=r"other\.csv cannot be read: No such file"):
        load_splits(config)
    (tmp_path / "other.csv").write_bytes(b"path,label,split\n\xff\xfe,1,train\n")
    with pytest.raises(UserError, match="not a CSV file in UTF-8"):
        load_splits(config)


HEAD = "path,label,split\n"
ODD_NAMES = [
    "two words.png", "it's.png", 'a "quote".png', "comma, semicolon;.png", "naïve 画像 é.png",
    "#hash%20&?.png", "-dash.png", "[bold]x.png", "new\nline.png",
]  # fmt: skip


def test_odd_names_in_a_manifest_are_used(tmp_path: Path) -> None:
    """They are quoted as in CSV."""
    with (tmp_path / "m.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split"])
        for number, name in enumerate(ODD_NAMES[:8]):
            save(tmp_path / name)
            split = "train" if number < 4 else "validation"
            table.writerow([name, f'é "{number // 2}", x', split])
    config = manifest_config(tmp_path, None)
    assert all_names(config) == ODD_NAMES[:8]


def manifest_config(folder: Path, content: str | bytes | None) -> DataConfig:
    """A manifest; the images 0.png to 7.png lie beside it."""
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / "m.csv").write_bytes(data)
    for number in range(8):
        save(folder / f"{number}.png", 9 * number)
    return DataConfig(
        name="manifest", root=folder, manifest=folder / "m.csv", decode_size=8,
        validation_fraction=0,
    )  # fmt: skip


def all_names(config: DataConfig) -> list[str]:
    splits = load_splits(config)
    return names_of(splits.train) + names_of(splits.test)


def rows(labels: str = "aabbccdd") -> str:
    return "".join(f"{n}.png,{label},{'train' if n < 4 else 'validation'}\n" for n, label in enumerate(labels))


def manifest_refusal(folder: Path, content: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        load_splits(manifest_config(folder, content))
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("path", ["../x.png", "a/../../x.png", "/etc/passwd"])
def test_a_path_that_leaves_the_root_is_refused(tmp_path: Path, path: str) -> None:
    """The message has the line."""
    message = manifest_refusal(tmp_path, HEAD + rows() + f"{path},a,train\n")
    assert f"line 10: {path} is outside data.root" in message


def test_a_link_that_leaves_the_root_is_used(tmp_path: Path) -> None:
    """A path in the manifest may not leave the root. The owner of the root made the link."""
    root = tmp_path / "root"
    root.mkdir()
    config = manifest_config(root, HEAD + rows())
    (root / "0.png").rename(tmp_path / "far.png")
    (root / "0.png").symlink_to(tmp_path / "far.png")
    assert len(all_names(config)) == 8


@pytest.mark.parametrize("again", ["0.png", "./0.png", "x/../0.png"])
def test_a_duplicate_row_is_refused(tmp_path: Path, again: str) -> None:
    """Its path may be written in another way."""
    message = manifest_refusal(tmp_path, HEAD + rows() + f"{again},a,train\n")
    assert "line 10: 0.png is listed a second time" in message


@pytest.mark.parametrize("column", ["path", "label", "split"])
def test_a_missing_or_double_column_is_refused(tmp_path: Path, column: str) -> None:
    """The message has its name."""
    if column == "split":  # all rows would train, and one that is mistyped must not have this effect
        for name in ("Split", "splits", "spilt"):
            message = manifest_refusal(tmp_path, HEAD.replace(column, name) + rows())
            assert "has no column 'split' but one like it" in message
    else:
        message = manifest_refusal(tmp_path, HEAD.replace(column, "other") + rows())
        assert f"has no column '{column}'" in message
    message = manifest_refusal(tmp_path, f"{column}," + HEAD + rows())
    assert f"has two columns '{column}'" in message


@pytest.mark.parametrize(("column", "written"), [("is_query", "Is_Query"), ("x_1", "x1"), ("x_1", "X_1")])
def test_a_column_in_another_spelling_is_refused(tmp_path: Path, column: str, written: str) -> None:
    """It would have no effect: all against all in place of queries, whole images in place of boxes."""
    message = manifest_refusal(tmp_path, HEAD.replace("\n", f",{written}\n") + rows().replace("\n", ",\n"))
    assert f"has no column '{column}' but one like it, '{written}'" in message


def test_a_column_with_a_name_of_its_own_is_not_used(tmp_path: Path) -> None:
    """`spot` is no misspelt `split`, and beside `label` there may be a `Label`."""
    text = "".join(f"{n}.png,{label},x,y\n" for n, label in enumerate("aabbccdd"))
    (tmp_path / "m.csv").write_text("path,label,spot,Label\n" + text)
    assert len(load_splits(manifest_config(tmp_path, None)).train) == 8


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_and_other_line_ends_are_used(tmp_path: Path, mark: str, end: str) -> None:
    """Spreadsheets write them."""
    config = manifest_config(tmp_path, mark + (HEAD + rows()).replace("\n", end))
    assert all_names(config) == [f"{n}.png" for n in range(8)]


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    """Old spreadsheets write UTF-16. Bytes that are not text are refused, too."""
    assert "not a CSV file in UTF-8" in manifest_refusal(tmp_path, (HEAD + rows()).encode("utf-16"))
    message = manifest_refusal(tmp_path, HEAD + rows() + "a\0b.png,a,train\n")
    assert "line 10: path has a character 0" in message


def test_lines_without_end_are_refused(tmp_path: Path) -> None:
    """The file may not be a table, a cell may be too long, or no file can have such a path."""
    assert "a line has more than" in manifest_refusal(tmp_path, HEAD + "x," * 2**20)
    assert "field larger than" in manifest_refusal(tmp_path, HEAD + "x" * 200_000)
    assert "files are missing" in manifest_refusal(tmp_path, HEAD + rows() + "y" * 5000 + ",a,train")


def test_a_manifest_that_is_no_file_is_refused(tmp_path: Path) -> None:
    """It is a folder or a pipe."""
    (tmp_path / "m.csv").mkdir()
    with pytest.raises(UserError, match="is not a file"):
        load_splits(manifest_config(tmp_path, None))
    (tmp_path / "m.csv").rmdir()
    os.mkfifo(tmp_path / "m.csv")
    with pytest.raises(UserError, match="is not a file"):
        load_splits(manifest_config(tmp_path, None))


@pytest.mark.parametrize("labels", ["99AA77bb", "99::77;;"])
def test_labels_are_text(tmp_path: Path, labels: str) -> None:
    """So are numbers: 07 and 7 are two labels."""
    splits = load_splits(manifest_config(tmp_path, HEAD + rows(labels)))
    assert set(splits.train.class_names) == set(labels[:4])
    numbers = HEAD + rows().replace(",a,", ",7,").replace(",b,", ",07,")
    assert set(load_splits(manifest_config(tmp_path, numbers)).train.class_names) == {"7", "07"}


def test_one_class_is_refused(tmp_path: Path) -> None:
    """In training and in test there must be another class."""
    message = manifest_refusal(tmp_path, HEAD + rows("aaaaccdd"))
    assert "training images are of 1 classes; at least 2" in message
    assert "test images are of 1 classes" in manifest_refusal(tmp_path, HEAD + rows("aabbcccc"))


def test_one_image_a_class_is_refused(tmp_path: Path) -> None:
    """Test queries have nothing to find; training has no positive pair."""
    assert "no test image has another" in manifest_refusal(tmp_path, HEAD + rows("aabbcdef"))
    with pytest.raises(UserError, match="the largest training class has 1"):
        ClassBalancedSampler(np.arange(100), 4, 2, seed=0)


@pytest.mark.parametrize(("count", "seconds"), [(10_000, 10), pytest.param(100_000, 30, marks=pytest.mark.slow)])
def test_a_manifest_of_100_000_classes_is_used(tmp_path: Path, count: int, seconds: int) -> None:
    """Its classes of two rows are read in seconds."""
    save(tmp_path / "x.png")
    (tmp_path / "all").mkdir()
    text = HEAD
    for number in range(2 * count):
        os.symlink("../x.png", tmp_path / "all" / f"{number}.png")
        split = "train" if number < count else "validation"
        text += f"all/{number}.png,{number // 2},{split}\n"
    config = manifest_config(tmp_path, text)
    config = config.model_copy(update={"check_images": False, "cache_gib": 0.0})
    began = time.monotonic()
    assert load_splits(config).train.num_classes == count // 2
    assert time.monotonic() - began < seconds
