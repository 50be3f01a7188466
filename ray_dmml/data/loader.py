"""Batches of decoded images: the sampler gives the indices of a step, the source decodes them.

Only the sampler is random, so a thread may decode a batch ahead of its step. The views of decoded images are made in
:mod:`~ray_dmml.data.views`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ray_dmml.config.schema import Config
from ray_dmml.data.dataset import ImageSet, Splits
from ray_dmml.data.sampler import ClassBalancedSampler


@dataclass(frozen=True)
class Batch:
    """The images of a step: decoded, the same for every peer, or as a peer's view of them. The first step is 0.

    Attributes:
        images: uint8, (B, 3, S, S) as decoded, or (B, 3, H, H) of a peer's view.
        labels: (B,) int64.
        indices: (B,) int64 positions of the images in the training set; empty: the images are from elsewhere.
    """

    step: int
    images: Tensor
    labels: Tensor
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def pin_memory(self) -> Batch:
        """The same batch with its images in page-locked memory, from where a GPU copies them in the background."""
        return replace(self, images=self.images.pin_memory())


def build_sampler(config: Config, splits: Splits) -> ClassBalancedSampler:
    """The sampler of a run; it draws the same batches in every process."""
    data = config.data
    return ClassBalancedSampler(splits.train.labels, data.classes_per_batch, data.images_per_class, config.seed)


class DecodedBatches:
    """Decodes the batch of a step, and the next batch while the peers train on it.

    Args:
        images: the training images.
        sampler: draws the indices of a step.
        threads: decoding threads. They run beside training and share its cores.
    """

    def __init__(self, images: ImageSet, sampler: ClassBalancedSampler, threads: int = 1) -> None:
        self._images, self._sampler = images, sampler
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        # One more thread waits for the decoders, so that the caller need not.
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._current: Batch | None = None  # for the next peer that asks for it
        self._next: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        """The batch of a step. Steps may come in any order; ascending order is fast."""
        if self._current is None or self._current.step != step:
            self._current = self._next[1].result() if self._next and self._next[0] == step else self._load(step)
            self._next = (step + 1, self._ahead.submit(self._load, step + 1))
        return self._current

    def close(self) -> None:
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._decoders.shutdown(wait=True, cancel_futures=True)

    def _load(self, step: int) -> Batch:
        batch = batch_without_images(self._images, self._sampler, step)
        images = list(self._decoders.map(self._images.source.read, batch.indices.tolist()))
        return replace(batch, images=torch.stack(images))


def batch_without_images(images: ImageSet, sampler: ClassBalancedSampler, step: int) -> Batch:
    """The labels and indices of a step, and no images."""
    indices = sampler.batch(step)
    labels = torch.from_numpy(images.labels[indices])
    return Batch(step, torch.empty(0, dtype=torch.uint8), labels, torch.tensor(indices))


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
