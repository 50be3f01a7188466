"""The experiments' configs and scripts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import typer
from conftest import EXPERIMENTS
from PIL import Image

from ray_dmml.config.schema import Config, read_settings
from ray_dmml.tune.search_space import Search, load_search


@pytest.mark.parametrize("name", ["cars196", "cub200", "grocery", "inshop", "sop"])
def test_every_config_is_valid(name: str) -> None:
    """Each config loads with a folder of images; the list above is complete."""
    configs = EXPERIMENTS / "configs"
    assert Config.load(configs / f"{name}.yaml", ["data.root=somewhere"]).cohort.peers
    assert len(list(configs.glob("*.yaml"))) == 5


def test_the_example_of_a_search_is_valid() -> None:
    """Its config has the same name, and the config's own values are in its space."""
    raw = read_settings(EXPERIMENTS / "configs" / "grocery.yaml", ["data.root=somewhere"])
    search = Search(raw, load_search(EXPERIMENTS / "searches" / "grocery.yaml"))
    assert search.config_of(search.baseline) == search.base


def test_grocery_photos_get_the_names_of_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script turns a clone into files that grocery.csv lists, 128 px on the shorter side."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import prepare_grocery

    clone, out = tmp_path / "clone", tmp_path / "out"
    for name in (
        "train/Fruit/Apple/Golden-Delicious/Golden-Delicious_001.jpg",
        "val/Vegetables/Zucchini/Zucchini_001.jpg",
        "test/Packages/Milk/Arla-Standard-Milk/Arla-Standard-Milk_002.jpg",
    ):
        path = clone / "dataset" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((464, 348, 3), 120, np.uint8)).save(path)
    prepare_grocery.main(clone, out)
    made = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.jpg"))
    with (EXPERIMENTS / "configs" / "grocery.csv").open() as file:
        listed = {row["path"] for row in csv.DictReader(file)}
    assert len(made) == 3 and set(made) <= listed
    with Image.open(out / made[0]) as image:
        assert image.size == (128, 171)
    with pytest.raises(typer.BadParameter, match="already exists"):
        prepare_grocery.main(clone, out)


@pytest.mark.ray
def test_the_commit_of_a_row_is_unknown_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import provenance

    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() == "unknown"
