"""Images of which one has become unreadable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ray_dmml.data.dataset import BadImageError, ImageSet


class FragileImages:
    """The images of a set; the one at an index cannot be read."""

    def __init__(self, images: ImageSet, broken: int) -> None:
        self.images, self.broken = images, broken

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return self.images.source.name(index)

    def read(self, index: int) -> Tensor:
        if index == self.broken:
            raise BadImageError(f"image {self.name(index)} cannot be read: gone")
        return self.images.source.read(index)

    def subset(self, indices: Sequence[int]) -> FragileImages:
        raise NotImplementedError


def with_unreadable(images: ImageSet, index: int) -> ImageSet:
    """The same set, in which one image cannot be read."""
    return replace(images, source=FragileImages(images, index))
