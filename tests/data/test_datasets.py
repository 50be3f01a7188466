"""Images, splits, folders, manifests and the benchmarks' official layouts."""

import functools
import hashlib
import http.server
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import (
    BadImageError,
    FileImages,
    ImageSet,
    check_images,
    hold_out_classes,
    to_square,
)
from ray_dmml.data.datasets import benchmarks, load_splits
from ray_dmml.errors import UserError


def picture(width: int = 12, height: int = 10, seed: int = 0) -> Image.Image:
    """Smooth colours, so that JPEG keeps them."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def save(path: Path, image: Image.Image | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)


class Numbers:
    """An image source that draws its number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"image{index}"

    def read(self, index: int) -> torch.Tensor:
        return torch.full((3, 2, 2), index, dtype=torch.uint8)


def numbered(class_sizes: list[int], query=None, gallery=None) -> ImageSet:
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    names = tuple(f"class{i}" for i in range(len(class_sizes)))
    return ImageSet(Numbers(len(labels)), labels, names, query, gallery)


def names_of(images: ImageSet) -> list[str]:
    return [images.source.name(i) for i in range(len(images))]


# Decoding


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_format_is_decoded(tmp_path, suffix, mode):
    """JPEG, PNG, WEBP, GIF, BMP and TIFF, in colour or grey, give about Pillow's pixels."""
    path = tmp_path / f"x.{suffix}"
    save(path, picture().convert(mode))
    image = FileImages(tmp_path, [path.name], 16).read(0)
    with Image.open(path) as opened:
        wanted = opened.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16) and image.is_contiguous()
    difference = image.permute(1, 2, 0).int() - torch.from_numpy(np.array(wanted)).int()
    assert difference.abs().max() <= 8


@pytest.mark.parametrize(
    ("mode", "suffix"), [("CMYK", "jpg"), ("CMYK", "tif"), ("RGBA", "png"), ("P", "png")]
)
def test_other_colour_modes_become_rgb(tmp_path, mode, suffix):
    """CMYK, RGBA and palette images are RGB afterwards."""
    colour = Image.new("RGB", (8, 8), (200, 40, 90)).convert(mode)
    save(tmp_path / f"x.{suffix}", colour)
    image = FileImages(tmp_path, [f"x.{suffix}"], 8).read(0)
    wanted = torch.tensor(colour.convert("RGB").getpixel((4, 4)))
    assert (image[:, 4, 4].int() - wanted).abs().max() <= 8


