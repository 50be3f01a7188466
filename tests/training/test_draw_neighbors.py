"""draw_neighbors: the right images with the right frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_dmml import UserError, draw_neighbors
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.loggers.pictures import RIGHT, WRONG
from ray_dmml.training.evaluate import embed_run


def num_pixels(picture: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(picture) == color).all(axis=2).sum())


def test_the_frames_are_those_of_a_naive_search(small_run: Path, noisy_folder: Path) -> None:
    """All queries, so that it does not matter which are drawn: of the ensemble by default, or of a peer. The worst ones
    are those that fail."""
    embedded = embed_run(small_run, data=noisy_folder)
    labels, num_images = embedded.images.labels, len(embedded.images)
    systems = {None: ensemble_embedding(list(embedded.embeddings.values())), "peer1": embedded.embeddings["peer1"]}
    of_right, of_wrong = set[float](), set[float]()
    for system, vectors in systems.items():
        right = wrong = failed = 0
        for query in range(num_images):
            others = [other for other in range(num_images) if other != query]
            nearest = sorted(others, key=lambda other: -float(vectors[query] @ vectors[other]))[:3]
            is_right = [bool(labels[other] == labels[query]) for other in nearest]
            right, wrong, failed = right + sum(is_right), wrong + 3 - sum(is_right), failed + (not is_right[0])
        picture = draw_neighbors(small_run, data=noisy_folder, system=system, num_queries=num_images, num_neighbors=3)
        of_right.add(num_pixels(picture, RIGHT) / right)
        of_wrong.add(num_pixels(picture, WRONG) / wrong)
        worst = draw_neighbors(
            small_run, data=noisy_folder, system=system, num_queries=failed, num_neighbors=1, worst=True
        )
        assert num_pixels(worst, RIGHT) == 0
        of_wrong.add(num_pixels(worst, WRONG) / failed)
    assert len(of_right) == len(of_wrong) == 1 and min(of_right | of_wrong) > 100  # every mark has equally many pixels


def test_another_seed_draws_other_queries(small_run: Path) -> None:
    one, same, other = (
        np.asarray(draw_neighbors(small_run, num_queries=2, num_neighbors=1, seed=seed)) for seed in (0, 0, 1)
    )
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_what_it_refuses(small_run: Path) -> None:
    with pytest.raises(UserError, match=r"no 'peer7'; it has peer0, peer1, ensemble"):
        draw_neighbors(small_run, system="peer7")
    with pytest.raises(UserError, match=r"num_neighbors is 0; allowed: 1 or more"):
        draw_neighbors(small_run, num_neighbors=0)
