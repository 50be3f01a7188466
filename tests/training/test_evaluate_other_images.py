"""`evaluate` on images that have moved, and on images that the run does not know."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny, write_image
from typer.testing import CliRunner

from ray_dmml import Config, UserError, evaluate, load_cohort, train
from ray_dmml.cli.main import app


@pytest.fixture(scope="module")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose images have moved since; not to be written into."""
    folder = tmp_path_factory.mktemp("moving")
    shutil.copytree(image_folder, folder / "images")
    train(Config.parse(tiny(folder / "images", train={"steps": 2})), folder / "run", local=True)
    (folder / "images").rename(folder / "elsewhere")
    return folder / "run"


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that the run has not seen, of 4 images."""
    root, rng = tmp_path_factory.mktemp("others"), np.random.default_rng(7)
    for number in range(3):
        for image in range(4):
            write_image(root / f"new{number}" / f"{image}.png", rng, 5 * number)
    return root


def recall_at_1(embeddings: np.ndarray, labels: list[str]) -> float:
    """By a loop over all pairs."""
    hits = 0
    for query, vector in enumerate(embeddings):
        scores = [float(vector @ other) if i != query else -2.0 for i, other in enumerate(embeddings)]
        hits += labels[int(np.argmax(scores))] == labels[query]
    return hits / len(embeddings)


def test_moved_images_give_the_same_figures(run: Path) -> None:
    """--set data.root says where they are now; the run's own files do not change."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"images is not an existing folder"):
        evaluate(run)
    elsewhere = run.parent / "elsewhere"
    ended = CliRunner().invoke(app, ["evaluate", str(run), "--set", f"data.root={elsewhere}", "--json"])
    assert ended.exit_code == 0, ended.output
    found, own = json.loads(ended.stdout), json.loads((run / "results.json").read_text())
    assert found.pop("data") == str(elsewhere)
    assert found == {key: own[key] for key in found}
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_other_images_are_all_test_images(run: Path, others: Path) -> None:
    """All classes of the folder are evaluated, by the nets that `load_cohort` loads; the run's own images are gone."""
    results = evaluate(run, data=others)
    assert (results["split"], results["num_classes"], results["num_images"]) == ("other", 3, 12)
    assert (results["data"], results["untrained"]) == (str(others), {})
    files = sorted(others.glob("*/*.png"))
    labels = [file.parent.name for file in files]
    assert results["ensemble"]["recall@1"] == recall_at_1(load_cohort(run).embed_files(files), labels)
    ended = CliRunner().invoke(app, ["evaluate", str(run), "--data", str(others)])
    assert ended.exit_code == 0, ended.output
    assert "12 other images of 3 classes" in ended.output and f"images: {others}" in ended.output


def test_a_manifest_of_other_images(run: Path, others: Path, tmp_path: Path) -> None:
    """Its rows of split validation with their queries and gallery; without such rows, all of them."""
    root = shutil.copytree(others, tmp_path / "photos")
    lines = [f"new{c}/{i}.png,new{c}" for c in range(3) for i in range(4)]
    (root / "all.csv").write_text("path,label\n" + "\n".join(lines))
    assert evaluate(run, data=root / "all.csv")["num_images"] == 12
    flags = [",train,," if c == 0 else f",validation,{int(i == 0)},{int(i > 0)}" for c in range(3) for i in range(4)]
    rows = [line + flag for line, flag in zip(lines, flags, strict=True)]
    (root / "some.csv").write_text("path,label,split,is_query,is_gallery\n" + "\n".join(rows))
    results = evaluate(run, data=root / "some.csv")
    assert (results["num_images"], results["num_queries"], results["num_gallery"]) == (8, 2, 6)


def test_images_that_were_trained_on_are_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Figures of the training images of a run are not those of unseen ones."""
    with caplog.at_level(logging.WARNING):
        results = evaluate(run, data=run.parent / "elsewhere")
    assert results["num_images"] == 80
    assert "30 of the images were trained on (class" in caplog.text
    assert "6 classes have the name of a class that was trained on (class" in caplog.text


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    """No such place, settings of the training, own images that have changed."""
    with pytest.raises(UserError, match="nowhere, do not exist"):
        evaluate(run, data=tmp_path / "nowhere")
    with pytest.raises(UserError, match="xx, do not exist"):
        evaluate(run, data=tmp_path / ("x" * 300))
    ended = CliRunner().invoke(app, ["evaluate", str(run), "--set", "train.steps=9"])
    assert ended.exit_code == 2 and "cannot change how it was trained: train.steps was 2 and is 9" in ended.stderr
    changed = shutil.copytree(run.parent / "elsewhere", tmp_path / "changed")
    (changed / "class15" / "0.png").unlink()
    ended = CliRunner().invoke(app, ["evaluate", str(run), "--set", f"data.root={changed}"])
    assert ended.exit_code == 2 and "have changed: 1 missing or unreadable (class15/0.png)" in ended.stderr


def test_other_images_that_cannot_be_read_can_be_left_out(run: Path, others: Path, tmp_path: Path) -> None:
    """With the setting that the message names."""
    photos = shutil.copytree(others, tmp_path / "photos")
    (photos / "new0" / "0.png").write_bytes(b"no image")
    arguments = ["evaluate", str(run), "--data", str(photos)]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 2 and "set data.on_bad_image=skip to leave out such images" in ended.stderr
    ended = CliRunner().invoke(app, [*arguments, "--set", "data.on_bad_image=skip"])
    assert ended.exit_code == 0 and "11 other images of 3 classes" in ended.output


def test_the_weights_asked_for_are_evaluated(run: Path, others: Path) -> None:
    """Each peer has the figures of its own embeddings."""
    labels = [file.parent.name for file in sorted(others.glob("*/*.png"))]
    for weights in ("last", "best"):
        results, cohort = evaluate(run, weights, data=others), load_cohort(run, weights)
        assert results["weights"] == weights
        whole = cohort.embed_files(sorted(others.glob("*/*.png")))
        for name, part in (("peer0", whole[:, :16]), ("peer1", whole[:, 16:])):
            assert results["peers"][name]["recall@1"] == recall_at_1(part, labels)
