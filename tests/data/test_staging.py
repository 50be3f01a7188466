"""A node's own copy of the images, from a folder and from a real S3 server."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import S3Server, tiny, write_image
from typer.testing import CliRunner

pytest.importorskip("pyarrow.fs", reason="ray[tune] brings pyarrow, which is not installed")

from ray_dmml.cli.main import app
from ray_dmml.config import yamlio
from ray_dmml.config.schema import DataConfig
from ray_dmml.data import staging
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.staging import DIGESTS, MARK, fetch, local_root
from ray_dmml.errors import UserError
from ray_dmml.filesystem import open_uri


def config(source: str | Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"name": "imagefolder", "source": str(source), "decode_size": 36, **changes})


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def put(uri: str, files: dict[str, bytes]) -> None:
    there, base = open_uri(uri)
    for name, content in files.items():
        with there.open_output_stream(f"{base}/{name}") as stream:
            stream.write(content)


Messages = Callable[[], list[str]]


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Messages:
    """Takes what `fetch` has logged since the last call."""
    caplog.set_level(logging.INFO, "ray_dmml")

    def take() -> list[str]:
        taken = [r.getMessage() for r in caplog.records if r.name == staging.__name__]
        caplog.clear()
        return taken

    return take


@pytest.fixture
def images(image_folder: Path, tmp_path: Path) -> Path:
    """A folder of images that a test may change."""
    place = tmp_path / "shared drive" / "images"
    shutil.copytree(image_folder, place)
    return place


@pytest.mark.parametrize("kind", ["folder", pytest.param("s3", marks=pytest.mark.ray)])
def test_the_copy_is_the_source(
    kind: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest, messages: Messages
) -> None:
    """It has every file and is made once, and the images are those of the source."""
    source = str(images)
    if kind == "s3":
        source = request.getfixturevalue("s3").uri(f"bucket/{tmp_path.name}/images")
        put(source, files_of(images))
    data = config(source, cache_dir=tmp_path / "cache")
    root = fetch(data)
    assert files_of(root) == files_of(images) and root == local_root(data)
    (message,) = messages()
    assert f"copying {len(files_of(images))} of" in message
    assert "secret" not in message and "secret" not in (root / MARK).read_text()
    assert fetch(data) == root and not messages()
    copied = load_splits(data)
    plain = DataConfig.model_validate({"name": "imagefolder", "root": images, "decode_size": 36})
    expected = load_splits(plain)
    assert len(copied.train) == len(expected.train)
    assert torch.equal(copied.train.source.read(0), expected.train.source.read(0))


def _fetch(data: DataConfig, together: Any) -> list[str]:
    """The messages of a fetch that begins when all are ready; in a process of its own."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    staging.logger.addHandler(handler)
    staging.logger.setLevel(logging.INFO)
    together.wait(60)
    fetch(data)
    return messages


@pytest.mark.ray
def test_many_at_once_make_one_copy(images: Path, tmp_path: Path) -> None:
    """The peers of a node start like this."""
    data = config(images, root=tmp_path / "copy")
    context = get_context("forkserver")
    context.set_forkserver_preload(["torchvision.io", "ray_dmml.data.datasets"])
    with context.Manager() as manager, ProcessPoolExecutor(3, mp_context=context) as pool:
        together = manager.Barrier(3)
        calls = [pool.submit(_fetch, data, together) for _ in range(3)]
        messages = [message for call in calls for message in call.result()]
    assert sum("copying" in message for message in messages) == 1
    assert files_of(tmp_path / "copy") == files_of(images)


def test_an_interrupted_copy_continues(images: Path, tmp_path: Path, messages: Messages) -> None:
    """Complete files stay; files that are missing, cut short or partial are copied."""
    root = tmp_path / "copy"
    names = sorted(files_of(images))
    shutil.copytree(images, root)
    (root / names[0]).unlink()
    (root / names[1]).write_bytes(b"cut short")
    (root / names[2]).with_name(f".{Path(names[2]).name}.part").write_bytes(b"half of it")
    fetch(config(images, root=root))
    assert files_of(root) == files_of(images)
    (message,) = messages()
    assert f"copying 2 of {len(names)} files" in message


