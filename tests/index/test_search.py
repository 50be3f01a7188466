"""Queries are embedded by the run that embedded the images; the page of results; the two commands."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny
from embedded import unit_vectors, write_info, write_shard
from PIL import Image
from typer.testing import CliRunner

from ray_dmml import Config, UserError, build_index, list_images, load_cohort, load_index, train
from ray_dmml.cli.main import app
from ray_dmml.index.match import Match
from ray_dmml.index.page import Answer, search_page
from ray_dmml.index.queries import find, load_embedder


@pytest.fixture(scope="module")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(Config.parse(tiny(image_folder, train={"steps": 1}, evaluation={"untrained": False})), out, local=True)
    return out


@pytest.fixture(scope="module")
def index(run: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an index of all images by the ensemble."""
    return embed(run, image_folder, tmp_path_factory.mktemp("index"), "ensemble")


def embed(run: Path, images: Path, out: Path, peer: str) -> Path:
    cohort = load_cohort(run)
    model = cohort if peer == "ensemble" else cohort.peers[peer]
    files = list_images(images)
    vectors = model.embed_files(files)
    write_info(out, vectors.shape[1], model=model.fingerprint, peer=peer, run=str(run), root=str(images))
    write_shard(out, 0, [str(file.relative_to(images)) for file in files], list(vectors))
    build_index(out)
    return out


def invoke(*arguments: str | Path | int) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def refused(message: str, *arguments: str | Path | int) -> None:
    """The command ends with one sentence on standard error and exit code 2."""
    ended = invoke(*arguments)
    assert ended.exit_code == 2, ended.output
    lines = ended.stderr.splitlines()
    assert len(lines) == 1 and re.search(f"^error: .*{message}", lines[0]), ended.stderr


def test_images_are_found(index: Path, image_folder: Path) -> None:
    """An image of the index is most similar to itself; --path leaves it out. Queries are in the order given."""
    files = [image_folder / "class07/2.png", image_folder / "class00/4.png"]
    ended = invoke("search", index, *files, "--path", "class03/1.png", "-k", 4, "--json")
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    assert found["root"] == str(image_folder)
    answers = found["queries"]
    assert [answer["query"] for answer in answers] == [*map(str, files), "class03/1.png"]
    assert [[match["rank"] for match in answer["results"]] for answer in answers] == [[1, 2, 3, 4]] * 3
    for answer, file in zip(answers, files, strict=False):
        first = answer["results"][0]
        assert (image_folder / first["path"], round(first["similarity"], 4)) == (file, 1)
    loaded = load_index(index)
    vectors = np.stack([loaded.vector(row) for row in range(len(loaded))])
    own = loaded.id_of("class03/1.png")
    similarities = vectors @ vectors[own]
    similarities[own] = -1
    expected = np.argsort(-similarities)[:4]
    assert [match["id"] for match in answers[2]["results"]] == expected.tolist()
    assert [match["path"] for match in answers[2]["results"]] == loaded.paths(expected)


def test_the_table_and_the_threshold(index: Path, image_folder: Path) -> None:
    file = image_folder / "class07/2.png"
    ended = invoke("search", index, file, "-k", 3)
    assert ended.exit_code == 0 and file.name in ended.stdout
    rows = re.findall(r"│ +(\d) │ +(\S+) │ (\S+) +│", ended.stdout)
    assert [row[0] for row in rows] == ["1", "2", "3"] and rows[0][1:] == ("1.0000", "class07/2.png")
    similarities = sorted((float(row[1]) for row in rows), reverse=True)
    middle = (similarities[1] + similarities[2]) / 2
    [answer] = json.loads(invoke("search", index, file, "--threshold", middle, "--json").stdout)["queries"]
    assert len(answer["results"]) == 2
    ended = invoke("search", index, "--path", "class07/2.png", "--threshold", 1)
    assert "class07/2.png: nothing is similar enough" in ended.stdout
    [answer] = json.loads(invoke("search", index, "--path", "class07/2.png", "-k", 500, "--json").stdout)["queries"]
    assert len(answer["results"]) == 79  # all others


def test_a_single_peer(run: Path, image_folder: Path, tmp_path: Path) -> None:
    index = load_index(embed(run, image_folder, tmp_path, "peer1"))
    model = load_embedder(index)
    [matches] = find(index, np.asarray(model.embed_files(image_folder / "class02/0.png")), 1)
    assert matches == [Match(1, pytest.approx(1, abs=1e-5), "class02/0.png", index.id_of("class02/0.png"))]


def test_another_model_is_refused(run: Path, index: Path, image_folder: Path, tmp_path: Path) -> None:
    """Other weights, a run that has moved, a folder that is no run. With --path no run is needed."""
    file, other, moved = image_folder / "class02/0.png", tmp_path / "other", tmp_path / "moved"
    raw = tiny(image_folder, train={"steps": 1}, evaluation={"untrained": False}, seed=5)
    train(Config.parse(raw), other, local=True)
    refused(
        "were embedded by another model than ensemble of .*other; give the run", "search", index, file, "--run", other
    )
    refused("is not the folder of a run", "search", index, file, "--run", tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(index, copy)
    content = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(content | {"run": "/gone"}))
    refused(r"the run /gone, which has embedded the images, is not there; .*\(--run\)", "search", copy, file)
    assert invoke("search", copy, "--path", "class02/0.png").exit_code == 0
    shutil.copytree(run, moved)
    assert invoke("search", copy, file, "--run", moved).exit_code == 0
    (copy / "index.json").write_text(json.dumps(content | {"peer": "peer0"}))
    refused("were embedded by another model than peer0 of", "search", copy, file)


