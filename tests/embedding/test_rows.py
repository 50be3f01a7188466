"""Embeddings of many images in one process: the rows, and that a folder is continued, changed or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from embedding_samples import rows_of, vectors_of, write_photos

from ray_dmml import Config, UserError, embed, load_cohort, train
from ray_dmml.embedding.output import shard_size
from ray_dmml.index.build import build_index
from ray_dmml.index.queries import load_embedder
from ray_dmml.training.run_dir import lock_folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


@pytest.fixture(scope="module")
def whole(small_run: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their embeddings, in batches of 4."""
    out = tmp_path_factory.mktemp("out") / "whole"
    embed(small_run, photos, out, local=True, batch_size=4)
    return out


def test_rows_are_those_of_embed_files(small_run: Path, photos: Path, whole: Path) -> None:
    """To the bit, in the order of the paths; with the sizes of the upright images."""
    cohort, rows = load_cohort(small_run), rows_of(whole)
    assert rows["path"].to_pylist() == sorted(str(p.relative_to(photos)) for p in photos.rglob("*.*"))
    assert np.array_equal(vectors_of(rows), cohort.embed_files(photos, batch_size=4))
    assert rows["error"].null_count == rows.num_rows == 21
    number = {path: int(Path(path).stem) for path in rows["path"].to_pylist()}
    sizes = zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True)
    expected = {path: (40, 30 + n) if n else (30, 40) for path, n in number.items()}
    assert dict(zip(number, sizes, strict=True)) == expected
    facts = json.loads((whole / "embed.json").read_text())
    assert facts["model"] == cohort.fingerprint and facts["num_images"] == 21
    assert (facts["peer"], facts["size"], facts["dtype"]) == ("ensemble", 23, "float32")
    assert (facts["run"], facts["weights"], facts["root"]) == (str(small_run), "last", str(photos))
    assert facts["preprocessing"]["decode_size"] == 36
    assert len(list(whole.glob("part-*.parquet"))) == 6


def test_one_peer_in_half_precision(small_run: Path, photos: Path, tmp_path: Path) -> None:
    result = embed(small_run, photos, tmp_path / "out", peer="peer1", dtype="float16", local=True, concurrency=3)
    peer = load_cohort(small_run).peers["peer1"]
    vectors = vectors_of(rows_of(tmp_path / "out"))
    assert vectors.dtype == np.float16 and vectors.shape == (21, 7)
    assert np.array_equal(vectors, peer.embed_files(photos).astype(np.float16))
    assert result == {
        "out": str(tmp_path / "out"),
        "num_images": 21,
        "num_unreadable": 0,
        "size": 7,
        "model": peer.fingerprint,
    }