def test_sixteen_bit_png_keeps_its_brightness(tmp_path):
    """A PNG of 16 bits a channel is scaled to 8, not cut off."""
    save(tmp_path / "x.png", Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)))
    image = FileImages(tmp_path, ["x.png"], 8).read(0)
    assert image.dtype == torch.uint8 and image.unique().tolist() == [0x80]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_the_first_frame_of_an_animation(tmp_path, suffix):
    """Of an animation the first frame counts."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    save(tmp_path / f"x.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    assert FileImages(tmp_path, [f"x.{suffix}"], 8).read(0).min() >= 250


NO_AVIF = pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")


@pytest.mark.parametrize("form", ["JPEG", "TIFF", pytest.param("AVIF", marks=NO_AVIF)])
def test_exif_orientation_is_applied(tmp_path, form):
    """A photo stored on its side (orientation 6) is read upright, whatever its suffix says."""
    stored = Image.new("RGB", (16, 16), "black")
    stored.paste("white", (0, 0, 8, 16))  # the left half becomes the top
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "x.jpg", stored, format=form, exif=exif)
    image = FileImages(tmp_path, ["x.jpg"], 16).read(0)
    assert image[:, :6].min() > 200 and image[:, 10:].max() < 50


def test_squash_and_crop(tmp_path):
    """`stretch` keeps the sides of a wide image, `center_crop` cuts them and keeps the middle as it is."""
    wide = Image.new("RGB", (48, 16), "red")
    wide.paste("blue", (16, 0, 32, 16))
    save(tmp_path / "x.png", wide)
    squashed = FileImages(tmp_path, ["x.png"], 16, "stretch").read(0)
    cropped = FileImages(tmp_path, ["x.png"], 16, "crop").read(0)
    assert squashed[0, 8, 0] > 250 and squashed[2, 8, 8] > 250
    assert torch.equal(cropped[:, 8, 8], torch.tensor([0, 0, 255], dtype=torch.uint8))
    assert cropped[0].max() == 0
    tall = FileImages(tmp_path, ["x.png"], 8, "crop").read(0)
    assert tall.shape == (3, 8, 8) and tall.is_contiguous()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(8, 24))
def test_any_shape_becomes_a_square(height, width, size):
    """Both aspects give (3, S, S) for any height and width."""
    image = torch.full((3, height, width), 77, dtype=torch.uint8)
    for resize in ("stretch", "center_crop"):
        square = to_square(image, size, resize)
        assert square.shape == (3, size, size) and square.unique().tolist() == [77]


def test_bad_images_are_named_with_the_reason(tmp_path):
    """Missing, empty, truncated and foreign files raise BadImageError with their path."""
    save(tmp_path / "good.jpg", picture(200, 200))
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    save(tmp_path / "whole.png", picture(100, 100))
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    reasons = {
        "cut.jpg": "truncated",
        "cut.png": "truncated|broken",
        "text.jpg": "not an image in a known format",
        "empty.png": "empty",
        "gone.jpg": "No such file",
    }
    images = FileImages(tmp_path, [*reasons, "good.jpg"], 16)
    for index, (name, reason) in enumerate(reasons.items()):
        with pytest.raises(BadImageError, match=rf"image {name} cannot be read: .*({reason})"):
            images.read(index)
    labels = np.zeros(6, dtype=np.int64)
    found = check_images(ImageSet(images, labels, ("all",)), threads=3)
    assert [index for index, _ in found] == [0, 1, 2, 3, 4]
    assert all(name in message for name, (_, message) in zip(reasons, found, strict=True))


# Sets and splits


def test_subset_renumbers_everything():
    """Classes, queries and gallery of a subset (of a subset) still name the same images."""
    images = numbered([2, 3, 2], query=np.array([0, 2, 5]), gallery=np.array([1, 3, 4, 6]))
    cut = images.subset([6, 5, 4, 2, 3])
    assert names_of(cut) == ["image6", "image5", "image4", "image2", "image3"]
    assert cut.class_names == ("class1", "class2") and cut.labels.tolist() == [1, 1, 0, 0, 0]
    assert [cut.source.name(q) for q in cut.query] == ["image2", "image5"]
    assert [cut.source.name(g) for g in cut.gallery] == ["image3", "image4", "image6"]
    again = cut.subset([3, 0])
    assert names_of(again) == ["image2", "image6"]
    assert [again.source.read(i)[0, 0, 0].item() for i in range(2)] == [2, 6]
    assert again.query.tolist() == [0] and again.gallery.tolist() == [1]
    assert numbered([2, 2]).subset([0, 2]).query is None


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(2, 6), min_size=4, max_size=20), st.floats(0.01, 0.9), st.integers(0, 9)
)
def test_held_out_classes_are_disjoint_and_complete(class_sizes, fraction, seed):
    """Both parts together are the whole, no class is in both, and the count is as stated."""
    images = numbered(class_sizes)
    held = max(2, round(fraction * len(class_sizes)))
    if len(class_sizes) - held < 2:
        with pytest.raises(UserError, match=r"data\.validation_fraction=0"):
            hold_out_classes(images, fraction, seed)
        return
    rest, validation = hold_out_classes(images, fraction, seed)
    assert validation.num_classes == held
    assert not set(rest.class_names) & set(validation.class_names)
    assert sorted(names_of(rest) + names_of(validation)) == sorted(names_of(images))
    for part in (rest, validation):
        for index in range(len(part)):
            number = int(part.source.name(index).removeprefix("image"))
            assert part.class_names[part.labels[index]] == f"class{images.labels[number]}"


def test_holding_out_follows_its_seed():
    """The same seed holds out the same classes, another seed others, fraction 0 none."""
    images = numbered([3] * 30)
    chosen = [hold_out_classes(images, 0.3, seed)[1].class_names for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert hold_out_classes(images, 0.0, 0) == (images, None)
    with pytest.raises(UserError, match="cannot be judged"):
        hold_out_classes(numbered([1] * 10), 0.2, 0)


# Image folders


def make_folder(root: Path, classes: int = 6, each: int = 3) -> None:
    for c in range(classes):
        for i in range(each):
            save(root / f"c{c}" / f"{i}.png", picture(seed=10 * c + i))


def folder_config(root: Path, **changes: object) -> DataConfig:
    settings = {"name": "imagefolder", "root": root, "decode_size": 8, "validation_fraction": 0}
    return DataConfig.model_validate({**settings, **changes})


def test_imagefolder_splits_by_class_in_name_order(tmp_path):
    """The first half of the classes trains; nested, upper-case and hidden files are as promised."""
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
    """split_seed draws the training classes; train_fraction says how many."""
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
    """A missing root, too few classes, an empty class and a bad fraction each say so."""
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


def test_unreadable_images_fail_or_are_skipped(tmp_path):
    """`fail` names the first; `skip` leaves all out, says so, and hands the names to other loaders."""
    make_folder(tmp_path)
    for name in ("c1/1.png", "c4/0.png"):
        (tmp_path / name).write_text("broken")
    with pytest.raises(UserError, match=r"image c1/1\.png cannot .*1 more.*on_bad_image=skip"):
        load_splits(folder_config(tmp_path))
    said: list[str] = []
    first = load_splits(folder_config(tmp_path, on_bad_image="skip"), said.append)
    assert first.skipped == ("c1/1.png", "c4/0.png")
    assert any("left out 2" in line and "c1/1.png" in line for line in said)
    assert len(first.train) == 8 and len(first.test) == 8
    second = load_splits(folder_config(tmp_path), skip=frozenset(first.skipped), check=False)
    assert second.skipped == first.skipped
    assert names_of(second.train) == names_of(first.train)
    assert np.array_equal(second.test.labels, first.test.labels)
    unchecked = load_splits(folder_config(tmp_path, check_images=False))
    assert len(unchecked.train) == 9


# Manifests


def manifest_config(tmp_path: Path, text: str, **changes: object) -> DataConfig:
    """Writes the manifest and every image it names below a, b or c."""
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
HEAD = "path,label,split,is_query,is_gallery\n"


def test_manifest_query_and_gallery(tmp_path):
    """Flags as 0/1, True/False or 1.0/0.0 say what is query and gallery; a byte-order mark is fine."""
    rows = "b/1.png,x,validation,1,0\nb/2.png,x,validation,False,True\n"
    rows += "b/3.png,y,validation,1.0,1.0\nb/4.png,y,validation,0.0,1\nb/5.png,y,validation,,\n"
    splits = load_splits(manifest_config(tmp_path, "\ufeff" + HEAD + TRAIN + rows))
    assert splits.train.class_names == ("9", "10")  # numbers in numeric order
    assert splits.train.labels.tolist() == [0, 0, 1, 1]
    assert names_of(splits.test) == [f"b/{i}.png" for i in range(1, 6)]
    assert splits.test.query.tolist() == [0, 2] and splits.test.gallery.tolist() == [1, 2, 3]


def test_flags_of_training_rows_count_once_they_are_held_out(tmp_path):
    """Held-out training classes are judged by the protocol that their own rows state."""
    train = "".join(
        f"a/{c}{i}.png,{c},train,{int(i == 0)},{int(i > 0)}\n" for c in "pqrs" for i in range(3)
    )
    test = "b/1.png,x,validation,1,0\nb/2.png,x,validation,0,1\nb/3.png,y,validation,0,1\n"
    config = manifest_config(tmp_path, HEAD + train + test, validation_fraction=0.5)
    validation = load_splits(config).validation
    assert [names_of(validation)[i][-5] for i in validation.query] == ["0", "0"]
    assert [names_of(validation)[i][-5] for i in validation.gallery] == ["1", "2", "1", "2"]
    lonely = train.replace(",0,1\n", ",0,0\n")  # queries, and nothing to find
    with pytest.raises(UserError, match="in the gallery"):
        load_splits(manifest_config(tmp_path, HEAD + lonely + test, validation_fraction=0.5))


@pytest.mark.parametrize("flags", ["", ",,"])
def test_manifest_without_flags_is_all_against_all(tmp_path, flags):
    """Columns that are absent or empty mean all against all; other columns are ignored."""
    text = "path,label,split" + (",is_query,is_gallery" if flags else "") + ",colour\n"
    for i, row in enumerate(["p,train", "p,train", "q,train", "q,train"]):
        text += f"a/{i}.png,{row}{flags},red\n"
    for i, row in enumerate(["x,validation", "x,validation", "y,validation"]):
        text += f"{tmp_path}/b/{i}.png,{row}{flags},red\n"  # absolute, inside the root
        save(tmp_path / f"b/{i}.png")
    splits = load_splits(manifest_config(tmp_path, text))
    assert splits.test.query is None and splits.test.gallery is None
    assert names_of(splits.test) == ["b/0.png", "b/1.png", "b/2.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,split\na/1.png,train\n", "no column 'label'"),
        ("", "no column 'path'"),
        (HEAD, "no rows of split 'train'"),
        (HEAD + TRAIN, "no rows of split 'validation'"),
        (HEAD + "a/1.png,9,test,,\n", "line 2: split is 'test'; allowed: train, validation"),
        (HEAD + TRAIN + "a/9.png,9,validation,,\n", "label '9' is in both splits"),
        (HEAD + "a/1.png,9,train,,\n../x.png,9,train,,\n", r"line 3: \.\./x\.png is outside"),
        (HEAD + "/etc/passwd,9,train,,\n", "line 2: /etc/passwd is outside"),
        (HEAD + TRAIN + "a/./1.png,9,train,,\n", "line 6: a/1.png is listed a second time"),
        (HEAD + TRAIN + "z/1.png,x,validation,,\nz/2.png,x,validation,,\n", "lists z/1.png.*2 files"),
        (HEAD + "a/1.png,9,train,maybe,\n", "line 2: is_query is 'maybe'"),
        (HEAD + "a/1.png,,train,,\n", "line 2: label is empty"),
        (
            HEAD + TRAIN + "b/1.png,x,validation,1,\nb/2.png,y,validation,,1\n",
            "no test image has another of its class to find",
        ),
        (
            HEAD + TRAIN + "b/1.png,x,validation,1,1\nb/2.png,y,validation,1,1\n",
            "no test image has another of its class to find",
        ),
        (HEAD + TRAIN + "b/1.png,x,validation,,\nb/2.png,x,validation,,\n", "test .* of 1 classes"),
    ],
)  # fmt: skip
def test_manifest_mistakes_are_named(tmp_path, text, message):
    """Every mistake is told with the line or the file it is in."""
    with pytest.raises(UserError, match=message):
        load_splits(manifest_config(tmp_path, text))


def test_manifest_that_cannot_be_read(tmp_path):
    """A missing manifest and one that is no text are the user's to mend."""
    config = manifest_config(tmp_path, HEAD, manifest=tmp_path / "other.csv")
    with pytest.raises(UserError, match=r"other\.csv cannot be read: No such file"):
        load_splits(config)
    (tmp_path / "other.csv").write_bytes(b"path,label,split\n\xff\xfe,1,train\n")
    with pytest.raises(UserError, match="not a CSV file in UTF-8"):
        load_splits(config)


