"""The pictures of a run: which loggers get them, when, and of what."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny

from ray_dmml import Logger, train
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.training.evaluate import embed_run
from ray_dmml.training.pictures import MOST_EMBEDDINGS, draw_worst, sample_embeddings


class Taker(Logger):
    """Remembers what it gets."""

    def __init__(self, takes_pictures: bool = True) -> None:
        self.takes_pictures = takes_pictures
        self.rows: list[tuple[int, str, Any]] = []

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.rows += [(step, key, metrics[key]) for key in ("pictures", "embeddings", "final") if key in metrics]


def test_the_pictures_of_a_run(noisy_folder: Path, tmp_path: Path) -> None:
    """Views first, worst queries of each validation, and at the end a sample of the embeddings and the results. A
    logger that takes pictures changes no number."""
    raw = tiny(noisy_folder, train={"steps": 4, "evaluate_every": 2, "tensorboard": False, "pictures": 3})
    config, taker, other = Config.parse(raw), Taker(), Taker(takes_pictures=False)
    results = train(config, tmp_path / "run", local=True, progress=False, loggers=[taker])
    plain = train(config, tmp_path / "plain", local=True, progress=False, loggers=[other])
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "plain/metrics.jsonl").read_bytes()
    assert [key for _, key, _ in other.rows] == ["final"] and plain["ensemble"] == results["ensemble"]
    kinds = [(step, *(value if key == "pictures" else [key])) for step, key, value in taker.rows]
    assert kinds[0] == (0, "views") and kinds[-2:] == [(4, "embeddings"), (4, "final")]
    assert set(kinds[1:-2]) == {(2, "worst_queries"), (4, "worst_queries")}
    assert taker.rows[-1][2] == results
    for _, _, pictures in taker.rows[:-2]:
        [picture] = pictures.values()
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    sample = taker.rows[-2][2]
    test = load_splits(config.data).test
    assert test is not None and len(sample.names) == len(test)
    embedded = embed_run(tmp_path / "run").embeddings
    assert set(sample.embeddings) == {*embedded, "ensemble"}
    assert np.array_equal(sample.embeddings["peer1"], embedded["peer1"])


def test_the_worst_query_is_the_one_that_finds_its_class_last(noisy_folder: Path) -> None:
    """One-hot embeddings of the classes find all. An image that looks like another class finds its own last."""
    images = load_splits(Config.parse(tiny(noisy_folder, data={"decode_size": 48})).data).train
    embeddings = np.eye(images.num_classes, dtype=np.float32)[images.labels]
    assert draw_worst({"peer0": embeddings}, images, 4) == {}
    embeddings[7] = embeddings[0]
    assert images.labels[7] != images.labels[0]
    sheet = draw_worst({"peer0": embeddings}, images, 1)["worst_queries"]

    def place_of(index: int) -> list[int]:
        """Columns of a picture, which is drawn at twice its size."""
        inner = images.source.read(index).permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)[4:92, 4:92]
        corners = zip(*np.nonzero((sheet == inner[0, 0]).all(axis=2)), strict=True)
        return [int(c) for r, c in corners if np.array_equal(sheet[r : r + 88, c : c + 88], inner)]

    assert len(place_of(7)) == 1
    of_its_look = [place for index in np.flatnonzero(images.labels == images.labels[0]) for place in place_of(index)]
    assert of_its_look == sorted(of_its_look) and len(of_its_look) == 5 and of_its_look[0] > place_of(7)[0]


def test_an_image_that_is_gone_is_a_warning(
    noisy_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from ray_dmml.training.pictures import Pictures

    class Gone:
        def read(self, index: int) -> torch.Tensor:
            raise OSError("the disk is gone")

        def name(self, index: int) -> str:
            return str(index)

        def __len__(self) -> int:
            return 4

    from ray_dmml.data.dataset import ImageSet

    gone: Any = ImageSet(Gone(), np.array([0, 0, 1, 1]), ("a", "b"))  # type: ignore[arg-type]
    taker = Taker()
    with caplog.at_level(logging.WARNING, "ray_dmml"):
        pictures = Pictures(Config.parse(tiny(noisy_folder, train={"pictures": 3})), taker)
        pictures.show_views(gone)
        pictures.show_worst({"peer0": np.eye(4, dtype=np.float32)}, gone, 3)
        pictures.hand_over(wait=True)
        pictures.close()
    assert [record.getMessage() for record in caplog.records] == [
        "there are no pictures for the loggers (OSError: the disk is gone); training goes on"
    ]
    assert taker.rows == []


def test_a_sample_has_a_limit(noisy_folder: Path) -> None:
    images = load_splits(Config.parse(tiny(noisy_folder)).data).train
    many = images.subset(range(len(images)))
    assert len(sample_embeddings({"peer0": np.zeros((len(many), 2), np.float32)}, many).names) == len(many)
    assert len(many) < MOST_EMBEDDINGS
