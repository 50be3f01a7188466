"""Compares an exported file with PyTorch on real images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ray_dmml.cores import num_cores
from ray_dmml.data.dataset import ImageSet
from ray_dmml.data.loader import in_chunks
from ray_dmml.evaluation.evaluation import evaluate_vectors

logger = logging.getLogger(__name__)

MAX_IMAGES = 2000
"""A larger set is cut to its first classes."""

BATCH_SIZE, NUM_TIMED = 32, 4
"""Images in a batch, and batches whose time is taken again when nothing is decoded beside it."""

Embed = Callable[[Tensor], Tensor]
"""(B, 3, S, S) uint8 -> (B, D) float32, rows of length 1."""


@dataclass(frozen=True)
class Parity:
    """How near a file is to PyTorch, and how fast both are. Pairs are (PyTorch, file)."""

    num_images: int

    difference: float
    """The largest absolute difference of an entry of an embedding."""

    recall_at_1: tuple[float, float]
    """Fractions."""

    images_per_second: tuple[float, float]
    """Of decoded images in batches of 32, on the CPU with the same number of threads."""


def compare(reference: Embed, exported: Embed, images: ImageSet) -> Parity:
    """Embeds the images with both, 32 at a time, and the first one also alone."""
    images = _some(images)
    logger.debug("comparing the file with PyTorch on %s images", f"{len(images):,}")
    pair = (reference, exported)
    embeddings: tuple[list[Tensor], list[Tensor]] = ([], [])
    timed: list[Tensor] = []
    difference = 0.0
    for batch in in_chunks(images, BATCH_SIZE, num_cores()):
        if not timed:
            difference = _largest_difference(*(embed(batch[:1]) for embed in pair))
        if len(timed) < NUM_TIMED:
            timed.append(batch)
        for embed, results in zip(pair, embeddings, strict=True):
            results.append(embed(batch))
    before, after = (torch.cat(results) for results in embeddings)
    if bool(torch.isfinite(after).all()):
        difference = max(difference, _largest_difference(before, after))
        recalls = _recall_at_1(before, images), _recall_at_1(after, images)
    else:
        difference, recalls = float("inf"), (_recall_at_1(before, images), 0.0)
    speeds = _images_per_second(reference, timed), _images_per_second(exported, timed)
    return Parity(len(images), difference, recalls, speeds)


def _some(images: ImageSet) -> ImageSet:
    """The first classes, up to MAX_IMAGES images, but at least two; all of them if these cannot be evaluated."""
    sizes = np.bincount(images.labels)
    num_classes = max(2, int(np.searchsorted(sizes.cumsum(), MAX_IMAGES, side="right")))
    first = images.subset(np.flatnonzero(images.labels < num_classes))
    return first if first.can_be_evaluated() else images


def _largest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _recall_at_1(embeddings: Tensor, images: ImageSet) -> float:
    return evaluate_vectors(embeddings.numpy(), images, [1])["recall@1"]


def _images_per_second(embed: Embed, batches: list[Tensor]) -> float:
    began = time.perf_counter()
    for batch in batches:
        embed(batch)
    return sum(map(len, batches)) / (time.perf_counter() - began)
