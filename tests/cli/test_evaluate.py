"""`ray-dmml evaluate`: what it prints and writes, and that each mistake is one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import tiny, write_image
from typer.testing import CliRunner

from ray_dmml import Config, evaluate, load_cohort, train
from ray_dmml.cli.main import app
from ray_dmml.training.evaluate import embed_run


def cli(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def complaint(*arguments: str | Path) -> str:
    """The error of the command: the last line on standard error, with exit code 2."""
    ended = cli(*arguments)
    assert ended.exit_code == 2 and isinstance(ended.exception, SystemExit), ended.output
    *warnings, error = ended.stderr.strip().splitlines()
    assert error.startswith("error: ") and all(line.startswith(("warning: ", "checking ")) for line in warnings), (
        ended.stderr
    )
    assert ended.stdout == ""
    return error


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of 4 classes in 2 categories; two photos of the first class are of one sequence."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(7)
    rows = ["path,label,category,sequence,colour"]
    for number in range(4):
        for image in range(4):
            write_image(root / f"c{number}" / f"{image}.png", rng, 3 * number)
            sequence = "burst" if number == 0 and image < 2 else ""
            rows.append(f"c{number}/{image}.png,c{number},{'[red]' if number < 2 else ''},{sequence},x")
    (root / "photos.csv").write_text("\n".join(rows))
    return root / "photos.csv"


def test_everything_that_can_be_asked_for(
    small_run: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables of the figures with intervals, thresholds, categories, classes, subsets and clusters; the same as JSON;
    embeddings in a file. A note names the column that is not used."""
    monkeypatch.setattr("ray_dmml.training.embeddings_file.ROWS_AT_A_TIME", 5)
    options = ("--data", manifest, "--per-class", "--clustering", "--subsets")
    ended = cli(small_run, *options, "--embeddings", tmp_path / "e.parquet")
    assert ended.exit_code == 0, ended.output
    assert ended.stderr.count("are not used: colour") == 1
    results = evaluate(small_run, data=manifest, per_class=True, clustering=True, subsets=True)
    (low, high), value = results["intervals"]["ensemble"]["recall@1"], results["ensemble"]["recall@1"]
    assert f"│ ensemble │ {100 * value:.1f} ±{50 * (high - low):.1f} │" in ended.stdout
    threshold = results["verification"]["peer0"]["threshold@0.01"]
    assert re.search(rf"│ peer0 +│ .*│ +{threshold:.3f} ±", ended.stdout)
    assert "46 pairs of one class and 192 of two" in ended.stdout
    for text in ("threshold at FMR 1 %", "categories by the ensemble", "│ [red] ", "(none)", "classes by the ensemble"):
        assert text in ended.stdout
    assert "│ peer0 + peer1 │" in ended.stdout and "AMI" in ended.stdout
    assert json.loads(cli(small_run, *options, "--json").stdout) == results
    assert results["num_evaluated"] == 16 and len(results["classes"]) == 4 and len(results["subsets"]) == 3
    assert [row["num_queries"] for row in results["categories"]] == [8, 8]
    assert results["clustering"].keys() == {"peer0", "peer1", "ensemble"}

    table = pq.read_table(tmp_path / "e.parquet")
    assert os.listdir(tmp_path) == ["e.parquet"]
    files = sorted(manifest.parent.glob("*/*.png"))
    assert table["path"].to_pylist() == [str(file.relative_to(manifest.parent)) for file in files]
    assert table["label"].to_pylist() == [file.parent.name for file in files]
    cohort = load_cohort(small_run)
    wanted = {name: peer.embed_files(files) for name, peer in cohort.peers.items()}
    wanted["ensemble"] = cohort.embed_files(files)
    assert table.column_names == ["path", "label", *wanted]
    for name, vectors in wanted.items():
        assert table.schema.field(name).type.list_size == vectors.shape[1]
        np.testing.assert_allclose(np.array(table[name].to_pylist(), np.float32), vectors, atol=1e-6)


def test_images_of_one_sequence_are_not_matched(small_run: Path, manifest: Path) -> None:
    """By the column `sequence`, unless `data.exclude_same` names another one or none."""
    found = embed_run(small_run, data=manifest).evaluation().systems["ensemble"]
    assert found.num_relevant.tolist() == [2, 2, *14 * [3]]
    assert 1 not in found.neighbors[0] and 0 not in found.neighbors[1]
    ended = cli(small_run, "--data", manifest, "--set", "data.exclude_same=null", "--json")
    assert "are not used: sequence, colour" in ended.stderr
    assert json.loads(ended.stdout)["verification"]["peer0"]["num_positive_pairs"] == 4 * 4 * 3
    assert evaluate(small_run, data=manifest)["verification"]["peer0"]["num_positive_pairs"] == 4 * 4 * 3 - 2
    assert "has no column 'shot'" in complaint(small_run, "--data", manifest, "--set", "data.exclude_same=shot")


