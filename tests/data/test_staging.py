"""A node's own copy of the images, from a folder and from a real S3 server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import replace
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
from ray_dmml.config.schema import Config, DataConfig
from ray_dmml.data import staging as fetch_module
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.staging import COPIED, DIGESTS, DONE, fetch, local_root
from ray_dmml.errors import UserError
from ray_dmml.filesystem import open_uri


def config(source: str | Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"name": "imagefolder", "source": str(source), "decode_size": 36, **changes}
    )


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


@pytest.fixture
def images(image_folder: Path, tmp_path: Path) -> Path:
    """A folder of images that a test may change."""
    place = tmp_path / "shared drive" / "images"
    shutil.copytree(image_folder, place)
    return place


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_the_copy_is_the_source(
    kind: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every file, made once: a second look copies nothing, and the images are those of the source."""
    source = str(images)
    if kind == "s3":
        source = request.getfixturevalue("s3").uri(f"bucket/{tmp_path.name}/images")
        put(source, files_of(images))
    asked = config(source, cache_dir=tmp_path / "cache")
    told: list[str] = []
    root = fetch(asked, told.append)
    assert files_of(root) == files_of(images) and root == local_root(asked)
    assert len(told) == 1 and f"copying {len(files_of(images))} of" in told[0]
    assert "secret" not in told[0] and "secret" not in (root / ".fetched.json").read_text()
    assert fetch(asked, told.append) == root and len(told) == 1
    found = load_splits(asked)
    plain = DataConfig.model_validate({"name": "imagefolder", "root": images, "decode_size": 36})
    expected = load_splits(plain)
    assert len(found.train) == len(expected.train)
    assert torch.equal(found.train.source.read(0), expected.train.source.read(0))


def test_many_at_once_make_one_copy(images: Path, tmp_path: Path) -> None:
    """As the peers of a node do."""
    asked = config(images, root=tmp_path / "copy")
    code = (
        "import sys; from ray_dmml.config.schema import DataConfig; from ray_dmml.data.staging import fetch\n"
        "fetch(DataConfig.model_validate_json(sys.argv[1]), print)"
    )
    command = [sys.executable, "-c", code, asked.model_dump_json()]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert sum("copying" in each for each in told) == 1
    assert files_of(tmp_path / "copy") == files_of(images)


def test_a_copy_that_was_broken_off_goes_on(images: Path, tmp_path: Path) -> None:
    """What is whole stays; what is missing, cut short or half there is copied."""
    root = tmp_path / "copy"
    names = sorted(files_of(images))
    shutil.copytree(images, root)
    (root / names[0]).unlink()
    (root / names[1]).write_bytes(b"cut short")
    (root / names[2]).with_name(f".{Path(names[2]).name}.part").write_bytes(b"half of it")
    told: list[str] = []
    fetch(config(images, root=root), told.append)
    assert files_of(root) == files_of(images)
    assert f"copying 2 of {len(names)} files" in told[0]


