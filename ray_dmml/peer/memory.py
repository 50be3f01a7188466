"""A lack of memory as one sentence that says which settings to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ray_dmml.data.loader import Batch
from ray_dmml.errors import UserError
from ray_dmml.peer.peer import Peer


@contextmanager
def explain_out_of_memory(peer: Peer, batch: Batch | None = None) -> Iterator[None]:
    """Raises a UserError if the peer's device runs out of memory inside the block.

    Args:
        peer: the peer that computes inside the block.
        batch: the batch that it trains on; None for an evaluation.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; CPUs have no type of their own
        reason = str(error).splitlines()[0]
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in reason):
            raise
        where = "an evaluation"
        if batch is not None:
            where = f"step {batch.step + 1} ({len(batch.labels)} images a batch)"
        raise UserError(
            f"{peer.name}: {peer.device} ran out of memory in {where}: {reason}. "
            f"{peer.config.backbone} at {peer.net.input_size} pixels, amp {peer.config.amp}: "
            "set data.micro_batch, checkpoint_activations or amp, lower data.classes_per_batch, input_size or "
            "evaluation.batch_size, or give the peer a larger part of a device (num_gpus)"
        ) from None
