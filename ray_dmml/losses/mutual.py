"""What a peer learns from the other peers: the weighted sum of the mutual terms.

A further term gets a file of its own beside ``relational.py``, its weights a section of
:class:`~ray_dmml.config.schema.LossConfig`, and a line in :meth:`MutualLoss.__call__`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_dmml.config.schema import RelationalConfig
from ray_dmml.losses.relational import relational_losses


class MutualLoss:
    """Mean over the teachers of ``distance_weight * distance + angle_weight * angle``.

    Args:
        config: weights, warm-up, and whether embeddings are compared at unit length.
        ignore_nonfinite: leave out teachers whose embeddings are NaN or infinite.
    """

    def __init__(self, config: RelationalConfig, *, ignore_nonfinite: bool) -> None:
        self._config, self._ignore_nonfinite = config, ignore_nonfinite

    def __call__(
        self, raw: Tensor, embedding: Tensor, teachers: Sequence[Tensor], step: int
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The mutual loss of a batch, and its terms without their weights.

        Args:
            raw: (B, D) float32 embeddings of the student before normalization.
            embedding: the same at unit length.
            teachers: (B, D_n) float32 each, in peer order, from any device.
            step: 0 for the first.

        Returns:
            A scalar, or None if there is no teacher or both weights are zero; and the terms by name.
        """
        config = self._config
        ramp = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
        distance_weight, angle_weight = ramp * config.distance_weight, ramp * config.angle_weight
        if self._ignore_nonfinite:
            teachers = [teacher for teacher in teachers if torch.isfinite(teacher).all()]
        if not teachers or not (distance_weight or angle_weight):
            return None, {}
        student = embedding if config.normalize else raw
        teachers = [teacher.to(student.device, non_blocking=True) for teacher in teachers]
        terms = relational_losses(student, teachers, with_distance=distance_weight > 0, with_angle=angle_weight > 0)
        loss = distance_weight * terms.distance + angle_weight * terms.angle
        return loss, terms._asdict()