def test_mistakes_are_sentences(index: Path, image_folder: Path, tmp_path: Path) -> None:
    file = image_folder / "class02/0.png"
    refused("is not an index: it has no index.json", "search", tmp_path, file)
    refused(r"gone\.png cannot be read: No such file", "search", index, tmp_path / "gone.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    refused(r"bad\.png cannot be read: it is not an image", "search", index, tmp_path / "bad.png")
    refused("give images to search for, or images of the index by --path", "search", index)
    refused(r"class99/0\.png is not an image of the index", "search", index, "--path", "class99/0.png")
    refused("--threshold must be from -1 to 1, not 90", "search", index, file, "--threshold", 90)
    refused(r"photo\.png already exists", "search", index, file, "--html", shutil.copy(file, tmp_path / "photo.png"))
    assert invoke("search", index, file, "-k", 0).exit_code == 2
    refused("--update, --remove and --overwrite are different commands", "index", index, "--update", "--overwrite")
    refused("--kind belongs to a new index", "index", index, "--update", "--kind", "flat")
    refused("--recall goes with a new index or --update", "index", index, "--remove", "x", "--recall", 0.9)
    refused("has an index already", "index", index)
    (tmp_path / "list.txt").write_bytes(b"\xff")
    refused(r"list\.txt cannot be read: it is not UTF-8", "index", index, "--remove-from", tmp_path / "list.txt")


def test_the_command_builds_and_changes(tmp_path: Path) -> None:
    """It prints what the index has; --json is the content of index.json."""
    source, out = tmp_path / "embedded", tmp_path / "index"
    vectors = unit_vectors(500)
    write_info(source, 16, peer="peer0")
    write_shard(source, 0, [f"{row}.jpg" for row in range(451)], [*vectors[:450], None])
    ended = invoke("index", source, "--out", out, "--kind", "ivf", "--recall", 0.9)
    assert ended.exit_code == 0, ended.output
    info = load_index(out).info
    assert ended.stdout.splitlines() == [
        f"{out}: 450 images (1 unreadable and left out), peer0, 16 dimensions",
        f"ivf: a search reads {info.num_probed} of 11 lists, recall@10 {info.recall.measured:.3f} on 450 of the images",
    ]
    write_shard(source, 1, [f"b{row}.jpg" for row in range(50)], list(vectors[450:]))
    assert invoke("index", source, "--out", out, "--update").stdout.startswith("images added: 50\n")
    (tmp_path / "gone.txt").write_text("3.jpg\n4.jpg\n\n", encoding="utf-8")
    ended = invoke("index", out, "--remove", "b0.jpg", "--remove-from", tmp_path / "gone.txt", "--json")
    assert json.loads(ended.stdout)["num_rows"] == 497 == len(load_index(out))
    refused(r"3\.jpg is not an image of the index", "index", out, "--remove", "3.jpg")
    assert invoke("index", source, "--out", out, "--overwrite").stdout.endswith("flat: every search is exact\n")


class Pictures(HTMLParser):
    """The pictures of a page, and every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        for name, value in attributes:
            if name in ("src", "href", "srcset"):
                prefix, _, content = str(value).partition(",")
                self.addresses.append(prefix)
                self.sizes.append(Image.open(io.BytesIO(base64.b64decode(content))).size)


def test_the_page(index: Path, image_folder: Path, tmp_path: Path) -> None:
    """One file with all pictures in it, small ones."""
    large = tmp_path / "large & wide.png"
    Image.open(image_folder / "class07/2.png").resize((1200, 600)).save(large)
    page = tmp_path / "page.html"
    ended = invoke("search", index, large, "--path", "class01/1.png", "-k", 3, "--html", page)
    assert ended.exit_code == 0 and ended.stdout.endswith(f"pictures: {page}\n")
    text = page.read_text()
    pictures = Pictures()
    pictures.feed(text)
    assert pictures.addresses == ["data:image/jpeg;base64"] * 8
    assert pictures.sizes[0] == (256, 128) and max(max(size) for size in pictures.sizes) == 256
    assert "large &amp; wide.png" in text and "http" not in text


def test_names_and_lost_files(tmp_path: Path) -> None:
    """Names cannot add elements to the page. A file that is gone leaves its place empty."""
    name = '"><script>alert(1)</script>.png'
    matches = [Match(1, 0.5, name, 0), Match(2, 0.25, "s3://bucket/b.png", 1)]
    pictures = Pictures()
    pictures.feed(text := search_page([Answer(name, None, matches), Answer("b", None, [])], str(tmp_path), 9))
    assert pictures.sizes == [] and "<script" not in text and text.count("no picture") == 4
    assert "nothing is similar enough" in text and "1 · 0.500" in text
    with pytest.raises(UserError, match=r"a page of 2,001 pictures is too large, the most are 2,000; lower -k"):
        search_page([Answer(name, None, matches * 1000)], None, 9)
