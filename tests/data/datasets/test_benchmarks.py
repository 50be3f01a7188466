"""The benchmarks in their official layouts, and the download of CUB-200-2011."""

from __future__ import annotations

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
from PIL import Image

from ray_dmml.config.schema import DataConfig
from ray_dmml.data.dataset import ImageSet
from ray_dmml.data.datasets import benchmarks, load_splits
from ray_dmml.errors import UserError


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10)).save(path)


def names_of(images: ImageSet) -> list[str]:
    return [images.source.name(i) for i in range(len(images))]


def benchmark(name: str, root: Path) -> tuple[ImageSet, ImageSet]:
    """(train, test)."""
    settings = {"name": name, "root": root, "decode_size": 8, "validation_fraction": 0}
    splits = load_splits(DataConfig.model_validate({**settings, "download": False}))
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
def test_cub_splits_at_class_100(tmp_path: Path, inside: str, caplog: pytest.LogCaptureFixture) -> None:
    """Classes 1-100 train, 101-200 test, from the folder or the one around it. Other counts warn."""
    make_cub(tmp_path)
    train, test = benchmark("cub200", tmp_path / inside)
    assert train.class_names == ("001.Albatross", "100.Pelican")
    assert test.class_names == ("101.White_Pelican", "200.Wren")
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1]
    assert names_of(train)[0] == "images/001.Albatross/001.Albatross_0.png"
    (record,) = (record for record in caplog.records if "official numbers" in record.message)
    assert record.levelname == "WARNING" and "5864 train images of 100 classes" in record.message


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
    """list_eval_partition.txt, in Eval/ or beside img/, lists training images, queries and gallery."""
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
    """The message has the folder, where to get the data set, and where to put its files."""
    with pytest.raises(UserError, match=layout) as error:
        benchmark(name, tmp_path)
    assert str(tmp_path) in str(error.value) and "https://" in str(error.value)


def test_a_half_unpacked_benchmark_says_what_is_missing(tmp_path):
    """A list that is missing or in another format is named."""
    make_cub(tmp_path)
    (tmp_path / "CUB_200_2011" / "image_class_labels.txt").write_text("1\n2\n")
    with pytest.raises(UserError, match=r"image_class_labels\.txt has a line without 2 columns"):
        benchmark("cub200", tmp_path)
    (tmp_path / "CUB_200_2011" / "image_class_labels.txt").unlink()
    with pytest.raises(UserError, match=r"image_class_labels\.txt is missing"):
        benchmark("cub200", tmp_path)


@pytest.fixture
def served_cub(tmp_path) -> Iterator[benchmarks.Archive]:
    """A tiny CUB archive on a web server of this machine."""
    make_cub(tmp_path / "made")
    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "cub.tgz", "w:gz") as archive:
        archive.add(tmp_path / "made" / "CUB_200_2011", "CUB_200_2011")
    md5 = hashlib.md5((served / "cub.tgz").read_bytes()).hexdigest()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/cub.tgz"
        yield benchmarks.Archive(url, md5)
        server.shutdown()


def load_cub(root: Path, archive: benchmarks.Archive, download: bool = True):
    return benchmarks.load(DataConfig(name="cub200", root=root, download=download, decode_size=8), root, archive)


def test_cub_is_fetched_once(tmp_path, served_cub):
    """A missing data set is downloaded, verified and unpacked, and not downloaded again."""
    root = tmp_path / "new" / "root"
    with pytest.raises(UserError, match=r"is not in data\.root"):
        load_cub(root, served_cub, download=False)
    train, test = load_cub(root, served_cub)
    assert len(train) == len(test) == 4 and train.source.read(0).shape == (3, 8, 8)
    assert [path.name for path in root.iterdir()] == ["CUB_200_2011"]
    gone = benchmarks.Archive(served_cub.url + ".gone", served_cub.md5)
    assert names_of(load_cub(root, gone)[0]) == names_of(train)


def test_an_archive_fetched_by_hand_is_used(tmp_path, served_cub):
    """An archive that already lies in the root, intact, is unpacked without the network."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "cub.tgz").write_bytes((tmp_path / "served" / "cub.tgz").read_bytes())
    gone = benchmarks.Archive("http://127.0.0.1:9/cub.tgz", served_cub.md5)
    assert len(load_cub(root, gone)[0]) == 4


def test_a_failed_fetch_leaves_nothing(tmp_path, served_cub):
    """After a wrong checksum or a dead link nothing is left; the message has URL and layout."""
    root = tmp_path / "root"
    wrong = benchmarks.Archive(served_cub.url, "0" * 32)
    gone = benchmarks.Archive(served_cub.url + ".gone", served_cub.md5)
    for archive in (wrong, gone):
        with pytest.raises(UserError, match=r"could not be downloaded.*by hand: unpack") as error:
            load_cub(root, archive)
        assert archive.url in str(error.value)
        assert list(root.iterdir()) == []
