"""Indexes against naive search over all vectors."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from embedded import unit_vectors, write_embeddings, write_info, write_shard

from ray_dmml import ImageIndex, UserError, build_index, load_index, remove_rows, update_index
from ray_dmml.index import build, ivf, store

QUERIES = unit_vectors(50, seed=5)


def naive(vectors: np.ndarray, ids: np.ndarray, k: int, queries: np.ndarray = QUERIES) -> np.ndarray:
    """Ids of the nearest rows by sorting all similarities: (Q, k)."""
    return ids[np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]]


def recall_of(index: ImageIndex, expected: np.ndarray) -> float:
    _, found = index.search(QUERIES, expected.shape[1])
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)]))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_flat_search_is_exact(tmp_path: Path, dtype: str) -> None:
    """Over all shards in the order of their names, without unreadable images."""
    vectors = unit_vectors(90)
    write_info(tmp_path, 16, dtype=dtype)
    kind = pa.float16() if dtype == "float16" else pa.float32()
    readable: list[Any] = [None if row in (0, 31, 89) else vector for row, vector in enumerate(vectors)]
    for number, (first, last) in enumerate([(0, 30), (30, 90)]):
        paths = [f"Bücher/{row}.jpg" for row in range(first, last)]
        write_shard(tmp_path, number, paths, readable[first:last], kind)
    index = build_index(tmp_path)
    assert (len(index), index.size, index.model, index.info.kind) == (87, 16, "a" * 64, "flat")
    assert index.info.num_unreadable == 3 and index.root == os.path.abspath("photos")
    kept = np.delete(np.arange(90), [0, 31, 89])
    if dtype == "float16":  # rows of unit length again
        vectors = vectors.astype(np.float16).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for loaded in (index, load_index(tmp_path)):
        similarities, ids = loaded.search(QUERIES, 5)
        assert similarities.dtype == np.float32 and ids.dtype == np.int64
        assert np.array_equal(ids, naive(vectors[kept], np.arange(87), 5))
        assert np.allclose(similarities, -np.sort(-(QUERIES @ vectors[kept].T))[:, :5], atol=1e-6)
        assert loaded.paths(ids[0]) == [f"Bücher/{row}.jpg" for row in kept[ids[0]]]
        assert np.allclose(loaded.vector(40), vectors[kept][40], atol=1e-6)
        assert loaded.id_of("Bücher/30.jpg") == 29
    assert index.rows.schema.names == ["id", "path", "width", "height"]
    similarities, ids = index.search(QUERIES, 100)
    assert (ids[:, 87:] == -1).all() and np.isneginf(similarities[:, 87:]).all()
    assert (np.sort(ids[:, :87]) == np.arange(87)).all()
    assert index.search(QUERIES[:0], 3)[1].shape == (0, 3)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, list[str]]:
    """Embeddings of 4,000 images."""
    folder = tmp_path_factory.mktemp("large")
    vectors = unit_vectors(4000)
    return folder, vectors, write_embeddings(folder, vectors, num_shards=3)


def test_ivf_reaches_its_recall(large: tuple[Path, np.ndarray, list[str]], tmp_path: Path) -> None:
    """It reads few lists, and queries that are not in the index have about the recall that was measured."""
    folder, vectors, paths = large
    loose, index = (build_index(folder, tmp_path / str(r), kind="ivf", recall=r) for r in (0.7, 0.95))
    info = index.info
    assert info.num_lists == 100 and info.num_probed and loose.info.num_probed
    assert loose.info.num_probed < info.num_probed <= 50
    assert (info.recall.target, info.recall.k, info.recall.num_queries) == (0.95, 10, 500)
    assert 0.95 <= info.recall.measured < 1 and 0.7 <= loose.info.recall.measured < 0.95
    expected = naive(vectors, np.arange(4000), 10)
    assert abs(recall_of(index, expected) - info.recall.measured) < 0.04
    assert recall_of(build_index(folder, tmp_path / "all", kind="ivf", recall=1), expected) > 0.98
    assert np.array_equal(index.vector(1234), vectors[1234]) and index.paths([1234, 7]) == [paths[1234], paths[7]]
    similarities, ids = index.search(QUERIES[:3], 4000)  # more than its lists have
    assert np.array_equal(np.sort(ids), np.broadcast_to(np.arange(4000), (3, 4000)))
    assert (np.diff(similarities) <= 0).all()


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_prefix_of_paths(tmp_path: Path, kind: store.Kind) -> None:
    """As if only the rows with it were there, also after rows were removed. Where they are few, more lists are read."""
    vectors = unit_vectors(2000)
    paths = [f"{'rare' if row % 100 == 7 else 'often'}/{row}.jpg" for row in range(2000)]
    write_info(tmp_path, 16)
    write_shard(tmp_path, 0, paths, list(vectors))
    build_index(tmp_path, kind=kind, recall=0.9)
    index = remove_rows(tmp_path, ["rare/7.jpg", "often/8.jpg"])
    for prefix, k in (("rare/", 5), ("rare/", 40), ("rare/1", 3), ("often/", 5)):
        wanted = np.array([row for row, path in enumerate(paths) if path.startswith(prefix) and row not in (7, 8)])
        similarities, ids = index.search(QUERIES, k, prefix=prefix)
        expected = naive(vectors[wanted], wanted, k)
        number = min(k, len(wanted))
        assert (ids[:, number:] == -1).all() and np.isneginf(similarities[:, number:]).all()
        assert np.isin(ids[:, :number], wanted).all()
        found = np.mean([len(set(a) & set(b)) / number for a, b in zip(ids[:, :number], expected, strict=True)])
        assert found == 1 if kind == "flat" else found > 0.85
    similarities, ids = index.search(QUERIES, 3, prefix="none/")
    assert (ids == -1).all() and np.isneginf(similarities).all()
    assert np.array_equal(index.search(QUERIES, 5, prefix="")[1], index.search(QUERIES, 5)[1])


def test_beside_the_torch_wrapper_of_faiss(tmp_path: Path) -> None:
    """pytorch-metric-learning imports it, and it replaces methods of faiss."""
    importlib.import_module("faiss.contrib.torch_utils")
    vectors = unit_vectors(500)
    write_embeddings(tmp_path, vectors)
    flat = build_index(tmp_path)
    [(_, block)] = ivf.stored(faiss.read_index(str(tmp_path / "index.faiss")), np.arange(500))
    assert type(block) is np.ndarray and np.array_equal(block, vectors)
    index = build_index(tmp_path, kind="ivf", recall=1, overwrite=True)
    for either in (flat, index):
        assert type(either.vector(20)) is np.ndarray and np.array_equal(either.vector(20), vectors[20])
    assert recall_of(index, naive(vectors, np.arange(500), 10)) == 1
    ids = index.search(QUERIES, 500)[1]
    assert (np.sort(ids) == np.arange(500)).all()


def test_the_measured_recall_is_that_of_its_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of the sample is searched for, and does not count itself. Here the sample is all rows."""
    monkeypatch.setattr("ray_dmml.index.ivf.NUM_QUERIES", 10_000)
    vectors = unit_vectors(1000)
    write_embeddings(tmp_path, vectors)
    index = build_index(tmp_path, kind="ivf", recall=0.8)
    to_all = vectors @ vectors.T
    np.fill_diagonal(to_all, -np.inf)
    expected = np.argsort(-to_all, axis=1)[:, :10]
    _, found = index.search(vectors, 11)
    hits = [len(set(row) & set(best)) for row, best in zip(found, expected, strict=True)]
    assert index.info.recall.measured == pytest.approx(np.mean(hits) / 10, abs=1e-3)