# Benchmarks in their official layout


def benchmark(name: str, root: Path, said: list[str] | None = None, **changes: object):
    """(train, test) through the public door."""
    settings = {"name": name, "root": root, "decode_size": 8, "validation_fraction": 0}
    config = DataConfig.model_validate({**settings, "download": False, **changes})
    splits = load_splits(config, (said if said is not None else []).append)
    return splits.train, splits.test


def make_cub(root: Path) -> None:
    """Four classes around the border at class 100, two images each."""
    folder = root / "CUB_200_2011"
    classes = {1: "001.Albatross", 100: "100.Pelican", 101: "101.White_Pelican", 200: "200.Wren"}
    paths = [(c, f"{name}/{name}_{i}.png") for c, name in classes.items() for i in range(2)]
    for _, path in paths:
        save(folder / "images" / path)
    lines = list(enumerate(paths, start=1))
    (folder / "images.txt").write_text("".join(f"{i} {p}\n" for i, (_, p) in lines))
    (folder / "image_class_labels.txt").write_text("".join(f"{i} {c}\n" for i, (c, _) in lines))
    (folder / "classes.txt").write_text("".join(f"{c} {n}\n" for c, n in classes.items()))
    # Its own split is within classes: it must play no part.
    (folder / "train_test_split.txt").write_text("".join(f"{i} {i % 2}\n" for i, _ in lines))


