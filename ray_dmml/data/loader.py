"""Batches of decoded images: the sampler gives the indices of a step, the source decodes them.

Only the sampler is random, so a thread may decode a batch ahead of its step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_dmml.config.schema import Config
from ray_dmml.data.dataset import ImageSet, Splits
from ray_dmml.data.sampler import ClassBalancedSampler


@dataclass(frozen=True)
class Batch:
    """The images of a step, the same for every peer. The first step is 0.

    Attributes:
        images: (B, 3, S, S) uint8, before any augmentation.
        labels: (B,) int64.
        indices: (B,) int64 positions of the images in the training set; empty: the images are from elsewhere.
    """

    step: int
    images: Tensor
    labels: Tensor
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def build_sampler(config: Config, splits: Splits) -> ClassBalancedSampler:
    """The sampler of a run; it draws the same batches in every process."""
    data = config.data
    return ClassBalancedSampler(splits.train.labels, data.classes_per_batch, data.images_per_class, config.seed)


class BatchLoader:
    """Decodes the batch of a step, and the next batch while the peer trains on it.

    Args:
        images: the training images.
        sampler: draws the indices of a step.
        threads: decoding threads. They run beside training and share its cores.
        decode: False gives batches without images, for a peer that needs only their indices.
    """

    def __init__(
        self, images: ImageSet, sampler: ClassBalancedSampler, threads: int = 1, *, decode: bool = True
    ) -> None:
        self._images, self._sampler, self._decodes = images, sampler, decode
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        # One more thread waits for the decoders, so that the caller need not.
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        """The batch of a step. Steps may come in any order; ascending order is fast."""
        batch = self._next[1].result() if self._next and self._next[0] == step else self._load(step)
        self._next = (step + 1, self._ahead.submit(self._load, step + 1))
        return batch

    def close(self) -> None:
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._decoders.shutdown(wait=True, cancel_futures=True)

    def _load(self, step: int) -> Batch:
        indices = self._sampler.batch(step)
        labels, positions = torch.from_numpy(self._images.labels[indices]), torch.tensor(indices)
        if not self._decodes:
            return Batch(step, torch.empty(0, dtype=torch.uint8), labels, positions)
        images = list(self._decoders.map(self._images.source.read, indices.tolist()))
        return Batch(step, torch.stack(images), labels, positions)


def in_chunks(images: ImageSet, size: int, threads: int = 1) -> Iterator[Tensor]:
    """Decodes all images in order, ``size`` at a time: uint8 (<= size, 3, S, S).

    The threads decode the next chunk while the caller works on one.
    """
    decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        pending: deque[list[Future[Tensor]]] = deque()
        for start in range(0, len(images), size):
            indices = range(start, min(start + size, len(images)))
            pending.append([decoders.submit(images.source.read, index) for index in indices])
            if len(pending) == 2:
                yield torch.stack([image.result() for image in pending.popleft()])
        for chunk in pending:
            yield torch.stack([image.result() for image in chunk])
    finally:
        decoders.shutdown(wait=True, cancel_futures=True)
