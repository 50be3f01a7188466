"""What a peer learns from the other peers: the weighted sum of the mutual terms.

The terms are those of ``relational.py``, and own ones of ``loss.mutual``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ray_dmml.config.parts import describe, make_part, place_of
from ray_dmml.config.schema import LossConfig
from ray_dmml.errors import UserError
from ray_dmml.losses.rehearsal import require_plain_state
from ray_dmml.losses.relational import relational_losses
from ray_dmml.randomness import seeded


class MutualLoss(nn.Module):
    """Mean over the teachers of ``distance_weight * distance + angle_weight * angle``, plus the weighted own terms.

    An own term is called with the student's embeddings (B, D) and a list of its teachers' (B, D_n), and returns a
    scalar. Its parameters, if it is a module with some, are those of this module.

    Args:
        config: the terms with their weights and warm-up, and whether embeddings are compared at unit length.
        embedding_size: D.
        ignore_nonfinite: leave out teachers whose embeddings are NaN or infinite.

    Raises:
        UserError: an own term cannot be found or built, or fails on a small batch.
    """

    def __init__(self, config: LossConfig, embedding_size: int, *, ignore_nonfinite: bool) -> None:
        super().__init__()
        self._config, self._ignore_nonfinite = config, ignore_nonfinite
        self._own: list[Any] = [
            make_part(f"loss.mutual.{n}.name", term.name, term.args) for n, term in enumerate(config.mutual)
        ]
        self._with_state = nn.ModuleList(term for term in self._own if isinstance(term, nn.Module))
        for n, term in enumerate(self._own):
            _try(f"loss.mutual.{n}: {config.mutual[n].name}", term, embedding_size)

    def forward(
        self, raw: Tensor, embedding: Tensor, teachers: Sequence[Tensor], step: int
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The mutual loss of a batch, and its terms without their weights.

        Args:
            raw: (B, D) float32 embeddings of the student before normalization.
            embedding: the same at unit length.
            teachers: (B, D_n) float32 each, in peer order, from any device.
            step: 0 for the first.

        Returns:
            A scalar, or None if there is no teacher or all weights are zero; and the terms by name.
        """
        relational = self._config.relational
        if self._ignore_nonfinite:
            teachers = [teacher for teacher in teachers if torch.isfinite(teacher).all()]
        if not teachers:
            return None, {}
        student = embedding if relational.normalize else raw
        teachers = [teacher.to(student.device, non_blocking=True) for teacher in teachers]
        ramp = _ramp(step, relational.warmup_steps)
        distance_weight, angle_weight = ramp * relational.distance_weight, ramp * relational.angle_weight
        loss: Tensor | None = None
        terms: dict[str, Tensor] = {}
        if distance_weight or angle_weight:
            both = relational_losses(student, teachers, with_distance=distance_weight > 0, with_angle=angle_weight > 0)
            loss, terms = distance_weight * both.distance + angle_weight * both.angle, both._asdict()
        for config, own in zip(self._config.mutual, self._own, strict=True):
            if weight := _ramp(step, config.warmup_steps) * config.weight:
                term = terms[str(config.label)] = own(student, teachers)
                loss = weight * term if loss is None else loss + weight * term
        return loss, terms


def _ramp(step: int, warmup_steps: int) -> float:
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def _try(what: str, term: Any, embedding_size: int) -> None:
    """Calls a copy of an own term on a small batch. Raises UserError if it fails or returns no scalar."""
    student = torch.eye(4, embedding_size).add_(0.1).requires_grad_()
    try:
        with seeded("dry run"):
            copied = copy.deepcopy(term)
            result = copied(student, [student.detach() + 0.1] * 2)
    except Exception as error:
        given = f"a student and a list of 2 teachers, each (4, {embedding_size})"
        raise UserError(f"{what} fails on {given}{place_of(error)}: {describe(error)}") from error
    if not (isinstance(result, Tensor) and result.ndim == 0):
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise UserError(f"{what} must return a scalar tensor, and returns {got}")
    if isinstance(copied, nn.Module):
        try:
            require_plain_state(copied)
        except ValueError as error:
            raise UserError(f"{what}: {error}") from None