@pytest.mark.parametrize("inside", ["", "CUB_200_2011"])
def test_cub_splits_at_class_100(tmp_path, inside):
    """Classes 1-100 train, 101-200 test, from the folder or the one around it; counts are remarked."""
    make_cub(tmp_path)
    said: list[str] = []
    train, test = benchmark("cub200", tmp_path / inside, said)
    assert train.class_names == ("001.Albatross", "100.Pelican")
    assert test.class_names == ("101.White_Pelican", "200.Wren")
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1]
    assert names_of(train)[0] == "images/001.Albatross/001.Albatross_0.png"
    assert any("warning" in line and "5864 train images of 100 classes" in line for line in said)


CARS = [(1, "000001"), (98, "000002"), (99, "000003"), (196, "000004"), (98, "000005"), (99, "6")]


def cars_struct(paths: str, field: str, rows: list[tuple[int, str]]) -> np.ndarray:
    dtype = [(field, object), ("bbox_x1", object), ("class", object)]
    return np.array([(f"{paths}{name}.png", 3, label) for label, name in rows], dtype=dtype)


def test_cars_splits_at_class_98(tmp_path):
    """Classes 1-98 of cars_annos.mat train, 99-196 test, whatever its own test flag says."""
    for _, name in CARS:
        save(tmp_path / "car_ims" / f"{name}.png")
    names = np.array([f"Car {i}" for i in range(1, 197)], dtype=object)
    scipy.io.savemat(
        tmp_path / "cars_annos.mat",
        {"annotations": cars_struct("car_ims/", "relative_im_path", CARS), "class_names": names},
    )
    train, test = benchmark("cars196", tmp_path)
    assert train.class_names == ("Car 1", "Car 98") and test.class_names == ("Car 99", "Car 196")
    assert names_of(train) == [f"car_ims/{n}.png" for n in ("000001", "000002", "000005")]
    assert test.labels.tolist() == [0, 1, 0]