def test_an_index_finds_the_model_of_its_images(
    image_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the weights are not those of the run's results, and the run was given relative to another folder."""
    raw = tiny(image_folder, train={"steps": 3, "evaluate_every": 0}, data={"validation_fraction": 0})
    raw["cohort"]["peers"][0]["ema"] = {"decay": 0.5}
    train(Config.parse(raw), tmp_path / "run", local=True)
    monkeypatch.chdir(tmp_path)
    result = embed("run", photos, "out", weights="ema", local=True)
    assert result["model"] == load_cohort("run", "ema").fingerprint != load_cohort("run").fingerprint
    monkeypatch.chdir(photos)
    assert load_embedder(build_index(tmp_path / "out")).fingerprint == result["model"]


def test_an_unreadable_image_is_a_row_with_its_error(small_run: Path, photos: Path, tmp_path: Path) -> None:
    """Empty, cut off, no image, a link that leads nowhere, a name that is not text. The others have embeddings."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "a/empty.jpg").touch()
    (folder / "a/text.png").write_text("no image")
    (folder / "a/gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "b/cut.png").write_bytes((folder / "a/001.png").read_bytes()[:300])
    Path(str(folder / "b/") + "/caf\udce9.jpg").write_bytes((folder / "a/004.jpg").read_bytes())
    result = embed(small_run, folder, tmp_path / "out", local=True)
    assert (result["num_images"], result["num_unreadable"]) == (26, 5)
    rows = rows_of(tmp_path / "out")
    errors = {row["path"]: row["error"] for row in rows.to_pylist() if row["error"]}
    assert errors["a/empty.jpg"] == "the file is empty"
    assert errors["a/text.png"] == "it is not an image in a known format"
    assert errors["a/gone.png"] == "No such file or directory"
    assert errors["b/caf\\xe9.jpg"] == "its name is not text in UTF-8"
    assert set(errors) == {"a/empty.jpg", "a/text.png", "a/gone.png", "b/cut.png", "b/caf\\xe9.jpg"}
    assert rows["embedding"].null_count == rows["width"].null_count == rows["height"].null_count == 5
    assert np.allclose(vectors_of(rows), load_cohort(small_run).embed_files(photos), atol=1e-6)


def test_an_interrupted_call_is_continued(small_run: Path, photos: Path, whole: Path, tmp_path: Path) -> None:
    """By a call with another number of threads. Shards that are there stay, and leftovers of a kill are no shards."""
    before, threads = tmp_path / "out", torch.get_num_threads()

    def stop(done: int, total: int, unreadable: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(small_run, photos, before, local=True, batch_size=4, concurrency=2, on_progress=stop)
    assert torch.get_num_threads() == threads
    first = {file.name: file.stat().st_mtime_ns for file in before.glob("part-*")}
    assert len(first) == 2
    (before / "part-00003.parquet.tmp").write_bytes(b"half")
    (before / "mine.tmp").write_bytes(b"of the user")
    seen: list[Any] = []
    embed(small_run, photos, before, local=True, concurrency=1, on_progress=lambda *counts: seen.append(counts))
    assert seen[0] == (8, 21, 0) and seen[-1] == (21, 21, 0)
    assert {file: (before / file).stat().st_mtime_ns for file in first} == first
    assert {file.name for file in before.iterdir()} == {file.name for file in whole.iterdir()} | {"mine.tmp"}
    for file in whole.iterdir():
        assert (before / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_killed_start_is_started_again(small_run: Path, photos: Path, whole: Path, tmp_path: Path) -> None:
    """A list of images without embed.json is not trusted."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "list-000.parquet").write_bytes(b"of other images")
    embed(small_run, photos, out, local=True, batch_size=4)
    assert rows_of(out).equals(rows_of(whole))


def test_changed_images_are_refused_or_added(small_run: Path, photos: Path, tmp_path: Path) -> None:
    """--update embeds new images in new shards. Rows of images that are gone stay."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, folder)
    embed(small_run, folder, out, local=True, batch_size=4)
    before = rows_of(out)
    shutil.copy(folder / "a/004.jpg", folder / "a/0.jpg")
    shutil.copy(folder / "a/004.jpg", folder / "z.jpg")
    (folder / "a/001.png").unlink()
    with pytest.raises(UserError, match=r"2 are new \(a/0.jpg\), 1 are gone \(a/001.png\); with update"):
        embed(small_run, folder, out, local=True)
    assert rows_of(out).equals(before)
    for _ in range(2):
        assert embed(small_run, folder, out, local=True, update=True)["num_images"] == 23
        rows = rows_of(out)
        assert rows[:21].equals(before)
        assert rows["path"].to_pylist()[21:] == ["a/0.jpg", "z.jpg"]
    same = [rows["path"].to_pylist().index(name) for name in ("a/004.jpg", "a/0.jpg", "z.jpg")]
    assert np.allclose(vectors_of(rows)[same], vectors_of(rows)[same[0]], atol=1e-6)


def test_a_folder_of_something_else_is_refused(small_run: Path, photos: Path, whole: Path, tmp_path: Path) -> None:
    """Of another peer, type, batch size, place or model; of other files; in use. Nothing is changed."""
    before = {file: file.read_bytes() for file in whole.iterdir()}
    moved = tmp_path / "photos"
    shutil.copytree(photos, moved)
    for match, images, options in [
        ("another peer, ensemble and not peer0", photos, {"peer": "peer0"}),
        ("another dtype, float32 and not float16", photos, {"dtype": "float16"}),
        ("another batch size, 4 and not 8", photos, {"batch_size": 8}),
        (f"another root, {photos} and not {moved}", moved, {}),
        ("no peer 'peer2'; its peers are peer0, peer1", photos, {"peer": "peer2"}),
        ("no dtype 'int8'; allowed: float32, float16", photos, {"dtype": "int8"}),
        ("nowhere does not exist: give a folder of images, a manifest or a URI", tmp_path / "nowhere", {}),
        ("a root is for the paths of a manifest", photos, {"root": tmp_path}),
    ]:
        with pytest.raises(UserError, match=match):
            embed(small_run, images, whole, local=True, **options)
    facts = json.loads((whole / "embed.json").read_text())
    (whole / "embed.json").write_text(json.dumps({**facts, "model": "of another run"}))
    with pytest.raises(UserError, match="another model, of another run"):
        embed(small_run, photos, whole, local=True)
    (whole / "embed.json").write_bytes(before[whole / "embed.json"])
    with lock_folder(whole, "at work"), pytest.raises(UserError, match="another process is embedding or indexing in"):
        embed(small_run, photos, whole, local=True)
    with pytest.raises(UserError, match=r"is not empty and has no embed\.json"):
        embed(small_run, photos, small_run, local=True)
    (tmp_path / "mine").mkdir()
    for name in ("thesis.tmp", "list-of-things"):
        file = tmp_path / "mine" / name
        file.touch()
        with pytest.raises(UserError, match=r"is not empty and has no embed\.json"):
            embed(small_run, photos, tmp_path / "mine", local=True)
        file.unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        embed(small_run, tmp_path / "empty", tmp_path / "out", local=True)
    assert {file: file.read_bytes() for file in whole.iterdir()} == before


def test_a_place_that_is_gone_is_no_unreadable_image(small_run: Path, photos: Path, tmp_path: Path) -> None:
    """An unmounted folder in mid-run ends the call; when it is back, the call goes on."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, folder)

    def unmount(done: int, total: int, unreadable: int) -> None:
        if done == 4:
            folder.rename(tmp_path / "elsewhere")

    with pytest.raises(UserError, match=r"photos cannot be read on .*No such file"):
        embed(small_run, folder, out, local=True, batch_size=4, concurrency=1, on_progress=unmount)
    (tmp_path / "elsewhere").rename(folder)
    assert embed(small_run, folder, out, local=True)["num_unreadable"] == 0
    assert rows_of(out).num_rows == 21


def test_the_size_of_shards() -> None:
    """Whole batches; many shards for few images, and not too many for many."""
    for num_images, batch_size, expected in [(1, 64, 64), (4000, 64, 64), (100_000, 64, 256), (10**6, 64, 960)]:
        assert shard_size(num_images, batch_size) == expected
    assert shard_size(10**9, 64) == 4096 and shard_size(10**9, 4096) == 4096 and shard_size(10**9, 1) == 64
