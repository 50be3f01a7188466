"""The cache of decoded images: the same pixels to the bit, whatever happens to its file."""

from __future__ import annotations

import gc
import hashlib
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny, write_image
from filelock import FileLock
from torch import Tensor

from ray_dmml.config.schema import Config, DataConfig
from ray_dmml.data import cache
from ray_dmml.data.cache import HEADER_BYTES, CachedImages, record_bytes
from ray_dmml.data.dataset import BadImageError, Splits
from ray_dmml.data.datasets import load_splits

SIDE = 36
RECORD = record_bytes(SIDE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """4 classes of 3 images."""
    rng = np.random.default_rng(1)
    for label in range(4):
        for image in range(3):
            write_image(tmp_path / "images" / f"class{label}" / f"{image}.png", rng, label)
    return tmp_path / "images"


def settings(folder: Path, **changes: object) -> DataConfig:
    data = {
        "validation_fraction": 0,
        "classes_per_batch": 2,
        "cache_dir": str(folder.parent / "kept"),
        "check_images": False,
        **changes,
    }
    return Config.parse(tiny(folder, data=data)).data


def every_image(splits: Splits) -> list[Tensor]:
    return [images.source.read(i) for images in (splits.train, splits.test) for i in range(len(images))]


def same(images: list[Tensor], expected: list[Tensor]) -> bool:
    return len(images) == len(expected) > 0 and all(map(torch.equal, images, expected))


def uncached(folder: Path) -> list[Tensor]:
    return every_image(load_splits(settings(folder, cache_gib=0)))


def the_file(folder: Path) -> Path:
    (file,) = (folder.parent / "kept").glob("*.images")
    return file


@contextmanager
def no_decoding() -> Iterator[None]:
    """Inside the block an image that has to be decoded fails the test."""

    def refuse(path: Path) -> Tensor:
        raise AssertionError(f"{path} was decoded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_dmml.data.dataset.decode", refuse)
        yield


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes of a file fail, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_cached_images_are_the_decoded_ones_and_are_decoded_once(folder: Path) -> None:
    """This holds while the cache fills, when it is full, for the next run, and for another split."""
    expected = uncached(folder)
    assert not (folder.parent / "kept").exists()
    first = load_splits(settings(folder))
    assert same(every_image(first), expected)
    with no_decoding():
        assert same(every_image(first), expected)
        assert same(every_image(load_splits(settings(folder))), expected)
        drawn = every_image(load_splits(settings(folder, split_seed=3)))
        assert {image.numpy().tobytes() for image in drawn} == {image.numpy().tobytes() for image in expected}
        with pytest.raises(BadImageError, match="was decoded"):
            uncached(folder)


def test_checking_the_images_fills_the_cache(folder: Path) -> None:
    """The pass that looks for corrupt files decodes each image, and nothing decodes it again."""
    expected = uncached(folder)
    splits = load_splits(settings(folder, check_images=True))
    with no_decoding():
        assert same(every_image(splits), expected)


def test_a_changed_or_removed_file_is_noticed(folder: Path) -> None:
    """An image replaced by another, even of the same size and time, is decoded again; one that is
    gone is named."""
    every_image(load_splits(settings(folder)))
    replaced = folder / "class0" / "1.png"
    before = replaced.stat()
    write_image(replaced, np.random.default_rng(9), 3)
    replaced.write_bytes(replaced.read_bytes().ljust(before.st_size, b"\0")[: before.st_size])
    os.utime(replaced, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = load_splits(settings(folder, on_bad_image="fail"))
    images = every_image(again)
    assert same(images, uncached(folder))
    late = load_splits(settings(folder))
    (folder / "class0" / "0.png").unlink()
    with pytest.raises(BadImageError, match=r"class0/0\.png cannot be read: No such file"):
        late.train.source.read(0)


def test_a_record_that_changes_under_a_reader_is_checked_again(folder: Path) -> None:
    """Half a record of another process is not an image, even if this process has read the slot before."""
    splits = load_splits(settings(folder))
    expected = every_image(splits)
    with the_file(folder).open("r+b") as file:
        file.seek(HEADER_BYTES + 2000)
        file.write(b"half of another image")
    assert same(every_image(splits), expected)
    with no_decoding():
        assert same(every_image(splits), expected)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: os.truncate(f, f.stat().st_size - 1),
        lambda f: os.truncate(f, 10),
        lambda f: os.truncate(f, 0),
        lambda f: f.write_bytes(f.read_bytes().replace(b"ray-dmml images\n", b"ray-dmml images\n0")),
        lambda f: f.write_bytes(b"another program's".ljust(f.stat().st_size, b"\0")),
    ],
)
def test_a_cut_or_foreign_file_is_noticed_and_made_again(
    folder: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    """There is one warning, the images are right, and the next run has nothing to warn of."""
    expected = uncached(folder)
    every_image(load_splits(settings(folder)))
    size = the_file(folder).stat().st_size
    damage(the_file(folder))
    assert same(every_image(load_splits(settings(folder))), expected)
    (message,) = caplog.messages
    assert f"{the_file(folder)} is damaged or cut short: its images are decoded again" in message
    assert the_file(folder).stat().st_size == size
    caplog.clear()
    with no_decoding():
        assert same(every_image(load_splits(settings(folder))), expected)
    assert not caplog.messages


def test_damaged_records_are_decoded_again_and_mended(folder: Path) -> None:
    """Bits may be flipped, or only the beginning of a record was written."""
    expected = uncached(folder)
    every_image(load_splits(settings(folder)))
    content = bytearray(the_file(folder).read_bytes())
    content[HEADER_BYTES + 100] ^= 1  # of the first record's pixels
    content[HEADER_BYTES + RECORD + 3] ^= 1  # of the second's checksum
    content[HEADER_BYTES + 2 * RECORD + 500 : HEADER_BYTES + 3 * RECORD] = bytes(RECORD - 500)
    the_file(folder).write_bytes(content)
    assert same(every_image(load_splits(settings(folder))), expected)
    with no_decoding():
        assert same(every_image(load_splits(settings(folder))), expected)


def test_a_file_cut_short_under_a_running_process_does_it_no_harm(folder: Path) -> None:
    """Missing records are decoded again, and no read beyond the end kills the process."""
    splits = load_splits(settings(folder))
    expected = every_image(splits)
    os.truncate(the_file(folder), HEADER_BYTES + RECORD + 7)
    assert same(every_image(splits), expected)


def _digest(config: DataConfig, together: Any) -> str:
    """The digest of all images, several times from an empty folder; in a process of its own."""
    digest = hashlib.sha256()
    for _ in range(20):
        together.wait(60)
        splits = load_splits(config)
        for image in every_image(splits):
            digest.update(image.numpy().tobytes())
        together.wait(60)
        shutil.rmtree(config.cache_dir or "", ignore_errors=True)
    return digest.hexdigest()


@pytest.mark.ray
def test_processes_that_build_it_at_once_agree(folder: Path) -> None:
    """Three processes that start on an empty folder at once, twenty times, read the same images."""
    expected = _digest(settings(folder, cache_gib=0), Barrier(1))
    context = get_context("forkserver")
    context.set_forkserver_preload(["torchvision.io", "ray_dmml.data.datasets"])
    with context.Manager() as manager, ProcessPoolExecutor(3, mp_context=context) as pool:
        together = manager.Barrier(3)
        calls = [pool.submit(_digest, settings(folder), together) for _ in range(3)]
        assert [call.result() for call in calls] == [expected] * 3


def gib(num_images: int) -> float:
    """The size of a cache file of so many images."""
    return (HEADER_BYTES + num_images * RECORD) / 2**30


def test_a_data_set_that_does_not_fit_is_not_cached(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There is one warning with the name of the setting; other data sets keep their files."""
    expected = uncached(folder)
    every_image(load_splits(settings(folder, cache_gib=gib(12), resize="center_crop")))
    other = the_file(folder)
    gc.collect()
    splits = load_splits(settings(folder, cache_gib=gib(11)))
    assert same(every_image(splits), expected)
    assert not isinstance(splits.train.source, CachedImages)
    assert the_file(folder) == other
    (message,) = caplog.messages
    assert "data.cache_gib" in message and "the run goes on" in message


def test_a_file_in_use_is_not_removed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another data set gets no cache while the first is read, and takes its place afterwards."""
    splits = load_splits(settings(folder, cache_gib=gib(12)))
    assert same(every_image(splits), uncached(folder))
    first = the_file(folder)
    assert first.stat().st_size == HEADER_BYTES + 12 * RECORD and not caplog.messages
    # The same images with another resize are another data set.
    cropped = load_splits(settings(folder, cache_gib=gib(12), resize="center_crop"))
    assert len(caplog.messages) == 1 and "data.cache_gib" in caplog.messages[0]
    assert not isinstance(cropped.train.source, CachedImages) and the_file(folder) == first
    del splits, cropped
    gc.collect()
    every_image(load_splits(settings(folder, cache_gib=gib(12), resize="center_crop")))
    assert the_file(folder) != first and len(caplog.messages) == 1


def test_a_lower_limit_removes_the_file(folder: Path) -> None:
    """It stays while it is in use."""
    splits = load_splits(settings(folder, cache_gib=gib(12)))
    file = the_file(folder)
    load_splits(settings(folder, cache_gib=gib(3)))
    assert file.exists()
    del splits
    gc.collect()
    load_splits(settings(folder, cache_gib=gib(3)))
    assert not file.exists()


def test_of_two_the_longest_unused_makes_room(folder: Path) -> None:
    """Three data sets under a limit for two: the two that were used last stay."""
    limit = 2 * gib(12)
    files = []
    for number, resize in enumerate(("stretch", "center_crop")):
        load_splits(settings(folder, cache_gib=limit, resize=resize))
        (new,) = set((folder.parent / "kept").glob("*.images")) - set(files)
        os.utime(new, ns=(number, number))  # the clock may be too coarse to tell them apart
        files.append(new)
    gc.collect()
    load_splits(settings(folder, cache_gib=limit))  # the first again
    load_splits(settings(folder, cache_gib=limit, decode_size=SIDE - 1))
    assert files[0].exists() and not files[1].exists()
    assert len(list((folder.parent / "kept").glob("*.images"))) == 2


def test_a_full_disk_costs_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Writing fails, and every image is right."""
    expected = uncached(folder)
    with largest_file(HEADER_BYTES + 3 * RECORD):
        splits = load_splits(settings(folder, check_images=True))
        assert same(every_image(splits), expected)
    (message,) = caplog.messages
    assert "cannot be kept" in message and "File too large" in message
    assert "data.cache_dir" in message


@pytest.mark.ray
def test_a_full_file_system_costs_a_warning(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another program fills a real file system."""
    expected = uncached(folder)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        splits = load_splits(settings(folder, cache_dir=str(disk)))
        with pytest.raises(OSError, match="No space left"):
            (disk / "other").write_bytes(bytes(2**20))
        assert same(every_image(splits), expected)
        del splits
        gc.collect()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    (message,) = caplog.messages
    assert "cannot be kept" in message and "No space left on device" in message


def test_a_disk_that_fails_later_costs_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Writing stops, reading goes on."""
    expected = uncached(folder)
    splits = load_splits(settings(folder))
    with largest_file(HEADER_BYTES):
        assert same(every_image(splits), expected)
    (message,) = caplog.messages
    assert "cannot be kept" in message
    assert same(every_image(splits), expected)


def test_a_folder_that_cannot_be_made_costs_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file is in its place."""
    (folder.parent / "kept").write_text("")
    splits = load_splits(settings(folder))
    assert same(every_image(splits), uncached(folder))
    (message,) = caplog.messages
    assert "kept" in message and "the run goes on" in message


def test_a_lock_that_is_never_granted_costs_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may do so if its server does not answer."""
    monkeypatch.setattr(cache, "LOCK_S", 0.1)
    (folder.parent / "kept").mkdir()
    with FileLock(folder.parent / "kept" / "lock"):
        splits = load_splits(settings(folder))
    assert same(every_image(splits), uncached(folder))
    (message,) = caplog.messages
    assert "could not be acquired" in message and "the run goes on" in message


def test_what_a_killed_process_left_half_made_is_removed(folder: Path) -> None:
    """It is not taken for a cache."""
    (folder.parent / "kept").mkdir()
    (folder.parent / "kept" / "0123.part").write_bytes(b"half")
    assert same(every_image(load_splits(settings(folder))), uncached(folder))
    assert not list((folder.parent / "kept").glob("*.part"))