@pytest.mark.ray
def test_files_with_a_digest_are_verified(images: Path, tmp_path: Path) -> None:
    """Both a damaged source and a damaged copy of the same size are noticed."""
    names = sorted(files_of(images))
    digests = subprocess.run(
        ["sha256sum", *(f"./{name}" for name in names)],
        cwd=images,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (images / DIGESTS).write_text(digests)
    root = tmp_path / "copy"
    shutil.copytree(images, root)
    content = bytearray((root / names[0]).read_bytes())
    content[-1] ^= 1
    (root / names[0]).write_bytes(content)
    fetch(config(images, root=root))
    assert files_of(root) == files_of(images)

    (images / names[1]).write_bytes(bytes(len((images / names[1]).read_bytes())))
    with pytest.raises(UserError, match=r"the content of .* is damaged \(not that of SHA256SUMS"):
        fetch(config(images, root=tmp_path / "other"))
    assert not (tmp_path / "other" / names[1]).exists()
    (images / names[1]).unlink()
    with pytest.raises(UserError, match=f"has no {names[1]}, which its SHA256SUMS lists"):
        fetch(config(images, root=tmp_path / "other"))
    (images / DIGESTS).write_text("not a digest\n")
    with pytest.raises(UserError, match="line 1 of SHA256SUMS is not what sha256sum writes"):
        fetch(config(images, root=tmp_path / "other"))


@pytest.mark.parametrize("name", ["../../escaped", "a/../../../escaped", "{outside}/escaped"])
def test_names_that_lead_elsewhere_are_refused(name: str, s3: S3Server, tmp_path: Path) -> None:
    """A bucket may have any name."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{s3.port}",
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )
    folder = f"{tmp_path.name}/images"
    for each in ("a/1.png", name.format(outside=tmp_path)):
        client.put_object(Bucket="bucket", Key=f"{folder}/{each}", Body=b"x")
    with pytest.raises(UserError, match="escaped' is outside the folder"):
        fetch(config(s3.uri(f"bucket/{folder}"), root=tmp_path / "deep" / "copy"))
    assert not list(tmp_path.rglob("escaped"))


def test_a_digest_list_names_files_of_the_source_only(s3: S3Server, tmp_path: Path) -> None:
    source = s3.uri(f"bucket/{tmp_path.name}/images")
    digest = hashlib.sha256(b"x").hexdigest()
    put(source, {"a/1.png": b"x", DIGESTS: f"{digest}  ../../escaped\n".encode()})
    with pytest.raises(UserError, match=r"has no \.\./\.\./escaped"):
        fetch(config(source, root=tmp_path / "deep" / "er" / "copy"))
    assert not (tmp_path / "deep" / "escaped").exists()


@pytest.mark.parametrize("kind", ["folder", pytest.param("s3", marks=pytest.mark.ray)])
def test_fetching_again_copies_what_is_missing_or_differs_in_size(
    kind: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest, messages: Messages
) -> None:
    """It removes nothing, and warns of files that the source has not. A run trusts the copy."""
    source, root = str(images), tmp_path / "copy"
    if kind == "s3":
        source = request.getfixturevalue("s3").uri(f"bucket/{tmp_path.name}/images")
        put(source, files_of(images))
    data = config(source, root=root)
    fetch(data)
    before = files_of(images)
    changed = {"class00/0.png": before["class00/0.png"] + b"more", "class00/new.png": b"new"}
    put(source, changed)
    there, base = open_uri(source)
    there.delete_file(f"{base}/class15/0.png")
    (root / "class01" / "0.png").write_bytes(b"damaged")
    messages()
    fetch(data)
    assert files_of(root)["class01/0.png"] == b"damaged" and not messages()
    fetch(data, again=True)
    assert files_of(root) == before | changed
    extra, copying = messages()
    assert "has 1 files that are not in" in extra and "such as class15/0.png" in extra
    assert f"copying 3 of {len(before)} files" in copying
    fetch(data, again=True)
    assert "has all" in messages()[1]
    fetch(data)
    assert not messages()


def test_a_copy_of_another_source_is_not_replaced(images: Path, tmp_path: Path, messages: Messages) -> None:
    """A run and `data fetch` refuse, also if it is not finished: the two would be mixed."""
    other, root = tmp_path / "other", tmp_path / "copy"
    shutil.copytree(images / "class00", other / "class00")
    fetch(config(images, root=root))
    refusal = r"holds a copy of .*images, and not of .*other: give data.root"
    for again in (False, True):
        with pytest.raises(UserError, match=refusal):
            fetch(config(other, root=root), again=again)
    assert files_of(root) == files_of(images)
    mark = json.loads((root / MARK).read_text())
    (root / MARK).write_text(json.dumps(mark | {"finished": False}))
    with pytest.raises(UserError, match=refusal):
        fetch(config(other, root=root))
    messages()
    fetch(config(images, root=root))
    assert "copying 0 of" in messages()[0]


def test_fetching_again_without_success_leaves_no_finished_copy(
    images: Path, tmp_path: Path, messages: Messages
) -> None:
    """The next run continues it. A source that does not answer changes nothing."""
    data = config(images, root=tmp_path / "copy")
    fetch(data)
    images.rename(tmp_path / "away")
    with pytest.raises(UserError, match="cannot be copied"):
        fetch(data, again=True)
    messages()
    fetch(data)
    assert not messages()
    (tmp_path / "away").rename(images)

    (images / "class00" / "new.png").write_bytes(b"new")
    (images / DIGESTS).write_text(f"{hashlib.sha256(b'other').hexdigest()}  class00/new.png\n")
    with pytest.raises(UserError, match="is damaged"):
        fetch(data, again=True)
    with pytest.raises(UserError, match="is damaged"):
        fetch(data)
    (images / "class00" / "new.png").write_bytes(b"other")
    fetch(data)
    assert files_of(tmp_path / "copy") == files_of(images)


def test_a_disk_that_is_too_small_is_refused(images: Path, tmp_path: Path) -> None:
    """No file is copied."""
    with (images / "class00" / "large.png").open("wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).free + 2**30)  # sparse
    with pytest.raises(UserError, match=r"GiB are to be copied to .* are free: set data\.root"):
        fetch(config(images, root=tmp_path / "copy"))
    assert not files_of(tmp_path / "copy")


def test_a_copy_is_on_the_disk_before_it_counts(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the machine dies, the mark must not survive without the files."""
    root, synced = tmp_path / "copy", list[bool]()

    def finished() -> bool:
        return bool(json.loads((root / MARK).read_text())["finished"])

    def sync() -> None:
        synced.append(finished())
        assert files_of(root) == files_of(images)

    monkeypatch.setattr(os, "sync", sync)
    fetch(config(images, root=root))
    assert synced == [False] and finished()


def test_a_copy_may_be_a_source(images: Path, tmp_path: Path, messages: Messages) -> None:
    """Its mark is not copied."""
    fetch(config(images, root=tmp_path / "first"))
    messages()
    fetch(config(tmp_path / "first", root=tmp_path / "second"))
    assert f"copying {len(files_of(images))} of {len(files_of(images))} files" in messages()[0]
    assert files_of(tmp_path / "second") == files_of(images)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere", "cannot be copied to .*nowhere"),
        ("empty", "empty has no files"),
        ("ftp://host/images", "is not understood"),
        ("s3:///images", "it names no bucket"),
        ("s3://AKIA:abc/secret@bucket/images", "data.source s3://bucket/images .* is written %2F"),
    ],
)
def test_wrong_sources_are_refused(source: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    place = source if "://" in source else str(tmp_path / source)
    with pytest.raises(UserError, match=expected):
        fetch(config(place, root=tmp_path / "copy"))


def test_the_command_prepares_this_machine(images: Path, tmp_path: Path) -> None:
    """Paths are relative to the config's folder."""
    file = images.parent / "config.yaml"
    raw = tiny(images, data={"root": "../copy", "source": "images"})
    file.write_text(yamlio.dump(raw))
    ended = CliRunner().invoke(app, ["data", "fetch", "--config", str(file)])
    assert ended.exit_code == 0, ended.output
    assert "30 training images of 6 classes" in ended.output and f"in {images.parent}/../copy" in ended.output
    assert files_of(tmp_path / "copy") == files_of(images)
    write_image(images / "class00" / "new.png", np.random.default_rng(0), 0)
    ended = CliRunner().invoke(app, ["data", "fetch", "--config", str(file)])
    assert ended.exit_code == 0 and "31 training images" in ended.output, ended.output
    assert files_of(tmp_path / "copy") == files_of(images)
