"""Which images are meant by a folder, a manifest or a URI."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from embedding_samples import rows_of, write_photos

from ray_dmml import UserError, embed, list_images
from ray_dmml.embedding.place import find_images


def names(images: Path | str, root: Path | None = None) -> list[str]:
    return [os.fsdecode(path) for path in find_images(str(images), root)[1]]


def test_a_folder(tmp_path: Path) -> None:
    """Its images are those of list_images, in the order of their paths, without hidden files and system folders."""
    paths = ["a-b/x.png", "a.jpg", "a/1/y.png", "a/z.PNG", "a0.png", "ä/u.jpg", "\uffee.jpg", "\U0001f600.jpg"]
    others = ["notes.txt", ".hidden.jpg", ".thumbs/t.jpg", "@eaDir/t.jpg", "a/#recycle/u.jpg"]
    for path in [*paths, *others]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert names(tmp_path) == paths == sorted(paths)
    assert [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)] == paths


def test_a_manifest(tmp_path: Path) -> None:
    """Its paths are sorted, each once, relative to its folder or to the root. Other columns do not matter."""
    for path in ("photos/a.jpg", "photos/b/c.jpg", "photos/caf\u00e9.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    manifest = tmp_path / "list.csv"
    rows = ["label, path", "x,photos/b/c.jpg", "y,photos/./a.jpg", "x,photos/b/c.jpg", "z,photos/cafe\u0301.jpg"]
    manifest.write_text("\n".join([*rows, f"w,{tmp_path}/photos/missing.jpg"]))
    expected = ["a.jpg", "b/c.jpg", "caf\u00e9.jpg", "missing.jpg"]
    assert names(manifest) == [f"photos/{name}" for name in expected]
    manifest.write_text("path\na.jpg\n" + str(tmp_path / "photos/b/c.jpg"))
    assert names(manifest, tmp_path / "photos") == expected[:2]
    for content, message in [
        ("file\na.jpg", "has no column 'path' in its first line"),
        ("path,label\n,x", "line 2: path is empty"),
        ("path\n../../x.jpg", r"line 2: ../../x.jpg is outside of .*: name its folder \(root\)"),
        ("path,x_1,x_2,y_1,y_2\na.jpg,1,2,1,2", "line 2: it has a box"),
        ("path\n\udce9.jpg", "is not a CSV file in UTF-8"),
    ]:
        manifest.write_text(content, errors="surrogateescape")
        with pytest.raises(UserError, match=message):
            names(manifest)


def test_a_bucket_gives_the_rows_of_a_folder(s3, small_run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Images come from S3 itself. No file has its secret, and an object that is gone is a row with its error."""
    from ray_dmml.filesystem import open_uri

    write_photos(tmp_path / "photos")
    (tmp_path / "photos/a/empty.jpg").touch()
    uri = s3.uri("bucket/photos")
    files, base = open_uri(uri)
    for path in [*(tmp_path / "photos").rglob("*.*"), Path(".thumbs/t.jpg"), Path("notes.txt")]:
        inside = path.relative_to(tmp_path / "photos") if path.is_absolute() else path
        with files.open_output_stream(f"{base}/{inside}") as target:
            target.write(path.read_bytes() if path.is_absolute() else b"nothing")
    for out, images in [("folder", tmp_path / "photos"), ("bucket", uri)]:
        result = embed(small_run, images, tmp_path / out, local=True, batch_size=8)
        assert (result["num_images"], result["num_unreadable"]) == (22, 1)
    assert rows_of(tmp_path / "bucket").equals(rows_of(tmp_path / "folder"))
    text = (tmp_path / "bucket/embed.json").read_text()
    assert '"s3://bucket/photos"' in text and "secret" not in text
    with pytest.raises(UserError, match=r"s3://bucket/nothing (cannot be read|has no images)"):
        embed(small_run, s3.uri("bucket/nothing"), tmp_path / "out", local=True)
