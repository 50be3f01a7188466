"""A node's own copy of the images, from a folder and from a real S3 server."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import S3Server, tiny
from typer.testing import CliRunner

pytest.importorskip("pyarrow.fs", reason="ray[tune] brings pyarrow, which is not installed")

from ray_dmml import yamlio
from ray_dmml.cli import app
from ray_dmml.config import Config, DataConfig
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.fetch import DIGESTS, fetch, local_root
from ray_dmml.errors import UserError
from ray_dmml.uri import open_uri


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
        "import sys; from ray_dmml.config import DataConfig; from ray_dmml.data.fetch import fetch\n"
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


def test_names_that_lead_elsewhere_are_refused(s3: S3Server, tmp_path: Path) -> None:
    """A bucket may hold any name. (A digest list of names that are not there writes nothing.)"""
    source = s3.uri(f"bucket/{tmp_path.name}/images")
    digest = hashlib.sha256(b"x").hexdigest()
    put(source, {"a/1.png": b"x", DIGESTS: f"{digest}  ../../escaped\n".encode()})
    with pytest.raises(UserError, match=r"has no \.\./\.\./escaped"):
        fetch(config(source, root=tmp_path / "deep" / "er" / "copy"), print)
    assert not (tmp_path / "deep" / "escaped").exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere", "cannot be copied to .*nowhere"),
        ("empty", "empty has no files"),
        ("ftp://host/images", "is not understood"),
        ("s3:///images", "it names no bucket"),
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


def test_every_node_makes_itself_a_copy(
    ray_start_4_cpus: None, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command over a cluster, and by a run whose peers come to a node that has none."""
    import ray

    from ray_dmml.cohort.remote import RayCohort

    raw = tiny(images, data={"root": str(tmp_path / "copy"), "source": str(images)})
    file = tmp_path / "config.yaml"
    file.write_text(yamlio.dump(raw))
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    ended = CliRunner().invoke(app, ["data", "fetch", "--config", str(file)])
    assert ended.exit_code == 0, ended.output
    assert ray.util.get_node_ip_address() in ended.output
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
