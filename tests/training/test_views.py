"""The contact sheet of a config's views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Refused, tiny
from PIL import Image

from ray_dmml.cli.views import views
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.loader import Batch
from ray_dmml.errors import UserError
from ray_dmml.peer.build import build_views
from ray_dmml.training.views import draw_views, view_columns, write_views


@pytest.fixture(scope="module")
def config(image_folder: Path) -> Config:
    """A strong and a weak view of different sizes, and two frozen peers, one of which embeds the evaluation view."""
    raw = tiny(image_folder, seed=5)
    raw["cohort"]["peers"] = [
        {"view": "strong", "seed": 3},
        {"view": [{"name": "RandomCrop"}], "input_size": 24, "eval_crop": 0.8, "backbone": "test_efficientnet"},
        {"frozen": True, "weights": "pretrained", "view": "weak"},
        {"frozen": True, "weights": "pretrained", "view": "weak", "teacher_view": "evaluation"},
    ]
    return Config.parse(raw)


def test_the_pictures_are_what_the_nets_of_a_training_get(config: Config) -> None:
    """To the byte what each peer computes of a batch, at its size; an evaluation view once for all peers that share
    it."""
    splits = load_splits(config.data)
    images = splits.train
    batch = torch.stack([images.source.read(index) for index in (4, 0, 9)])
    decoded, strong, crop, taught, evaluation, small = view_columns(config, batch, num_draws=2, seed=3)
    assert torch.equal(decoded.pictures[0], batch) and decoded.note == "36\N{NO-BREAK SPACE}px"
    views = [build_views(config, i, splits) for i in range(4)]
    for peer, its, columns in zip(config.cohort.peers, views, (strong, crop, taught), strict=False):
        assert columns.title == peer.name and len(columns.pictures) == 2
        for step, picture in zip((6, 7), columns.pictures, strict=True):
            assert torch.equal(picture, its.of_batch(Batch(step, batch, torch.zeros(3))).images)
    assert [columns.note.replace("\N{NO-BREAK SPACE}", " ") for columns in (strong, taught)] == [
        "view strong, 32 px",
        "frozen, view weak, 32 px",
    ]
    assert torch.equal(evaluation.pictures[0], views[3].eval_view(batch))
    assert torch.equal(small.pictures[0], views[1].eval_view(batch))
    assert evaluation.note.startswith("peer0, peer2, peer3, 32") and small.note.startswith("peer1, 24")


def test_another_seed_gives_other_images(config: Config) -> None:
    """The same seed gives the same picture. Images are of different classes as far as possible."""
    images = load_splits(config.data).train
    sheets = [np.asarray(draw_views(config, images, 20, num_draws=1, seed=seed)) for seed in (0, 0, 1)]
    assert np.array_equal(sheets[0], sheets[1]) and not np.array_equal(sheets[0], sheets[2])


def test_the_command(image_folder: Path, small_run: Path, tmp_path: Path, refused: Refused) -> None:
    """It writes one file, of a run or of a config, and replaces none unless it is told to."""
    file = tmp_path / "views.png"
    views(small_run, None, None, images=2, draws=1, seed=0, out=file)
    first = Image.open(file)
    assert first.mode == "RGB" and list(tmp_path.iterdir()) == [file]
    before = file.read_bytes()
    with refused("views.png already exists"):
        views(small_run, None, None, images=3, draws=1, seed=0, out=file)
    assert file.read_bytes() == before
    views(small_run, None, ["cohort.peers.0.view=strong"], images=3, draws=1, seed=0, out=file, overwrite=True)
    assert Image.open(file).height > first.height
    with refused("give RUN or --config, not both"):
        views(small_run, tmp_path / "a.yaml", None, images=3, draws=1, seed=0, out=tmp_path / "b.png")
    with refused("must be a file that ends with .png"):
        views(small_run, None, None, images=3, draws=1, seed=0, out=tmp_path / "b.pdf")
    with refused("gone is not a folder"):
        views(small_run, None, None, images=3, draws=1, seed=0, out=tmp_path / "gone" / "b.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort.peers.0.view": [{"name": "RandomCorp"}]}, "view of peer0: unknown transform 'RandomCorp'; did you"),
        ({"cohort.peers.1.view": []}, "view of peer1 gives torch.uint8 .*36, 36.*, but the net takes"),
        ({"data.root": "/nowhere"}, "data.root /nowhere is not an existing folder"),
    ],
)
def test_a_mistake_is_one_sentence(config: Config, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_views(config.with_overrides(changes), tmp_path / "views.png")
    assert not list(tmp_path.iterdir())