def test_what_has_a_digest_is_verified(images: Path, tmp_path: Path) -> None:
    """In the source, and in a copy of the same size that is there already."""
    names = sorted(files_of(images))
    told = subprocess.run(
        ["sha256sum", *(f"./{name}" for name in names)],
        cwd=images,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (images / DIGESTS).write_text(told)
    root = tmp_path / "copy"
    shutil.copytree(images, root)
    content = bytearray((root / names[0]).read_bytes())
    content[-1] ^= 1
    (root / names[0]).write_bytes(content)
    fetch(config(images, root=root), print)
    assert files_of(root) == files_of(images)

    (images / names[1]).write_bytes(bytes(len((images / names[1]).read_bytes())))
    with pytest.raises(UserError, match=r"the content of .* is damaged \(not that of SHA256SUMS"):
        fetch(config(images, root=tmp_path / "other"), print)
    assert not (tmp_path / "other" / names[1]).exists()
    (images / names[1]).unlink()
    with pytest.raises(UserError, match=f"has no {names[1]}, which its SHA256SUMS lists"):
        fetch(config(images, root=tmp_path / "other"), print)
    (images / DIGESTS).write_text("not a digest\n")
    with pytest.raises(UserError, match="line 1 of SHA256SUMS is not what sha256sum writes"):
        fetch(config(images, root=tmp_path / "other"), print)


@pytest.mark.parametrize("name", ["../../escaped", "a/../../../escaped", "{outside}/escaped"])
def test_names_that_lead_elsewhere_are_refused(name: str, s3: S3Server, tmp_path: Path) -> None:
    """A bucket may hold any name."""
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
        fetch(config(s3.uri(f"bucket/{folder}"), root=tmp_path / "deep" / "copy"), print)
    assert not list(tmp_path.rglob("escaped"))


def test_a_digest_list_names_files_of_the_source_only(s3: S3Server, tmp_path: Path) -> None:
    source = s3.uri(f"bucket/{tmp_path.name}/images")
    digest = hashlib.sha256(b"x").hexdigest()
    put(source, {"a/1.png": b"x", DIGESTS: f"{digest}  ../../escaped\n".encode()})
    with pytest.raises(UserError, match=r"has no \.\./\.\./escaped"):
        fetch(config(source, root=tmp_path / "deep" / "er" / "copy"), print)
    assert not (tmp_path / "deep" / "escaped").exists()


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_another_look_brings_the_copy_up_to_date(
    kind: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What was added, what changed (also to as many bytes) and what is there no more, down to a whole
    class; what else is in the folder stays. A run's own look trusts the copy."""
    source, root = str(images), tmp_path / "copy"
    if kind == "s3":
        source = request.getfixturevalue("s3").uri(f"bucket/{tmp_path.name}/images")
        put(source, files_of(images))
        time.sleep(1.1)  # S3 tells whole seconds
    asked, told = config(source, root=root), list[str]()
    fetch(asked, told.append)
    before = files_of(images)
    (root / "class01" / "mine.png").write_bytes(b"mine")

    changed = {"class00/0.png": bytes(reversed(before["class00/0.png"])), "class00/new.png": b"new"}
    gone = [name for name in before if name.startswith(("class15", "class01/0"))]
    there, base = open_uri(source)
    put(source, changed)
    for name in gone:
        there.delete_file(f"{base}/{name}")
        with suppress(OSError):
            (images / name).parent.rmdir()
    fetch(asked, told.append)
    assert files_of(root) == before | {"class01/mine.png": b"mine"}
    fetch(asked, told.append, again=True)
    expected = {name: content for name, content in before.items() if name not in gone}
    assert files_of(root) == expected | changed | {"class01/mine.png": b"mine"}
    assert not (root / "class15").exists()
    assert f"copying 2 of {len(expected) + 1} files" in told[1] and "removing 6 that" in told[1]
    fetch(asked, told.append, again=True)
    assert "has all" in told[2] and "secret" not in "".join(told)
    fetch(asked, pytest.fail)


def test_a_copy_of_another_source_is_not_replaced_by_a_run(images: Path, tmp_path: Path) -> None:
    """A slip in the URI would remove what another run reads; `data fetch` may."""
    other, root = tmp_path / "other", tmp_path / "copy"
    shutil.copytree(images / "class00", other / "class00")
    fetch(config(images, root=root), print)
    with pytest.raises(
        UserError, match=r"holds a copy of .*images, and not of .*other: give data.root"
    ):
        fetch(config(other, root=root), print)
    assert files_of(root) == files_of(images)
    fetch(config(images, root=root), pytest.fail)
    fetch(config(other, root=root), print, again=True)
    assert files_of(root) == files_of(other)


def test_another_look_that_breaks_off_leaves_no_finished_copy(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run goes on with it, and takes no old bytes for new ones of the same number; a source
    that does not answer changes nothing."""
    asked = config(images, root=tmp_path / "copy")
    fetch(asked, print)
    images.rename(tmp_path / "away")
    with pytest.raises(UserError, match="cannot be copied"):
        fetch(asked, print, again=True)
    fetch(asked, pytest.fail)
    (tmp_path / "away").rename(images)

    first = images / "class00" / "0.png"
    first.write_bytes(bytes(len(first.read_bytes())))
    with monkeypatch.context() as broken:
        broken.setattr(fetch_module, "_get", _break_off)
        with pytest.raises(UserError, match=r"cannot be copied .* the network is gone"):
            fetch(asked, print, again=True)
    fetch(asked, print)
    assert files_of(tmp_path / "copy") == files_of(images)


def _break_off(*arguments: Any) -> None:
    raise OSError("the network is gone")


def test_a_list_of_copied_files_removes_nothing_elsewhere(images: Path, tmp_path: Path) -> None:
    """It may be a stranger's, who packed the folder."""
    root, victim = tmp_path / "copy", tmp_path / "elsewhere" / "victim"
    fetch(config(images, root=root), print)
    victim.parent.mkdir()
    victim.write_text("")
    (root / "link").symlink_to(victim.parent)
    names = ["../elsewhere/victim", "link/victim", str(victim), ".", ""]
    (root / COPIED).write_text(json.dumps(dict.fromkeys(names, 0)))
    fetch(config(images, root=root), print, again=True)
    assert victim.exists() and files_of(root) == files_of(images)


def test_a_copy_is_on_the_disk_before_it_counts(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the machine dies the mark of a finished copy must not be all that is left of it."""
    root, synced = tmp_path / "copy", list[bool]()

    def sync() -> None:
        synced.append((root / DONE).exists())
        assert files_of(root) == files_of(images)

    monkeypatch.setattr(os, "sync", sync)
    fetch(config(images, root=root), print)
    assert synced == [False] and (root / DONE).exists()


def test_a_copy_may_be_a_source(images: Path, tmp_path: Path) -> None:
    """What it says of itself is not what there is to say of its copy."""
    fetch(config(images, root=tmp_path / "first"), print)
    told: list[str] = []
    fetch(config(tmp_path / "first", root=tmp_path / "second"), told.append)
    assert f"copying {len(files_of(images))} of {len(files_of(images))} files" in told[0]
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
def test_sources_that_are_none(source: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    place = source if "://" in source else str(tmp_path / source)
    with pytest.raises(UserError, match=expected):
        fetch(config(place, root=tmp_path / "copy"), print)


def test_the_command_prepares_this_machine(images: Path, tmp_path: Path) -> None:
    """Relative to the config's folder, as every path in it."""
    file = images.parent / "config.yaml"
    raw = tiny(images, data={"root": "../copy", "source": "images"})
    file.write_text(yamlio.dump(raw))
    ended = CliRunner().invoke(app, ["data", "fetch", "--config", str(file)])
    assert ended.exit_code == 0, ended.output
    assert (
        "30 training images of 6 classes" in ended.output
        and f"in {images.parent}/../copy" in ended.output
    )
    assert files_of(tmp_path / "copy") == files_of(images)
    (images / "class00" / "0.png").rename(images / "class00" / "new.png")
    ended = CliRunner().invoke(app, ["data", "fetch", "--config", str(file)])
    assert ended.exit_code == 0, ended.output
    assert files_of(tmp_path / "copy") == files_of(images)


def test_every_node_makes_itself_a_copy(
    ray_start_4_cpus: None, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command over a cluster, and by a run whose peers come to a node that has none."""
    import ray

    from ray_dmml.ray_backend.ray_cohort import RayCohort

    raw = tiny(images, data={"root": str(tmp_path / "copy"), "source": str(images)})
    file = tmp_path / "config.yaml"
    file.write_text(yamlio.dump(raw))
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    ended = CliRunner().invoke(app, ["data", "fetch", "--config", str(file)])
    assert ended.exit_code == 0, ended.output
    assert ray.util.get_node_ip_address() in ended.output
    assert files_of(tmp_path / "copy") == files_of(images)
    (images / "class00" / "0.png").rename(images / "class00" / "new.png")
    ended = CliRunner().invoke(app, ["data", "fetch", "--config", str(file)])
    assert ended.exit_code == 0, ended.output
    assert files_of(tmp_path / "copy") == files_of(images)

    asked = Config.load(file)
    splits = load_splits(asked.data)
    shutil.rmtree(tmp_path / "copy")
    cohort = RayCohort(asked, splits)
    try:
        assert files_of(tmp_path / "copy") == files_of(images)
        assert len(cohort.run(0, 1, lambda finished: None)) == 1
    finally:
        cohort.close()

    raw["data"]["source"] = str(tmp_path / "nowhere")
    raw["data"]["root"] = str(tmp_path / "other")
    file.write_text(yamlio.dump(raw))
    ended = CliRunner().invoke(app, ["data", "fetch", "--config", str(file)])
    assert ended.exit_code == 2 and "cannot be copied" in ended.output


OTHERS = r"peer\d: the (training|validation) images on host .* are not those that the driver has"


def test_copies_of_two_times_are_not_trained_on(
    ray_start_4_cpus: None, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver has an old copy, and a photo was added before the peers' nodes made theirs: a number
    would mean one image here and another one there. Another look brings them together."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    asked = Config.parse(tiny(images, data={"root": None, "source": str(images)}))
    monkeypatch.setenv(
        "XDG_CACHE_HOME", str(tmp_path / "the driver's")
    )  # Ray's processes have another
    splits = load_splits(asked.data)
    write_image(images / "class00" / "added.png", np.random.default_rng(0), 0)
    with pytest.raises(UserError, match=f"{OTHERS}: .*data fetch"):
        RayCohort(asked, splits).close()
    fetch(asked.data, print, again=True)
    with closing(RayCohort(asked, load_splits(asked.data))) as cohort:
        assert len(cohort.run(0, 1, lambda finished: None)) == 1


def test_a_folder_of_two_times_is_not_trained_on(ray_start_4_cpus: None, images: Path) -> None:
    """As a mount that shows one node what another one changed a while ago."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    asked = Config.parse(tiny(images))
    splits = load_splits(asked.data)
    (images / "class00" / "0.png").rename(images / "class00" / "00.png")
    with pytest.raises(UserError, match=f"{OTHERS}: .*the same data.root"):
        RayCohort(asked, splits).close()


def test_a_digest_is_of_names_classes_and_their_order(images: Path) -> None:
    """And of who is judged against whom; not of the folder that the images are in, or of which of two
    equal sets is asked."""
    plain = DataConfig.model_validate({"name": "imagefolder", "root": images, "decode_size": 36})
    splits = load_splits(plain)
    train = splits.train
    swapped = train.subset([1, 0, *range(2, len(train))])
    elsewhere = shutil.copytree(images, images.parent / "elsewhere")
    same = load_splits(plain.model_copy(update={"root": Path(elsewhere)}))
    assert same.digests() == splits.digests() and set(same.digests()) >= {"training", "test"}
    others = [swapped, train.subset(range(len(train) - 1)), splits.test]
    others.append(replace(train, labels=train.labels[::-1].copy()))
    first, second = np.array([0]), np.array([1])
    others.append(replace(train, query=first, gallery=second))
    others.append(replace(train, query=second, gallery=first))
    assert len({each.digest() for each in (train, *others)}) == 7
