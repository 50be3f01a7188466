"""What the plain PyTorch trainers have in common: the data, the net and its optimiser.

They share the net and the losses with this package, and nothing else: torchvision's ImageFolder and
DataLoader, pytorch-metric-learning's sampler, Adam.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from ray_dmml.config.schema import MetricLossConfig
from ray_dmml.losses.metric import MetricLoss
from ray_dmml.models.embedding_net import EmbeddingNet

BACKBONE, BATCH_NORM = "tf_efficientnet_lite0", "train"
DECODE_SIZE, INPUT_SIZE, EMBEDDING_SIZE = 112, 96, 128
CLASSES_PER_BATCH, IMAGES_PER_CLASS = 16, 4
BATCH_SIZE = CLASSES_PER_BATCH * IMAGES_PER_CLASS
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Views:
    """One decoded image -> independent draws of the augmentation, as many as there are nets."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._decoded = v2.Resize((DECODE_SIZE, DECODE_SIZE))
        self._view = v2.Compose(
            [v2.RandomResizedCrop(INPUT_SIZE, scale=(0.2, 1.0)), v2.RandomHorizontalFlip()]
        )

    def __call__(self, image: Tensor) -> list[Tensor]:
        decoded = self._decoded(image)
        return [self._view(decoded) for _ in range(self._count)]


def _read(path: str) -> Tensor:
    return decode_image(path, mode=ImageReadMode.RGB)


def batches(folder: str, num_views: int, view_seed: int, loaders: int) -> Iterator[Any]:
    """Endless ([views: (B, 3, H, H) uint8], labels (B,) int64) of the first half of the classes;
    the same images in every process, whatever its ``view_seed``.

    Args:
        loaders: processes that load; 0 loads in this one.
    """
    images = ImageFolder(folder, transform=Views(num_views), loader=_read)
    num_classes = len(images.classes) // 2
    chosen = [i for i, label in enumerate(images.targets) if label < num_classes]
    sampler = MPerClassSampler(
        [images.targets[i] for i in chosen],
        m=IMAGES_PER_CLASS,
        batch_size=BATCH_SIZE,
        length_before_new_iter=10_000 * BATCH_SIZE,
    )
    np.random.seed(0)  # the sampler draws from it
    torch.manual_seed(view_seed)
    return iter(
        DataLoader(
            Subset(images, chosen),
            BATCH_SIZE,
            sampler=sampler,
            num_workers=loaders,
            pin_memory=DEVICE.type == "cuda",
        )
    )


class Trainee:
    """A net, its metric loss and its optimiser."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        net = EmbeddingNet(
            BACKBONE, EMBEDDING_SIZE, batch_norm=BATCH_NORM, input_size=INPUT_SIZE
        ).to(DEVICE)
        self.net = net.to(memory_format=torch.channels_last).train()
        config = MetricLossConfig.model_validate({})
        # The triplet loss has no proxies: it does not ask how many classes there are.
        self.metric = MetricLoss(config, num_classes=2, embedding_size=EMBEDDING_SIZE)
        self._optimizer = torch.optim.Adam(
            self.net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, H) uint8 -> (B, D)."""
        return self.net(images.to(DEVICE, non_blocking=True, memory_format=torch.channels_last))

    def learn(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
