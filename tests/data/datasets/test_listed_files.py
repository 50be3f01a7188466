"""Labels and paths of manifests as people have them: any text, through links, in another Unicode form."""

from __future__ import annotations

import csv
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import ImageSet, Splits
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError

NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "white").save(path)


def load(root: Path, paths: list[str], labels: list[str]) -> Splits:
    """A manifest of these rows: the first half trains."""
    manifest = root.parent / "m.csv"
    with manifest.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split"])
        half = len(paths) // 2
        for number, (path, label) in enumerate(zip(paths, labels, strict=True)):
            table.writerow([path, label, "train" if number < half else "validation"])
    config = {"name": "manifest", "root": root, "manifest": manifest, "decode_size": 8, "validation_fraction": 0}
    return load_splits(DataConfig.model_validate({**config, "check_images": False, "cache_gib": 0}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """0.png to 7.png."""
    for number in range(8):
        save(tmp_path / "root" / f"{number}.png")
    return tmp_path / "root"


PATHS = [f"{number}.png" for number in range(8)]
LABELS = list("aabbccdd")


def names_of(images: ImageSet) -> list[str]:
    return [images.source.name(index) for index in range(len(images))]


@pytest.mark.parametrize(
    "label", ["nan", "NaN", "null", "None", "NA", "True", "0", "-1", "1e5", "#N/A", "'", "a,b\nc", "🦄"]
)
def test_any_text_is_a_label(root: Path, label: str) -> None:
    """Other readers of tables would make a gap or a number of it."""
    train = load(root, PATHS, [label if each == "a" else each for each in LABELS]).train
    assert label in train.class_names and train.labels.tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(label=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_odd_labels_are_labels_or_one_sentence(root: Path, label: str) -> None:
    """Control characters, any script, any number of digits."""
    try:
        train = load(root, PATHS, [label if each == "a" else each for each in LABELS]).train
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    assert sorted(train.labels.tolist()) in ([0, 0, 1, 1], [0] * 4)


@pytest.mark.parametrize("label", ["x" * 100_000, "7" * 10_000, "²", "٣" * 5])
def test_long_and_odd_numbers_are_labels(root: Path, label: str) -> None:
    """Python refuses to convert more than 4,300 digits."""
    names = ["12", "9", label]
    labels = ["12", "12", "9", "9", label, label, "13", "13"]
    splits = load(root, PATHS, labels)
    assert splits.train.class_names == ("9", "12") and label in splits.test.class_names
    assert len(splits.train.class_names) == len(names) - 1


def test_labels_of_two_unicode_forms_are_one(root: Path) -> None:
    """They look the same."""
    splits = load(root, PATHS, [f"caf{NFC}", f"caf{NFD}", "b", "b", "c", "c", "d", "d"])
    assert splits.train.class_names == ("b", f"caf{NFC}") and splits.train.labels.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(("disk", "listed"), [(NFC, NFD), (NFD, NFC)])
def test_a_name_in_another_unicode_form_is_found(root: Path, disk: str, listed: str) -> None:
    """A Mac wrote the list, and the photos are on Linux, or the other way round."""
    save(root / f"ol{disk}" / "deep" / f"{disk}.png")
    splits = load(root, [f"ol{listed}/deep/{listed}.png", *PATHS[1:]], LABELS)
    assert names_of(splits.train)[0] == f"ol{disk}/deep/{disk}.png" and splits.train.source.read(0).min() == 255
    with pytest.raises(UserError, match="listed a second time"):
        load(root, [f"ol{listed}/deep/{listed}.png", f"ol{disk}/deep/{disk}.png", *PATHS[2:]], LABELS)
    with pytest.raises(UserError, match="1 files are missing"):
        load(root, [f"ol{listed}/{listed}.png", *PATHS[1:]], LABELS)


def test_two_files_that_differ_in_unicode_form_are_two(root: Path) -> None:
    """If each is listed as it is written on disk."""
    for form in (NFC, NFD):
        save(root / f"{form}.png")
    assert names_of(load(root, [f"{NFC}.png", f"{NFD}.png", *PATHS[2:]], LABELS).train)[:2] == [
        f"{NFC}.png",
        f"{NFD}.png",
    ]


def test_absolute_paths_through_links_are_used(root: Path, tmp_path: Path) -> None:
    """The list may have been written under another name of the root, of a folder above it, or in it."""
    save(root / "sub" / "x.png")
    (tmp_path / "photos").symlink_to(root)
    (tmp_path / "above").symlink_to(tmp_path)
    (tmp_path / "part").symlink_to(root / "sub")
    paths = [f"{tmp_path}/photos/0.png", f"{tmp_path}/above/root/1.png", f"{tmp_path}/part/x.png", f"{root}/3.png"]
    assert names_of(load(root, [*paths, *PATHS[4:]], LABELS).train) == ["0.png", "1.png", "sub/x.png", "3.png"]
    # data.root may be the link, and the list have the folder.
    splits = load(tmp_path / "photos", [f"{root}/0.png", *PATHS[1:]], LABELS)
    assert names_of(splits.train)[0] == "0.png" and splits.train.source.read(0).min() == 255


def test_a_link_that_leads_elsewhere_is_outside(root: Path, tmp_path: Path) -> None:
    """It does not end in the root."""
    save(tmp_path / "other" / "x.png")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    for path in (f"{tmp_path}/link/x.png", f"{tmp_path}/rooted/x.png"):
        with pytest.raises(UserError, match=r"line 2: .* is outside data\.root"):
            load(root, [path, *PATHS[1:]], LABELS)


@pytest.mark.parametrize("path", ["", " ", ".", "sub", "/"])
def test_what_names_no_file_is_one_sentence(root: Path, path: str) -> None:
    """With the line or the path."""
    (root / "sub").mkdir()
    with pytest.raises(UserError, match=r"line 2: path is empty|is outside data\.root|which is not in") as caught:
        load(root, [path, *PATHS[1:]], LABELS)
    assert "\n" not in str(caught.value)