def test_new_shards_are_added(tmp_path: Path) -> None:
    """Ids of earlier rows stay, and an update without new shards changes nothing."""
    vectors = unit_vectors(600)
    source, out = tmp_path / "embedded", tmp_path / "index"
    paths = write_embeddings(source, vectors[:500])
    for kind in ("flat", "ivf"):
        index = build_index(source, out / kind, kind=kind, recall=1)
        assert index.info.kind == kind
        assert update_index(source, out / kind).info == index.info
    write_shard(source, 2, ["new.jpg", "bad.jpg", *map(str, range(99))], [vectors[500], None, *vectors[501:]])
    expected = naive(vectors, np.arange(600), 10)
    for kind in ("flat", "ivf"):
        index = update_index(source, out / kind)
        assert (len(index), index.info.num_unreadable, index.info.kind) == (600, 1, kind)
        assert recall_of(index, expected) == 1
        assert index.paths([0, 499, 500, 599]) == [paths[0], paths[499], "new.jpg", "98"]
        assert update_index(source, out / kind).info == index.info
    assert update_index(source, out / "ivf", recall=0.5).info.recall.target == 0.5


def test_an_index_that_grows_changes_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit, flat becomes ivf, unless it was asked for; four times as many rows get more lists."""
    monkeypatch.setattr(build, "MAX_FLAT", 300)
    vectors = unit_vectors(2000)
    source = tmp_path / "embedded"
    write_embeddings(source, vectors[:300], num_shards=1)
    kinds = {"grown": None, "flat": "flat", "ivf": "ivf"}
    indexes = {name: build_index(source, tmp_path / name, kind=kind, recall=1) for name, kind in kinds.items()}
    assert [indexes[name].info.kind for name in kinds] == ["flat", "flat", "ivf"]
    removed = remove_rows(tmp_path / "grown", [indexes["grown"].paths([3])[0]])
    assert len(removed) == 299
    write_shard(source, 1, [f"b{row}" for row in range(1700)], list(vectors[300:]))
    indexes = {name: update_index(source, tmp_path / name) for name in kinds}
    assert [indexes[name].info.kind for name in kinds] == ["ivf", "flat", "ivf"]
    assert (indexes["grown"].info.num_lists, indexes["ivf"].info.num_lists) == (49, 50)
    for name in ("flat", "ivf"):
        assert recall_of(indexes[name], naive(vectors, np.arange(2000), 10)) > 0.99
    kept = np.delete(np.arange(2000), 3)
    assert recall_of(indexes["grown"], naive(vectors[kept], kept, 10)) > 0.99


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_rows_are_removed(tmp_path: Path, kind: store.Kind) -> None:
    """Other ids stay; a removed row stays away; its id is not used again."""
    vectors = unit_vectors(500)
    paths = write_embeddings(tmp_path, vectors[:450])
    before = build_index(tmp_path, kind=kind, recall=1)
    gone = [0, 7, 8, 120, 448, 449]
    index = remove_rows(tmp_path, [paths[row] for row in gone])
    kept = np.delete(np.arange(450), gone)
    assert np.array_equal(np.sort(index.search(QUERIES, 10)[1]), np.sort(naive(vectors[kept], kept, 10)))
    assert np.array_equal(index.vector(9), vectors[9]) and index.paths([9, 447]) == [paths[9], paths[447]]
    assert len(before) == 450 and before.search(vectors[7:8], 1)[1] == 7  # its files are still mapped
    for action in (lambda: index.vector(7), lambda: index.paths([7])):
        with pytest.raises(UserError, match="has no row 7"):
            action()
    with pytest.raises(UserError, match=r"c0/000000\.jpg is not an image of the index .*; paths are relative to "):
        index.id_of(paths[0])
    files = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=r"c0/000000\.jpg is not an image of the index .* \(2 of 3 are not\)"):
        remove_rows(tmp_path, [paths[0], paths[1], "other.jpg"])
    with pytest.raises(UserError, match="would have no rows left"):
        remove_rows(tmp_path, [paths[row] for row in kept])
    assert sorted(os.listdir(tmp_path)) == files and load_index(tmp_path).info == index.info
    assert remove_rows(tmp_path, []).info == index.info
    write_shard(tmp_path, 2, [paths[0], "x.jpg"], list(vectors[450:452]))
    index = update_index(tmp_path)
    kept = np.append(kept, [450, 451])
    assert index.paths([450, 451]) == [paths[0], "x.jpg"] and len(index) == 446
    assert recall_of(index, naive(vectors[kept], kept, 10)) == 1


def test_an_unfinished_embedding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is there is indexed, with a warning. Shards may be written in any order."""
    vectors = unit_vectors(90)
    paths = write_embeddings(tmp_path, vectors, num_shards=3, num_images=90)
    late = tmp_path / "part-00001.parquet"
    late.rename(tmp_path / "late")
    index = build_index(tmp_path)
    assert len(index) == 60 and "has 60 of 90 images: the rest can be added with --update" in caplog.text
    caplog.clear()
    assert len(update_index(tmp_path)) == 60 and "has 60 of 90 images" in caplog.text
    (tmp_path / "late").rename(late)
    caplog.clear()
    index = update_index(tmp_path)
    order = [*range(30), *range(60, 90), *range(30, 60)]
    assert index.paths(range(90)) == [paths[row] for row in order] and not caplog.text
    assert recall_of(index, naive(vectors[order], np.arange(90), 10)) == 1


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    vectors = unit_vectors(60)
    write_embeddings(tmp_path, vectors)
    first = build_index(tmp_path)
    with pytest.raises(UserError, match=r"has an index already; update it \(--update\) or replace it \(--overwrite\)"):
        build_index(tmp_path)
    (tmp_path / "index-9.faiss").write_bytes(b"left by a process that was killed")
    (tmp_path / "index-notes.txt").write_text("of the user")
    second = build_index(tmp_path, overwrite=True)
    assert np.array_equal(first.search(QUERIES, 3)[1], second.search(QUERIES, 3)[1])
    shards = {"embed.json", "part-00000.parquet", "part-00001.parquet", "index-notes.txt"}
    assert set(os.listdir(tmp_path)) == shards | {"index.json", "index-1.faiss", "rows-1.parquet"}
    (tmp_path / "index.json").write_text("{")
    assert len(build_index(tmp_path, overwrite=True)) == 60
    with store.lock(tmp_path), pytest.raises(UserError, match="another process is embedding or indexing in"):
        build_index(tmp_path, overwrite=True)