def test_a_checkpoint_is_evaluated(small_run: Path, manifest: Path) -> None:
    """Its folder stands for it; the last one has the figures of the run, the first one those of the untrained peers."""
    first, last = sorted((small_run / "checkpoints").glob("step-*"))
    results = evaluate(last)
    assert (results["weights"], results["step"]) == ("checkpoint", 1)
    own = json.loads((small_run / "results.json").read_text())
    assert results["peers"] == own["peers"] and results["intervals"] == own["intervals"]
    untrained = json.loads(cli(first, "--json").stdout)
    for name, figures in own["untrained"].items():
        assert figures == {metric: untrained["peers"][name][metric] for metric in figures}
    assert "weights: checkpoint (step 0)" in cli(first, "--data", manifest).stdout
    assert "is one checkpoint; give the run" in complaint(first, "--weights", "best")
    other = json.loads(cli(last, "--set", "data.exclude_same=null", "--json").stdout)
    assert results["untrained"] and other["untrained"] == {}  # it was measured with what data.exclude_same was
    assert other["peers"] == results["peers"]


def test_bad_images_are_named(small_run: Path, manifest: Path, tmp_path: Path) -> None:
    """One class of one image; queries without a match; a K that the gallery is too small for."""
    photos = shutil.copytree(manifest.parent, tmp_path / "photos")
    head, csv = "path,label,split,is_query,is_gallery\n", photos / "some.csv"
    csv.write_text("path,label\nc0/0.png,a\n")
    assert "images are of 1 classes; at least 2 are needed" in complaint(small_run, "--data", csv)
    csv.write_text(head + "c0/0.png,a,validation,1,0\nc1/0.png,b,validation,0,1\n")
    assert "no test image has another of its class to find" in complaint(small_run, "--data", csv)
    rows = ("c0/0.png,a,validation,1,0", "c0/1.png,a,validation,0,1", "c1/0.png,b,validation,1,1")
    csv.write_text(head + "\n".join(rows))
    assert "Recall@2 says nothing where a query is compared with 2 images" in complaint(small_run, "--data", csv)
    ended = cli(small_run, "--data", csv, "--set", "evaluation.recall_at=[1]", "--json")
    results = json.loads(ended.stdout)
    assert (results["num_queries"], results["num_evaluated"]) == (2, 1) and results["intervals"]["ensemble"] == {}


def test_what_is_gone_or_damaged_is_named(small_run: Path, manifest: Path, tmp_path: Path, image_folder: Path) -> None:
    """Images, a checkpoint, and the file of the embeddings that is there already."""
    run = shutil.copytree(small_run, tmp_path / "run")
    images = shutil.copytree(image_folder, tmp_path / "images")
    (images / "class15" / "0.png").unlink()
    gone = complaint(run, "--set", f"data.root={images}")
    assert "the test images of" in gone and "have changed: 1 missing or unreadable (class15/0.png)" in gone
    taken = tmp_path / "taken.parquet"
    taken.write_text("mine")
    assert f"{taken} already exists" in complaint(run, "--data", manifest, "--embeddings", taken)
    assert taken.read_text() == "mine"
    nowhere = tmp_path / "no" / "e.parquet"
    assert "is not an existing folder" in complaint(run, "--data", manifest, "--embeddings", nowhere)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if not os.access(locked, os.W_OK):  # root may write everywhere
        assert "permission to write" in complaint(run, "--data", manifest, "--embeddings", locked / "e.parquet")
    *_, last = sorted((run / "checkpoints").glob("step-*"))
    (last / "peer1" / "weights.safetensors").write_bytes(b"damaged")
    assert "weights.safetensors is damaged" in complaint(last)
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "manifest.json").write_text("{")
    assert re.search("no checkpoint in .* can be used", complaint(run))


def test_faults_are_found_before_images_are_embedded(
    small_run: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedding takes minutes, which must not be lost."""
    monkeypatch.setattr("ray_dmml.cohort.local.LocalCohort", None)
    assert "says nothing" in complaint(small_run, "--data", manifest, "--set", "evaluation.recall_at=[15]")
    monkeypatch.setattr("ray_dmml.evaluation.details.MAX_PEERS", 1)
    assert "subsets of 2 peers are too many" in complaint(small_run, "--data", manifest, "--subsets")


def test_a_run_without_test_classes(image_folder: Path, tmp_path: Path) -> None:
    """It has nothing to be evaluated on, which results.json says, too."""
    data = {"validation_fraction": 0, "train_fraction": 1}
    raw = tiny(image_folder, train={"steps": 1, "evaluate_every": 0}, data=data)
    results = train(Config.parse(raw), tmp_path / "run", local=True)
    assert results["warnings"] == [] and results["peers"] == {}
    assert "all its images were trained on; give other images" in complaint(tmp_path / "run")
