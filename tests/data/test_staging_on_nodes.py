"""Copies of the images on every node of a cluster."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny, write_image
from typer.testing import CliRunner

from ray_dmml.cli.main import app
from ray_dmml.config import yamlio
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.staging import fetch
from ray_dmml.errors import UserError

pytestmark = pytest.mark.ray


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def one_peer(root: Path, **changes: Any) -> dict[str, Any]:
    return tiny(root, cohort={**tiny(root)["cohort"], "peers": [{}]}, **changes)


@pytest.fixture
def images(image_folder: Path, tmp_path: Path) -> Path:
    """A folder of images that a test may change."""
    place = tmp_path / "shared drive" / "images"
    shutil.copytree(image_folder, place)
    return place


def test_every_node_makes_itself_a_copy(
    ray_start_4_cpus: None, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command does so over a cluster, and so does a run whose peers start on a new node."""
    import ray

    from ray_dmml.ray_backend.ray_cohort import RayCohort

    raw = one_peer(images, data={"root": str(tmp_path / "copy"), "source": str(images)})
    file = tmp_path / "config.yaml"
    file.write_text(yamlio.dump(raw))
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    ended = CliRunner().invoke(app, ["data", "fetch", "--config", str(file)])
    assert ended.exit_code == 0, ended.output
    assert ray.util.get_node_ip_address() in ended.output
    assert files_of(tmp_path / "copy") == files_of(images)
    write_image(images / "class00" / "new.png", np.random.default_rng(0), 0)
    ended = CliRunner().invoke(app, ["data", "fetch", "--config", str(file)])
    assert ended.exit_code == 0, ended.output
    assert files_of(tmp_path / "copy") == files_of(images)

    config = Config.load(file)
    splits = load_splits(config.data)
    shutil.rmtree(tmp_path / "copy")
    cohort = RayCohort(config, splits)
    try:
        assert files_of(tmp_path / "copy") == files_of(images)
        assert len(cohort.run(0, 1, lambda finished: None)) == 1
    finally:
        cohort.close()

    raw["data"]["source"] = str(tmp_path / "nowhere")
    raw["data"]["root"] = str(tmp_path / "other")
    file.write_text(yamlio.dump(raw))
    ended = CliRunner().invoke(app, ["data", "fetch", "--config", str(file)])
    assert ended.exit_code == 2 and "cannot be copied" in ended.output


OTHERS = r"peer\d: the (training|validation) images on host .* are not those that the driver has"


def test_copies_of_two_times_are_not_trained_on(
    ray_start_4_cpus: None, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver has an old copy, and a photo was added before the peers' nodes made theirs: an index
    would mean one image here and another there. `data fetch` makes them equal."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    config = Config.parse(one_peer(images, data={"root": None, "source": str(images)}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "the driver's"))  # Ray's processes have another
    splits = load_splits(config.data)
    write_image(images / "class00" / "added.png", np.random.default_rng(0), 0)
    with pytest.raises(UserError, match=f"{OTHERS}: .*data fetch"):
        RayCohort(config, splits).close()
    fetch(config.data, again=True)
    with closing(RayCohort(config, load_splits(config.data))) as cohort:
        assert len(cohort.run(0, 1, lambda finished: None)) == 1


def test_a_folder_of_two_times_is_not_trained_on(ray_start_4_cpus: None, images: Path) -> None:
    """Nodes may see the changes of a mount at different times."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    config = Config.parse(one_peer(images))
    splits = load_splits(config.data)
    (images / "class00" / "0.png").rename(images / "class00" / "00.png")
    with pytest.raises(UserError, match=f"{OTHERS}: .*the same data.root"):
        RayCohort(config, splits).close()
