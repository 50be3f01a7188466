"""Batches of embeddings that the tests of losses share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ray_dmml.config.schema import MetricLossConfig
from ray_dmml.losses.metric import MetricLoss


def build(num_classes: int = 10, size: int = 16, **config: object) -> MetricLoss:
    return MetricLoss(MetricLossConfig.model_validate(config), num_classes, size)


def batch(num_classes: int, images: int, size: int, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised float64 embeddings and labels. Those of one class are within about ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(num_classes, size, generator=generator, dtype=torch.float64))
    labels = torch.arange(num_classes).repeat_interleave(images)
    noise = torch.randn(len(labels), size, generator=generator, dtype=torch.float64)
    return F.normalize(centres[labels] + spread * F.normalize(noise)), labels
