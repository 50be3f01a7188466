"""How a peer embeds a training batch, and goes back through its net: at once, or in micro batches.

Micro batches are *gradient caching*. The losses need the embeddings of the whole batch, but not the activations:

1. Embed each micro batch without a graph.
2. Compute the losses on the embeddings of the whole batch, and their gradient with respect to these embeddings.
3. Embed each micro batch again, with a graph, and continue the backward pass from its part of that gradient.

References:
    Gao, Zhang, Han, Callan, *Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup*, RepL4NLP 2021,
    https://arxiv.org/abs/2101.06983
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ray_dmml.config.schema import PeerConfig
from ray_dmml.models.embedding_net import EmbeddingNet, autocast, compiled
from ray_dmml.randomness import seeded

Backward = Callable[[Tensor], None]
"""Continues the backward pass of a batch from the gradient (B, D) of its embeddings, and adds to ``.grad``."""


class TrainingPass:
    """The forward and backward passes of a net on training batches.

    The gradients are those of the whole batch, up to rounding, unless the net normalises over a batch or draws random
    numbers: with micro batches, BatchNorm in training mode uses and averages the statistics of each micro batch, and
    dropout has other draws, which are the same in both passes. The second pass changes no buffers.

    Args:
        config: its settings amp, compile and checkpoint_activations count.
        net: the net, in training mode whenever it embeds.
        micro_batch: number of images whose activations are in memory at a time; None: all images of a batch.
        name: the peer's name, for errors.
    """

    def __init__(self, config: PeerConfig, net: EmbeddingNet, micro_batch: int | None, name: str) -> None:
        self._net, self._amp, self._micro_batch = net, config.amp, micro_batch
        self._net_forward = compiled(net, name, net.mean.device) if config.compile else net.forward_unnormalized
        self._recomputes = config.checkpoint_activations

    def embed(self, images: Tensor) -> tuple[Tensor, Backward]:
        """Embeds the images of a batch: (B, 3, H, W) uint8 -> (B, D) float32 before normalisation, without a graph.

        Random draws follow torch's generators, which the caller seeds. The second result may be called once.
        """
        num_chunks = math.ceil(len(images) / (self._micro_batch or len(images)))
        if num_chunks == 1:
            embeddings = self._forward(images)

            def backward(gradient: Tensor) -> None:
                with self._keeping_buffers() if self._recomputes else nullcontext():
                    embeddings.backward(gradient)

            return embeddings.detach(), backward
        # Even parts: BatchNorm has no statistics of a single image.
        seed, chunks = torch.initial_seed(), images.tensor_split(num_chunks)

        def embed_chunk(number: int) -> Tensor:
            with seeded(seed, number):
                return self._forward(chunks[number])

        def backward_by_chunks(gradient: Tensor) -> None:
            self._net.train()
            with self._keeping_buffers():
                for number, part in enumerate(gradient.tensor_split(num_chunks)):
                    embed_chunk(number).backward(part)

        with torch.no_grad():
            return torch.cat([embed_chunk(number) for number in range(num_chunks)]), backward_by_chunks

    def _forward(self, images: Tensor) -> Tensor:
        with autocast(self._amp, images.device):
            return self._net_forward(images)

    @contextmanager
    def _keeping_buffers(self) -> Iterator[None]:
        """Images that go through the net a second time, in the backward pass, count once in BatchNorm's statistics."""
        before = [(buffer, buffer.clone()) for buffer in self._net.buffers()]
        yield
        for buffer, value in before:
            buffer.copy_(value)