def test_a_write_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_embeddings(tmp_path, unit_vectors(60))
    index = build_index(tmp_path)
    files = sorted(os.listdir(tmp_path))
    replace = os.replace

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        remove_rows(tmp_path, paths[:1])
    monkeypatch.setattr(os, "replace", replace)
    assert sorted(os.listdir(tmp_path)) == files and load_index(tmp_path).info == index.info


def test_other_embeddings_are_refused(tmp_path: Path) -> None:
    """Those of another model, shards that have changed, a path twice."""
    vectors = unit_vectors(80)
    paths = write_embeddings(tmp_path, vectors[:60])
    index = build_index(tmp_path)
    write_shard(tmp_path, 2, ["new.jpg", paths[4]], list(vectors[60:62]))
    with pytest.raises(UserError, match=r"c4/000004\.jpg has two rows; every path must have one"):
        update_index(tmp_path)
    write_shard(tmp_path, 1, paths[30:60], list(vectors[40:70]))
    with pytest.raises(UserError, match=r"part-00001\.parquet has changed since it was indexed; build again"):
        update_index(tmp_path)
    write_info(tmp_path, 16, model="b" * 64)
    with pytest.raises(UserError, match="are embedded by another model than those of"):
        update_index(tmp_path)
    assert load_index(tmp_path).info == index.info


