"""Manifests: what is written is read; other versions, damage and strangers' fields are refused."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import FILES, META, rewrite_manifest, writing
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dmml.checkpoint.manifest import (
    FORMAT,
    DamagedError,
    dump_manifest,
    dump_with_checksum,
    load_with_checksum,
    read_manifest,
)
from ray_dmml.checkpoint.store import CheckpointStore, read_checkpoint
from ray_dmml.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The folder of a checkpoint of step 3."""
    return CheckpointStore(tmp_path).save(3, writing(FILES), META, best=False)


# --- JSON with a checksum -------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.text().filter(lambda key: key != "checksum"), JSON), st.data())
def test_json_with_a_checksum(content: dict[str, Any], data: st.DataObject) -> None:
    """Any JSON object comes back; with any byte changed, the file is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.json")
        raw = bytearray(dump_with_checksum(content))
        path.write_bytes(raw)
        assert json.dumps(load_with_checksum(path)) == json.dumps(content)
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw)
        with pytest.raises(ValueError):
            load_with_checksum(path)


def test_json_without_a_checksum_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text('{"last": "step-00000001"}')
    with pytest.raises(ValueError, match="checksum does not match"):
        load_with_checksum(tmp_path / "file.json")


def test_a_manifest_lists_every_file(tmp_path: Path) -> None:
    """Sizes, checksums and all fields come back."""
    (tmp_path / "manifest.json").write_bytes(dump_manifest(7, writing(FILES)(tmp_path), META, best=True))
    manifest = read_manifest(tmp_path)
    assert (manifest["format"], manifest["step"], manifest["best"]) == (FORMAT, 7, True)
    assert manifest["meta"] == META
    sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
    assert sizes == {
        "a/weights.safetensors": 10,
        "a/training.pt": 256,
        "b/weights.safetensors": 1000,
    }
    # printf 0123456789 | sha256sum
    digest = "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    assert manifest["files"]["a/weights.safetensors"]["sha256"] == digest


# --- other versions -------------------------------------------------------------------------


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """The error says so. The checkpoint is not damaged, so no older one replaces it."""
    store = CheckpointStore(tmp_path)
    store.save(2, writing(FILES), META, best=False)
    path = store.save(3, writing(FILES), META, best=False)
    rewrite_manifest(path, format=FORMAT + 1, version="9.8.7", files="somewhere else by then")
    expected = rf"written by ray-dmml 9\.8\.7 in format {FORMAT + 1}.*reads format {FORMAT}: update"
    for read in (lambda: read_checkpoint(path), lambda: store.load("last")):
        with pytest.raises(UserError, match=expected) as caught:
            read()
        assert not isinstance(caught.value, DamagedError)


def test_an_older_format_is_refused(tmp_path: Path) -> None:
    """No older one replaces it either."""
    store = CheckpointStore(tmp_path)
    store.save(2, writing(FILES), META, best=False)
    path = store.save(3, writing(FILES), META, best=True)
    rewrite_manifest(path, format=1)
    expected = rf"checkpoint {path} was written by ray-dmml .* in format 1; .*reads format {FORMAT}: train it again"
    for read in (lambda: read_checkpoint(path), lambda: store.load("last")):
        with pytest.raises(UserError, match=expected) as caught:
            read()
        assert not isinstance(caught.value, DamagedError)


# --- damage and strangers -------------------------------------------------------------------

NOT_A_FILE = [
    "../b/x",
    "a/../../x",
    "/etc/passwd",
    "a/b/c",
    "a",
    "a/..",
    "./x",
    "a\\\\..\\x",
    "a/",
    "a/\0",
]


@pytest.mark.parametrize("name", NOT_A_FILE)
def test_a_manifest_cannot_name_files_elsewhere(checkpoint: Path, name: str) -> None:
    """Whatever size and checksum the manifest claims, the file is not touched."""
    rewrite_manifest(checkpoint, files={name: {"size": 10**30, "sha256": "0" * 64}})
    with pytest.raises(DamagedError, match="is not the name of a peer's file"):
        read_manifest(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "3"}, "step is '3'"),
        ({"step": True}, "step is True"),
        ({"step": -1}, "step is -1"),
        ({"step": 10**12}, "step is 1000000000000"),
        ({"meta": []}, r"meta is \[\]"),
        ({"format": None}, "format is None"),
        ({"files": {"a/x": {"size": 1}}}, "'a/x' has no size or no checksum"),
    ],
)
def test_impossible_fields_are_damage(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    rewrite_manifest(checkpoint, **changes)
    with pytest.raises(DamagedError, match=rf"manifest\.json is damaged: .*{message}"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 5000, "[]", "null", '"x"', ""])
def test_manifests_that_strain_the_reader_are_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "manifest.json").write_text(content)
    with pytest.raises(DamagedError, match=r"manifest\.json is damaged"):
        read_manifest(checkpoint)


FIELDS = st.sampled_from(["format", "version", "step", "best", "files", "meta", "checksum"])


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(FIELDS, JSON), st.booleans())
def test_strange_manifests_are_user_errors(changes: dict[str, Any], has_checksum: bool) -> None:
    """Any JSON in any field, with a right checksum or not, is read or refused with a UserError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "manifest.json")
        path.write_bytes(dump_manifest(3, writing(FILES)(path.parent), META, best=False))
        if has_checksum:
            changes.pop("checksum", None)
            rewrite_manifest(Path(folder), **changes)
        else:
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        with suppress(UserError):
            manifest = read_manifest(Path(folder))
            assert type(manifest["step"]) is int and isinstance(manifest["meta"], dict)