def test_cars_in_torchvisions_layout(tmp_path):
    """The layout of torchvision's StanfordCars gives the same classes from both of its folders."""
    root = tmp_path / "stanford_cars"
    (root / "devkit").mkdir(parents=True)
    names = np.array([f"Car {i}" for i in range(1, 197)], dtype=object)
    scipy.io.savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    for folder, file, rows in (
        ("cars_train", "devkit/cars_train_annos.mat", CARS[:3]),
        ("cars_test", "cars_test_annos_withlabels.mat", CARS[3:]),
    ):
        scipy.io.savemat(root / file, {"annotations": cars_struct("", "fname", rows)})
        for _, name in rows:
            save(root / folder / f"{name}.png")
    train, test = benchmark("cars196", tmp_path)
    assert train.class_names == ("Car 1", "Car 98") and test.class_names == ("Car 99", "Car 196")
    assert names_of(test) == ["cars_train/000003.png", "cars_test/000004.png", "cars_test/6.png"]


@pytest.mark.parametrize("inside", ["", "Stanford_Online_Products"])
def test_sop_follows_its_lists(tmp_path, inside):
    """Ebay_train.txt trains and Ebay_test.txt tests."""
    folder = tmp_path / "Stanford_Online_Products"
    head = "image_id class_id super_class_id path\n"
    for file, first in (("Ebay_train.txt", 1), ("Ebay_test.txt", 11319)):
        text = head
        for c in (first, first + 1):
            for i in range(2):
                text += f"{2 * c + i} {c} 1 chair_final/{c}_{i}.PNG\n"
                save(folder / "chair_final" / f"{c}_{i}.PNG")
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    train, test = benchmark("sop", tmp_path / inside)
    assert train.class_names == ("1", "2") and test.class_names == ("11319", "11320")
    assert names_of(test) == [f"chair_final/{c}_{i}.PNG" for c in (11319, 11320) for i in (0, 1)]