def test_bad_queries(tmp_path: Path) -> None:
    write_embeddings(tmp_path, unit_vectors(20))
    index = build_index(tmp_path)
    for queries, k, message in [
        (QUERIES[:, :8], 1, r"must be embeddings of shape \(Q, 16\), not \(50, 8\)"),
        (QUERIES[0], 1, r"must be embeddings of shape \(Q, 16\), not \(16,\)"),
        (2 * QUERIES, 1, "query 0 has length 2; embeddings must have length 1"),
        (np.nan * QUERIES, 1, "query 0 has length nan"),
        (QUERIES, 0, "k must be at least 1, not 0"),
    ]:
        with pytest.raises(UserError, match=message):
            index.search(queries, k)


def test_bad_embeddings(tmp_path: Path) -> None:
    """No folder of embeddings, damaged ones, none that is readable. Nothing is written then."""

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            build_index(tmp_path)
        assert not (tmp_path / "index.json").exists()

    vectors = unit_vectors(40)
    refused(r"has no embed\.json: it is not a folder of `ray-dmml embed`")
    (tmp_path / "embed.json").write_text('{"model": 3')
    refused(r"embed\.json is damaged: Invalid JSON")
    write_info(tmp_path, 16)
    refused(r"has no part-\*\.parquet: nothing is embedded yet")
    file = write_shard(tmp_path, 0, ["a", "b"], [vectors[0], 3 * vectors[1]])
    refused(r"part-00000\.parquet is damaged: an embedding has length 3 instead of 1")
    write_shard(tmp_path, 0, ["a", "b"], [vectors[0], np.nan * vectors[1]])
    refused(r"part-00000\.parquet is damaged: an embedding has length nan")
    write_shard(tmp_path, 0, ["a"], [vectors[0, :8]])
    refused(r"part-00000\.parquet is damaged: not every row has an embedding of size 16")
    write_shard(tmp_path, 0, [f"{n}" for n in range(40)], list(vectors))
    content = file.read_bytes()
    file.write_bytes(content[:-40])
    refused(r"part-00000\.parquet cannot be read: ")
    file.write_bytes(content[:4] + b"x" * 400 + content[404:])
    refused(r"part-00000\.parquet is damaged: ")
    file.unlink()
    write_info(tmp_path, 16)
    write_shard(tmp_path, 0, ["a", "b"], [vectors[0], None])
    with pytest.raises(UserError, match="recall must be above 0 and at most 1, not 95"):
        build_index(tmp_path, recall=95)


