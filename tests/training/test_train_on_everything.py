"""Training on all classes, for the net that is deployed. It is evaluated on validation classes, or not at all."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import IMAGES_PER_CLASS, NUM_CLASSES, as_in_training, tiny

from ray_dmml import Config, UserError, evaluate, load_cohort, train
from ray_dmml.data.datasets import load_splits
from ray_dmml.loggers.results_tables import results_table

SHORT = {"steps": 2, "evaluate_every": 1, "log_every": 1}


def all_classes(root: Path, validation_fraction: float) -> dict[str, Any]:
    raw = tiny(root, train=SHORT, checkpoint={"every_steps": 0})
    raw["data"] |= {"train_fraction": 1, "validation_fraction": validation_fraction}
    return raw


def manifest(root: Path, folder: Path, *, with_split: bool) -> dict[str, Any]:
    """The same images by a manifest in which every row trains."""
    path = folder / "photos.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", *(["split"] if with_split else [])])
        for image in sorted(root.glob("*/*.png")):
            writer.writerow([image.relative_to(root), image.parent.name, *(["train"] if with_split else [])])
    raw = all_classes(root, 0.25)
    del raw["data"]["train_fraction"]
    raw["data"] |= {"name": "manifest", "manifest": str(path)}
    return raw


def printed(results: dict[str, Any]) -> str:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as capture:
        results_table(results, console)
    return capture.get()


def test_without_validation_classes_the_run_is_not_evaluated(image_folder: Path, tmp_path: Path) -> None:
    """Every class trains. results.json has no figures, the table and `evaluate` say why, and the peers embed."""
    config = Config.parse(all_classes(image_folder, 0))
    splits = load_splits(config.data)
    assert splits.test is None and splits.validation is None and list(splits.digests()) == ["training"]
    assert (splits.train.num_classes, len(splits.train)) == (NUM_CLASSES, NUM_CLASSES * IMAGES_PER_CLASS)
    run = tmp_path / "run"
    results = train(config, run, local=True)
    assert json.loads((run / "results.json").read_text()) == results
    assert results["split"] is results["num_classes"] is results["num_images"] is None
    assert results["peers"] == results["ensemble"] == results["untrained"] == results["untrained_ensemble"] == {}
    assert (results["weights"], results["step"]) == ("last", 2)
    assert "not evaluated: all classes were trained on" in printed(results)
    with pytest.raises(UserError, match=r"all its images were trained on; give other images .*\(data\)"):
        evaluate(run)
    files = sorted(image_folder.glob("*/0.png"))
    embeddings = load_cohort(run).embed_files(files)
    assert embeddings.shape == (NUM_CLASSES, 32)
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    longer = Config.parse({**all_classes(image_folder, 0), "train": {**SHORT, "steps": 3}})
    assert train(longer, resume=run, local=True)["step"] == 3


@pytest.mark.parametrize("with_split", [True, False])
def test_a_manifest_without_test_rows(image_folder: Path, tmp_path: Path, with_split: bool) -> None:
    """It is the folder with train_fraction 1: all rows are of split train, or there is no such column."""
    listed = load_splits(Config.parse(manifest(image_folder, tmp_path, with_split=with_split)).data)
    splits = load_splits(Config.parse(all_classes(image_folder, 0.25)).data)
    assert splits.test is None and splits.validation is not None
    assert splits.train.num_classes + splits.validation.num_classes == NUM_CLASSES
    assert listed.digests() == splits.digests()


def test_with_validation_classes_the_run_is_evaluated_on_them(image_folder: Path, tmp_path: Path) -> None:
    """The best checkpoint is chosen, and the final figures, with those of the untrained peers, are of these classes."""
    config = Config.parse(all_classes(image_folder, 0.25))
    run = tmp_path / "run"
    results = train(config, run, local=True)
    assert (results["split"], results["num_classes"], results["num_images"]) == ("validation", 4, 20)
    assert results["weights"] == "best" and set(results["untrained"]) == set(results["peers"]) == {"peer0", "peer1"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = next(row["validation"] for row in rows if "validation" in row and row["step"] == results["step"])
    systems = ("peers", "ensemble")
    assert {key: best[key] for key in systems} == as_in_training({key: results[key] for key in systems})
    assert "4 validation classes" in printed(results)
    again = evaluate(run)
    assert again == {key: results[key] for key in again}


def test_a_split_that_is_not_there_is_refused(image_folder: Path, tmp_path: Path) -> None:
    """A config that asks for figures of test classes does not get others."""
    raw = all_classes(image_folder, 0.25)
    raw["evaluation"] = {"split": "test"}
    with pytest.raises(UserError, match=r"no test classes: data\.train_fraction is 1"):
        Config.parse(raw)
    raw = manifest(image_folder, tmp_path, with_split=True)
    raw["evaluation"] = {"split": "test"}
    with pytest.raises(UserError, match=r"evaluation\.split is test, but the data set has no test images"):
        train(Config.parse(raw), tmp_path / "run", local=True)
    assert not (tmp_path / "run").exists()