@pytest.mark.parametrize(("eval_folder", "image_folder"), [("", ""), ("Eval", "Img")])
def test_inshop_has_query_and_gallery(tmp_path, eval_folder, image_folder):
    """list_eval_partition.txt says what trains, asks and answers, in Eval/ or beside img/."""
    rows = [("1", "train"), ("1", "train"), ("4", "train"), ("4", "train"), ("2", "query"),
            ("2", "gallery"), ("3", "gallery"), ("3", "query"), ("3", "gallery")]  # fmt: skip
    text = f"{len(rows)}\nimage_name item_id evaluation_status\n"
    for i, (item, status) in enumerate(rows):
        path = f"img/WOMEN/Dresses/id_0000000{item}/{i}_front.png"
        text += f"{path}   id_0000000{item}   {status}\n"
        save(tmp_path / image_folder / path)
    (tmp_path / eval_folder).mkdir(exist_ok=True)
    (tmp_path / eval_folder / "list_eval_partition.txt").write_text(text)
    train, test = benchmark("inshop", tmp_path)
    assert train.class_names == ("id_00000001", "id_00000004")
    assert test.class_names == ("id_00000002", "id_00000003")
    assert [Path(test.source.name(q)).name[0] for q in test.query] == ["4", "7"]
    assert [Path(test.source.name(g)).name[0] for g in test.gallery] == ["5", "6", "8"]
    assert test.labels[test.query].tolist() == [0, 1]
    assert test.labels[test.gallery].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("cub200", "CUB_200_2011/images.txt"),
        ("cars196", "cars_annos.mat and car_ims/"),
        ("sop", "Stanford_Online_Products/Ebay_train.txt"),
        ("inshop", "list_eval_partition.txt"),
    ],
)
def test_a_missing_benchmark_says_what_to_do(tmp_path, name, layout):
    """The message has where it should be, where it comes from and how it should lie there."""
    with pytest.raises(UserError, match=layout) as error:
        benchmark(name, tmp_path)
    assert str(tmp_path) in str(error.value) and "https://" in str(error.value)


