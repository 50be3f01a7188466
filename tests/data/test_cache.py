"""Decoded images are kept on disk: the same to the bit, whatever happens to the file."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
from torch import Tensor

from ray_dmml.config.schema import Config, DataConfig
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
    return [
        images.source.read(i) for images in (splits.train, splits.test) for i in range(len(images))
    ]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def uncached(folder: Path) -> list[Tensor]:
    return every_image(load_splits(settings(folder, cache_gib=0)))


def the_file(folder: Path) -> Path:
    (found,) = (folder.parent / "kept").glob("*.images")
    return found


@contextmanager
def no_decoding() -> Iterator[None]:
    """Inside the block an image that has to be decoded fails the test."""

    def refuse(path: Path) -> Tensor:
        raise AssertionError(f"{path} was decoded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_dmml.data.dataset._decode", refuse)
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
    """While it fills, when it is full, for the next run, and for one that splits them otherwise."""
    expected = uncached(folder)
    assert not (folder.parent / "kept").exists()
    first = load_splits(settings(folder))
    assert same(every_image(first), expected)
    with no_decoding():
        assert same(every_image(first), expected)
        assert same(every_image(load_splits(settings(folder))), expected)
        drawn = every_image(load_splits(settings(folder, split_seed=3)))
        assert {image.numpy().tobytes() for image in drawn} == {
            image.numpy().tobytes() for image in expected
        }
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
    """Half a record of another process is no image, though this one has read the slot before."""
    splits = load_splits(settings(folder))
    expected = every_image(splits)
    with the_file(folder).open("r+b") as file:
        file.seek(HEADER_BYTES + 2000)
        file.write(b"half of another image")
    assert same(every_image(splits), expected)
    with no_decoding():
        assert same(every_image(splits), expected)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: os.truncate(f, f.stat().st_size - 1), "cut short"),
        (lambda f: os.truncate(f, 10), "no cache of this program|damaged header"),
        (lambda f: os.truncate(f, 0), "no cache of this program"),
        (lambda f: f.write_bytes(f.read_bytes().replace(b'"format": 2', b'"format": 0')), "another format"),
        (lambda f: f.write_bytes(f.read_bytes().replace(b'"torch": "', b'"torch": "0')), "decoders"),
        (lambda f: f.write_bytes(b"ray-dmml images\n{not json".ljust(f.stat().st_size, b"\0")), "damaged"),
    ],
)  # fmt: skip
def test_a_cut_or_foreign_file_is_noticed_and_made_anew(folder: Path, damage, says: str) -> None:  # type: ignore[no-untyped-def]
    """It is said in one sentence, the images are right, and the next run has nothing to say."""
    expected = uncached(folder)
    every_image(load_splits(settings(folder)))
    size = the_file(folder).stat().st_size
    damage(the_file(folder))
    said: list[str] = []
    assert same(every_image(load_splits(settings(folder), said.append)), expected)
    assert len(said) == 1 and "decoded anew" in said[0] and str(the_file(folder)) in said[0]
    assert re.search(says, said[0])
    assert the_file(folder).stat().st_size == size
    said.clear()
    with no_decoding():
        assert same(every_image(load_splits(settings(folder), said.append)), expected)
    assert not said


def test_damaged_records_are_decoded_again_and_mended(folder: Path) -> None:
    """Flipped bits, and a record of which only the beginning was written."""
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
    """What is gone is decoded again: no read beyond the end kills the process."""
    splits = load_splits(settings(folder))
    expected = every_image(splits)
    os.truncate(the_file(folder), HEADER_BYTES + RECORD + 7)
    assert same(every_image(splits), expected)


def _digest(config: DataConfig, together: Any) -> str:
    """Of all images, after all others are ready; in a process of its own."""
    digest = hashlib.sha256()
    for _ in range(20):
        together.wait(60)
        splits = load_splits(config)
        for image in every_image(splits):
            digest.update(image.numpy().tobytes())
        together.wait(60)
        shutil.rmtree(config.cache_dir or "", ignore_errors=True)
    return digest.hexdigest()


def test_processes_that_build_it_at_once_agree(folder: Path) -> None:
    """Three that start at the same moment on an empty folder, twenty times, read the same images."""
    (expected,) = {_digest(settings(folder, cache_gib=0), Barrier(1))}
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(3, mp_context=context) as pool:
        together = manager.Barrier(3)
        calls = [pool.submit(_digest, settings(folder), together) for _ in range(3)]
        assert {call.result() for call in calls} == {expected}


def test_the_limit_holds_for_one_data_set_and_for_all(folder: Path) -> None:
    """What does not fit is decoded at every use, and said; another data set's file makes room once
    nobody reads it."""
    expected = uncached(folder)
    limit = (HEADER_BYTES + 5 * RECORD) / 2**30
    said: list[str] = []
    splits = load_splits(settings(folder, cache_gib=limit), said.append)
    assert same(every_image(splits), expected) and same(every_image(splits), expected)
    first = the_file(folder)
    assert first.stat().st_size == HEADER_BYTES + 5 * RECORD
    assert len(said) == 1 and said[0].startswith("5 of 12 decoded images are kept")
    said.clear()
    # The same images cut to squares are another data set, and there is no room beside the first.
    cropped = load_splits(settings(folder, cache_gib=limit, resize="center_crop"), said.append)
    assert len(said) == 1 and "less than one image" in said[0]
    assert same(every_image(cropped), uncached(folder)) and the_file(folder) == first
    del splits, cropped
    gc.collect()
    every_image(load_splits(settings(folder, cache_gib=limit, resize="center_crop")))
    assert the_file(folder) != first
    said.clear()
    tiny_limit = load_splits(settings(folder, cache_gib=1e-9), said.append)
    assert same(every_image(tiny_limit), expected)
    assert not isinstance(tiny_limit.train.source, CachedImages)
    assert len(said) == 1 and "less than one image" in said[0]


def test_another_limit_grows_or_shrinks_the_file(folder: Path) -> None:
    """What fits is kept when it grows; a lower limit is kept to."""
    expected = uncached(folder)

    def limit(images: int) -> float:
        return (HEADER_BYTES + images * RECORD) / 2**30

    every_image(load_splits(settings(folder, cache_gib=limit(5))))
    small = the_file(folder)
    grown = load_splits(settings(folder, cache_gib=limit(12)))
    with no_decoding():
        assert all(torch.equal(grown.train.source.read(i), expected[i]) for i in range(5))
    assert same(every_image(grown), expected)
    assert the_file(folder) == small and small.stat().st_size == HEADER_BYTES + 12 * RECORD
    again = load_splits(settings(folder, cache_gib=limit(3)))
    assert small.stat().st_size == HEADER_BYTES + 3 * RECORD
    assert same(every_image(again), expected) and same(every_image(grown), expected)


def test_of_two_the_longest_unused_makes_room(folder: Path) -> None:
    """Three data sets under a limit for two: the one read last but one goes on."""
    limit = 2 * (HEADER_BYTES + 12 * RECORD) / 2**30
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


def test_a_full_disk_is_said_once_and_the_images_are_read(folder: Path) -> None:
    """Writing fails: one sentence, and every image is right."""
    expected = uncached(folder)
    said: list[str] = []
    with largest_file(HEADER_BYTES + 3 * RECORD):
        splits = load_splits(settings(folder, check_images=True), said.append)
        assert same(every_image(splits), expected)
    told = [line for line in said if "cannot be kept" in line]
    assert len(told) == 1 and "File too large" in told[0] and "data.cache_dir" in told[0]


def test_a_full_file_system_is_said_once(folder: Path, tmp_path: Path) -> None:
    """The real thing: a file system too small for the images, which another program then fills."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        code = """if True:
            import pathlib, pickle, sys
            from ray_dmml.data.datasets import load_splits
            config = pickle.load(sys.stdin.buffer)
            splits = load_splits(config, print)
            try:
                (pathlib.Path(config.cache_dir) / "other").write_bytes(bytes(2**20))
            except OSError:
                print("full")
            print(sum(len([s.source.read(i) for i in range(len(s))]) for s in (splits.train, splits.test)), "read")
        """
        config = settings(folder, cache_dir=str(disk))
        ended = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps(config), capture_output=True
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert ended.returncode == 0, ended.stderr.decode()
    said = ended.stdout.decode().splitlines()
    assert len(said) == 4, said
    assert re.match(r"[1-9] of 12 decoded images are kept in .*: more do not fit", said[0])
    assert said[1] == "full" and said[3] == "12 read"
    assert "cannot be kept" in said[2] and "No space left on device" in said[2]


def test_a_disk_that_fails_later_is_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Writing stops, reading goes on."""
    expected = uncached(folder)
    splits = load_splits(settings(folder))
    with largest_file(HEADER_BYTES), caplog.at_level(logging.WARNING):
        assert same(every_image(splits), expected)
    assert len([r for r in caplog.records if "cannot be kept" in r.getMessage()]) == 1
    assert same(every_image(splits), expected)


def test_a_folder_that_cannot_be_made_is_said(folder: Path) -> None:
    """A file is in its place."""
    (folder.parent / "kept").write_text("")
    said: list[str] = []
    splits = load_splits(settings(folder), said.append)
    assert same(every_image(splits), uncached(folder))
    assert len(said) == 1 and "kept" in said[0] and "the run goes on" in said[0]


def test_what_a_killed_process_left_half_made_is_removed(folder: Path) -> None:
    """And is not taken for a cache."""
    (folder.parent / "kept").mkdir()
    (folder.parent / "kept" / "0123.part").write_bytes(b"half")
    assert same(every_image(load_splits(settings(folder))), uncached(folder))
    assert not list((folder.parent / "kept").glob("*.part"))
