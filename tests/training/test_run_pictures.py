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
from ray_dmml.data.dataset import ImageSet
from ray_dmml.data.datasets import load_splits
from ray_dmml.evaluation.retrieval import Retrieval, retrieve
from ray_dmml.loggers.pictures import BADGE, RIGHT, WRONG, Columns, draw_sheet
from ray_dmml.training.evaluate import embed_run
from ray_dmml.training.pictures import CELL, MOST_EMBEDDINGS, NUM_NEIGHBORS, draw_worst, sample_embeddings


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


def retrieved(embeddings: np.ndarray, images: ImageSet) -> Retrieval:
    return retrieve(embeddings, images, recall_at=(1,), keep=NUM_NEIGHBORS, all_metrics=False)


def test_a_small_gallery_has_no_frames_around_nothing(noisy_folder: Path) -> None:
    images = load_splits(Config.parse(tiny(noisy_folder)).data).train
    first = images.labels == images.labels[0]
    few = images.subset([*np.flatnonzero(first)[:2].tolist(), int(np.flatnonzero(~first)[0])])
    embeddings = np.array([[1, 0], [0, 1], [1, 0]], np.float32)  # the first is nearer to the last one, of another class
    sheet = draw_worst(retrieved(embeddings, few), few, 1)["worst_queries"]
    picture = torch.zeros(1, 3, CELL, CELL, dtype=torch.uint8)
    one_of_each = draw_sheet([("", "")], [Columns("", "", ("", ""), (picture, picture), ([True], [False]))], CELL)
    for color in (RIGHT, WRONG):  # three of the five places are empty
        assert (sheet == color).all(axis=2).sum() == (np.asarray(one_of_each) == color).all(axis=2).sum()


def test_the_worst_query_is_the_one_that_finds_its_class_last(noisy_folder: Path) -> None:
    """One-hot embeddings of the classes find all. An image that looks like another class finds its own last."""
    images = load_splits(Config.parse(tiny(noisy_folder, data={"decode_size": 48})).data).train
    embeddings = np.eye(images.num_classes, dtype=np.float32)[images.labels]
    assert draw_worst(retrieved(embeddings, images), images, 4) == {}
    embeddings[7] = embeddings[0]
    assert images.labels[7] != images.labels[0]
    sheet = draw_worst(retrieved(embeddings, images), images, 1)["worst_queries"]

    def place_of(index: int) -> list[int]:
        """Columns of a picture, which is drawn at twice its size."""
        inner = images.source.read(index).permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)[BADGE:92, BADGE:92]
        corners = zip(*np.nonzero((sheet == inner[0, 0]).all(axis=2)), strict=True)
        return [int(c) for r, c in corners if np.array_equal(sheet[r : r + len(inner), c : c + len(inner)], inner)]

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

    gone: Any = ImageSet(Gone(), np.array([0, 0, 1, 1]), ("a", "b"))  # type: ignore[arg-type]
    taker = Taker()
    with caplog.at_level(logging.WARNING, "ray_dmml"):
        pictures = Pictures(Config.parse(tiny(noisy_folder, train={"pictures": 3})), taker)
        pictures.show_views(gone)
        pictures.show_worst(retrieved(np.eye(4, dtype=np.float32), gone), gone, 3)
        pictures.hand_over(wait=True)
        pictures.close()
    assert [record.getMessage() for record in caplog.records] == [
        "there are no pictures for the loggers (OSError: the disk is gone); training goes on"
    ]
    assert taker.rows == []


def test_a_sample_has_a_limit(noisy_folder: Path) -> None:
    """Each row belongs to its image."""
    images = load_splits(Config.parse(tiny(noisy_folder)).data).train
    many = images.subset([number % len(images) for number in range(MOST_EMBEDDINGS + 50)])
    numbers = np.arange(len(many), dtype=np.float32)[:, None]
    sample = sample_embeddings({"peer0": numbers}, many)
    rows = sample.embeddings["peer0"][:, 0].astype(int).tolist()
    assert len(set(rows)) == MOST_EMBEDDINGS == len(sample.classes) == len(sample.thumbnails)
    assert sample.names == [many.source.name(row) for row in rows]
