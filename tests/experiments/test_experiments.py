"""The experiments' configs and scripts."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_dmml.config.loading import read_settings
from ray_dmml.config.schema import Config
from ray_dmml.tune.search_space import Search, load_search

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize(
    "path", sorted((EXPERIMENTS / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_config_is_valid(path: Path) -> None:
    """Each experiment's config loads once it is told where its images are."""
    assert Config.load(path, ["data.root=somewhere"]).cohort.peers


@pytest.mark.parametrize(
    "path", sorted((EXPERIMENTS / "searches").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_search_is_valid(path: Path) -> None:
    """It is of the config of the same name, whose own values are in its space."""
    raw = read_settings(EXPERIMENTS / "configs" / path.name, ["data.root=somewhere"])
    search = Search(raw, load_search(path))
    assert search.config_of(search.baseline) == search.base


def test_grocery_photos_get_the_names_of_the_manifest(tmp_path: Path) -> None:
    """From a clone's layout the script makes files that grocery.csv lists, 128 px on the shorter side."""
    clone = tmp_path / "clone"
    for name in (
        "train/Fruit/Apple/Golden-Delicious/Golden-Delicious_001.jpg",
        "val/Vegetables/Zucchini/Zucchini_001.jpg",
        "test/Packages/Milk/Arla-Standard-Milk/Arla-Standard-Milk_002.jpg",
    ):
        path = clone / "dataset" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((464, 348, 3), 120, np.uint8)).save(path)
    command = [sys.executable, EXPERIMENTS / "prepare_grocery.py", clone, tmp_path / "out"]
    subprocess.run(command, check=True)
    made = sorted(
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.jpg")
    )
    with (EXPERIMENTS / "configs" / "grocery.csv").open() as file:
        listed = {row["path"] for row in csv.DictReader(file)}
    assert len(made) == 3 and set(made) <= listed
    with Image.open(tmp_path / "out" / made[0]) as image:
        assert image.size == (128, 171)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "already exists" in again.stderr


def test_the_code_of_a_row_is_unknown_without_git(
    ablations: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import provenance

    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() == "unknown"
