"""A loss over a memory of recent batches, whose memory is part of a checkpoint."""

from __future__ import annotations

from typing import Any

from pytorch_metric_learning import losses
from torch import Tensor


class CrossBatchMemory(losses.CrossBatchMemory):
    """pytorch-metric-learning's ``CrossBatchMemory`` with its whole state in ``state_dict()``.

    The library keeps the remembered embeddings and labels in buffers, but the place of the next ones, and whether the
    memory is full, in attributes that a checkpoint would not have. A miner outside of the loss selects positions in the
    batch, which the library takes for rows of the memory. Here they become the rows that hold the batch.

    References:
        Wang, Zhang, Huang, Scott, *Cross-Batch Memory for Embedding Learning*, CVPR 2020,
        https://arxiv.org/abs/1912.06798
    """

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        if hasattr(losses, loss_name):  # the library cannot know a loss of one's own
            super().check_loss_support(loss_name)

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: tuple[Tensor, ...] | None,
        do_remove_self_comparisons: bool,
    ) -> Any:
        given = input_indices_tuple
        if given is not None:
            rows = self.curr_batch_idx  # of the batch in the memory
            if len(given) == 3:
                given = given[0], rows[given[1]], rows[given[2]]
            else:
                given = given[0], rows[given[1]], given[2], rows[given[3]]
        return super().create_indices_tuple(embeddings, labels, E_mem, L_mem, given, do_remove_self_comparisons)

    def get_extra_state(self) -> dict[str, Any]:
        return {"queue_idx": self.queue_idx, "has_been_filled": self.has_been_filled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.queue_idx, self.has_been_filled = state["queue_idx"], state["has_been_filled"]
