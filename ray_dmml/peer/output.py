"""What the forward pass of a peer hands on to the rest of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ray_dmml.data.loader import Batch
from ray_dmml.peer.training_pass import Backward


@dataclass(frozen=True, eq=False)
class PeerOutput:
    """A peer's embeddings of one batch: what :meth:`Peer.forward` hands on to the rest of the step."""

    batch: Batch

    published: Tensor
    """(B, D) float32, detached: the embeddings for the other peers."""

    largest: Tensor
    """The largest absolute value of an embedding, a scalar on the device; NaN or infinite if one of them is."""

    learned: LearnedOutput | None
    """What the peer itself learns from; None if it does not learn from this batch."""


@dataclass(frozen=True, eq=False)
class LearnedOutput:
    """Embeddings with a graph that ends at them, and how the backward pass goes on from there."""

    leaf: Tensor
    """(B, D) float32 before normalization: what the net gave, which requires a gradient."""

    largest: Tensor
    """The largest absolute value of ``leaf``."""

    raw: Tensor
    """``leaf``, or finite stand-ins if a value of it is not finite."""

    embedding: Tensor
    """``raw`` at unit length."""

    backward: Backward
    """Continues from the gradient of ``leaf``."""

    undo: Callable[[], None]
    """Restores the buffers of net and losses."""
