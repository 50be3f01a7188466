"""The views of one peer as a function of the step: which images, under which random numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ray_dmml.data.augmentations import View
from ray_dmml.data.dataset import ImageSet, Splits
from ray_dmml.data.loader import Batch, batch_without_images
from ray_dmml.data.sampler import ClassBalancedSampler
from ray_dmml.randomness import seeded


@dataclass(frozen=True, eq=False)
class PeerViews:
    """What the images of a peer are made of. Every process with a copy makes the same bits.

    Attributes:
        view: the augmentation of training.
        eval_view: the resize and crop of evaluation.
        run_seed: seed of the run.
        seed: the peer's own seed. Two peers with the same seed and view see the same.
    """

    splits: Splits
    sampler: ClassBalancedSampler
    view: View
    eval_view: View
    run_seed: int
    seed: int

    def of_batch(self, decoded: Batch) -> Batch:
        """The view of a decoded batch: images (B, 3, S, S) -> (B, 3, H, H)."""
        with seeded(self.run_seed, self.seed, decoded.step, "view"):
            return replace(decoded, images=self.view(decoded.images))

    def of_step(self, step: int) -> Batch:
        """The view of the batch of a step, which is decoded first."""
        batch = self.without_images(step)
        images = [self.splits.train.source.read(index) for index in batch.indices.tolist()]
        return self.of_batch(replace(batch, images=torch.stack(images)))

    def without_images(self, step: int) -> Batch:
        """The labels and indices of a step."""
        return batch_without_images(self.splits.train, self.sampler, step)

    def of_images(self, split: str, start: int, stop: int) -> Tensor:
        """The evaluation view of the images ``start .. stop - 1`` of a split: uint8 (n, 3, H, H)."""
        source = self.images(split).source
        return self.eval_view(torch.stack([source.read(index) for index in range(start, stop)]))

    def images(self, split: str) -> ImageSet:
        """The images of ``train``, ``validation`` or ``test``."""
        images: ImageSet | None = getattr(self.splits, split)
        assert images is not None, f"there are no {split} images"
        return images