def test_a_half_unpacked_benchmark_says_what_is_missing(tmp_path):
    """A list that is not there, or not in the format, is named."""
    make_cub(tmp_path)
    (tmp_path / "CUB_200_2011" / "image_class_labels.txt").write_text("1\n2\n")
    with pytest.raises(UserError, match=r"image_class_labels\.txt has a line without 2 columns"):
        benchmark("cub200", tmp_path)
    (tmp_path / "CUB_200_2011" / "image_class_labels.txt").unlink()
    with pytest.raises(UserError, match=r"image_class_labels\.txt is missing"):
        benchmark("cub200", tmp_path)


# Fetching


@pytest.fixture
def served_cub(tmp_path) -> Iterator[benchmarks.Archive]:
    """A tiny CUB archive behind a web server on this machine."""
    make_cub(tmp_path / "made")
    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "cub.tgz", "w:gz") as archive:
        archive.add(tmp_path / "made" / "CUB_200_2011", "CUB_200_2011")
    md5 = hashlib.md5((served / "cub.tgz").read_bytes()).hexdigest()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/cub.tgz"
        yield benchmarks.Archive(url, md5, "cub.tgz")
        server.shutdown()


def load_cub(root: Path, archive: benchmarks.Archive, download: bool = True):
    return benchmarks.load("cub200", root, download, 8, "stretch", lambda line: None, archive)


def test_cub_is_fetched_once(tmp_path, served_cub):
    """A missing data set is fetched, checked, unpacked, left without traces, and found again."""
    root = tmp_path / "new" / "root"
    with pytest.raises(UserError, match=r"is not in data\.root"):
        load_cub(root, served_cub, download=False)
    train, test = load_cub(root, served_cub)
    assert len(train) == len(test) == 4 and train.source.read(0).shape == (3, 8, 8)
    assert [path.name for path in root.iterdir()] == ["CUB_200_2011"]
    gone = benchmarks.Archive(served_cub.url + ".gone", served_cub.md5, "cub.tgz")
    assert names_of(load_cub(root, gone)[0]) == names_of(train)


def test_an_archive_fetched_by_hand_is_used(tmp_path, served_cub):
    """An archive that already lies in the root, intact, is unpacked without the network."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "cub.tgz").write_bytes((tmp_path / "served" / "cub.tgz").read_bytes())
    gone = benchmarks.Archive("http://127.0.0.1:9/cub.tgz", served_cub.md5, "cub.tgz")
    assert len(load_cub(root, gone)[0]) == 4


def test_a_failed_fetch_leaves_nothing(tmp_path, served_cub):
    """A wrong checksum and a dead link are told with the URL and the layout; nothing is left."""
    root = tmp_path / "root"
    wrong = benchmarks.Archive(served_cub.url, "0" * 32, "cub.tgz")
    gone = benchmarks.Archive(served_cub.url + ".gone", served_cub.md5, "cub.tgz")
    for archive in (wrong, gone):
        with pytest.raises(UserError, match=r"could not be fetched.*by hand: unpack") as error:
            load_cub(root, archive)
        assert archive.url in str(error.value)
        assert list(root.iterdir()) == []


@given(st.integers(6, 40), st.sampled_from([0.1, 0.2, 0.25, 0.34, 0.5]), st.integers(0, 5))
def test_folds_hold_out_every_class(num_classes: int, fraction: float, seed: int) -> None:
    """One after the other they go through all classes, and all but the last share none."""
    images = numbered([2] * num_classes)
    held: list[set[str]] = []
    while len(set().union(*held)) < num_classes:
        rest, validation = hold_out_classes(images, fraction, seed, len(held))
        assert validation is not None
        assert not set(rest.class_names) & set(validation.class_names)
        assert len(rest.class_names) + len(validation.class_names) == num_classes
        held.append(set(validation.class_names))
        assert len(held) <= num_classes
    size = max(2, round(fraction * num_classes))
    assert len(held) == -(-num_classes // size)
    whole = held[: num_classes // size]
    assert sum(map(len, whole)) == len(set().union(*whole))