def test_no_readable_image(tmp_path: Path) -> None:
    write_embeddings(tmp_path, unit_vectors(4), num_shards=1)
    write_shard(tmp_path, 0, ["a", "b"], [unit_vectors(1)[0], None])
    index = build_index(tmp_path)
    assert len(index) == 1 and index.search(QUERIES, 3)[1].tolist() == [[0, -1, -1]] * 50


def test_damaged_indexes(tmp_path: Path) -> None:
    """A file that is cut, lost, or of another index."""
    for name, number in (("a", 60), ("b", 70)):
        write_embeddings(tmp_path / name, unit_vectors(number))
        build_index(tmp_path / name)
    folder, other = tmp_path / "a", tmp_path / "b"
    contents = {name: (folder / name).read_bytes() for name in ("index.json", "index.faiss", "rows.parquet")}

    def refused(name: str, content: bytes | None, message: str) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_index(folder)
        (folder / name).write_bytes(contents[name])
        load_index(folder)

    refused("index.json", None, r"a is not an index: it has no index\.json; `ray-dmml index` writes one")
    refused("index.json", contents["index.json"][:50], r"index\.json is damaged: Invalid JSON")
    wrong = json.dumps(json.loads(contents["index.json"]) | {"kind": "tree"}).encode()
    refused("index.json", wrong, r"index\.json is damaged: kind: Input should be 'flat' or 'ivf'")
    wrong = json.dumps(json.loads(contents["index.json"]) | {"files": None}).encode()
    refused("index.json", wrong, r"index\.json is damaged: files: ")
    refused("index.faiss", contents["index.faiss"][:-1], r"index\.faiss has 3,\d+ bytes instead of 3,\d+")
    refused("index.faiss", b"x" * len(contents["index.faiss"]), r"index\.faiss or rows\.parquet cannot be read")
    refused("index.faiss", None, r"is damaged: it has lost a file")
    refused("rows.parquet", None, r"is damaged: it has lost a file")
    refused("rows.parquet", contents["rows.parquet"][:-9], r"index\.faiss or rows\.parquet cannot be read")
    refused("rows.parquet", (other / "rows.parquet").read_bytes(), "its files do not belong together")
    refused("rows.parquet", (folder / "part-00000.parquet").read_bytes(), "its files do not belong together")
