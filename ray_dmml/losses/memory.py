"""A loss over a memory of recent batches, whose memory is part of a checkpoint."""

from __future__ import annotations

from typing import Any

from pytorch_metric_learning import losses


class CrossBatchMemory(losses.CrossBatchMemory):
    """pytorch-metric-learning's ``CrossBatchMemory`` with its whole state in ``state_dict()``.

    The library keeps the remembered embeddings and labels in buffers, but the place of the next ones, and whether the
    memory is full, in attributes that a checkpoint would not have.

    References:
        Wang, Zhang, Huang, Scott, *Cross-Batch Memory for Embedding Learning*, CVPR 2020,
        https://arxiv.org/abs/1912.06798
    """

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        if hasattr(losses, loss_name):  # the library cannot know a loss of one's own
            super().check_loss_support(loss_name)

    def get_extra_state(self) -> dict[str, Any]:
        return {"queue_idx": self.queue_idx, "has_been_filled": self.has_been_filled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.queue_idx, self.has_been_filled = state["queue_idx"], state["has_been_filled"]
