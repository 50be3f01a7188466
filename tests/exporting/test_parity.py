"""The comparison of an exported file with PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_dmml.data.dataset import ImageSet
from ray_dmml.exporting import parity
from ray_dmml.exporting.parity import compare


class Dots:
    """Images of one colour, which is their class; the last one has that of another class."""

    def __init__(self, colours: list[int]) -> None:
        self.colours = colours

    def __len__(self) -> int:
        return len(self.colours)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Tensor:
        return torch.full((3, 4, 4), self.colours[index], dtype=torch.uint8)

    def subset(self, indices: list[int]) -> Dots:
        return Dots([self.colours[index] for index in indices])


def images_of(num_classes: int, size: int) -> ImageSet:
    labels = np.repeat(np.arange(num_classes), size)
    colours = [20 * label + place for place, label in enumerate(labels.tolist())]
    return ImageSet(Dots(colours), labels, tuple(map(str, range(num_classes))))


def embed(images: Tensor) -> Tensor:
    """A point on a quarter of a circle, by colour."""
    angle = images[:, 0, 0, 0].double() / 256
    return torch.stack([angle.cos(), angle.sin()], dim=1).float()


def test_differences_and_recall() -> None:
    """A file that computes the same differs by nothing; one that mixes up two images has another Recall@1."""
    images = images_of(3, 12)  # two batches
    same = compare(embed, embed, images)
    assert (same.num_images, same.difference, same.recall_at_1) == (36, 0, (1, 1))
    assert min(same.images_per_second) > 0

    def wrong(batch: Tensor) -> Tensor:
        first_class = batch[:, 0, 0, 0] == 0
        return torch.where(first_class[:, None], embed(batch + 200), embed(batch) + 0.01)

    other = compare(embed, wrong, images)
    assert other.recall_at_1 == (1, pytest.approx(35 / 36))
    black, grey = (torch.full((1, 3, 1, 1), colour) for colour in (0, 200))
    assert other.difference == pytest.approx(float((embed(black) - embed(grey)).abs().max()))


def test_a_batch_of_one_is_compared() -> None:
    """A file that is right for large batches only is found out."""

    def wrong(batch: Tensor) -> Tensor:
        return embed(batch) + 0.5 * (len(batch) == 1)

    assert compare(embed, wrong, images_of(3, 4)).difference == pytest.approx(0.5)


def test_embeddings_that_are_not_finite_are_infinitely_wrong() -> None:
    """float16 overflows to infinity, and its length is then NaN."""
    found = compare(embed, lambda batch: embed(batch) / 0, images_of(3, 4))
    assert found.difference == float("inf")


def test_large_sets_are_cut_to_their_first_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole classes, at least two."""
    monkeypatch.setattr(parity, "MAX_IMAGES", 10)
    assert compare(embed, embed, images_of(4, 4)).num_images == 8
    assert compare(embed, embed, images_of(4, 12)).num_images == 24
