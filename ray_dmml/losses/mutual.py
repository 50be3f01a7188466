"""What a peer learns from the other peers: the weighted sum of the mutual terms.

The terms are in files of their own (``relational.py``, ``similarity.py``, ``relaxed_contrastive.py``), or a user's, of
``loss.mutual``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ray_dmml.config.parts import describe, make_part, place_of
from ray_dmml.config.schema import LossConfig, MutualSection
from ray_dmml.errors import UserError
from ray_dmml.losses.rehearsal import require_plain_state
from ray_dmml.losses.relational import relational_losses
from ray_dmml.losses.relaxed_contrastive import relaxed_contrastive_loss
from ray_dmml.losses.similarity import similarity_loss
from ray_dmml.randomness import seeded


class _Term(NamedTuple):
    """One mutual term, or two that are computed together."""

    settings: MutualSection
    weights: Mapping[str, float]  # by name
    values: Callable[[Tensor, Tensor, Sequence[Tensor]], Sequence[Tensor]]
    """(embeddings before normalization, embeddings to compare, teachers) -> a scalar for each name."""


class MutualLoss(nn.Module):
    """The weighted sum of the mutual terms: relational distillation, the other built-in terms, and own ones.

    An own term is called with the student's embeddings (B, D) and a list of its teachers' (B, D_n), and returns a
    scalar. Its parameters, if it is a module with some, are those of this module.

    Args:
        config: the terms with their weights, and whether relational distillation compares embeddings at unit length.
        embedding_size: D.

    Raises:
        UserError: an own term cannot be found or built, or fails on a small batch.
    """

    def __init__(self, config: LossConfig, embedding_size: int) -> None:
        super().__init__()
        self._normalize = config.relational.normalize
        own = [make_part(f"loss.mutual.{n}.name", term.name, term.args) for n, term in enumerate(config.mutual)]
        self._with_state = nn.ModuleList(term for term in own if isinstance(term, nn.Module))
        for n, (settings, term) in enumerate(zip(config.mutual, own, strict=True)):
            _try(f"loss.mutual.{n}: {settings.name}", term, embedding_size, settings.teacher)
        self._terms = [term for term in _terms(config, own) if any(term.weights.values())]

    def forward(
        self,
        raw: Tensor,
        embedding: Tensor,
        teachers: Sequence[Tensor],
        step: int,
        *,
        published: Tensor | None = None,
        place: int = 0,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The mutual loss of a batch, and its terms without their weights.

        Args:
            raw: (B, D) float32 embeddings of the student before normalization.
            embedding: the same at unit length.
            teachers: (B, D_n) float32 each, in peer order, from any device.
            step: 0 for the first.
            published: (B, D) what the student itself teaches others; None: ``embedding``. It is a part of the ensemble.
            place: how many of the teachers come before the student in peer order.

        Returns:
            A scalar, or None if there is no teacher or all weights are zero; and the terms by name.
        """
        members = [teacher.to(raw.device, non_blocking=True) for teacher in teachers]
        members.insert(place, (embedding if published is None else published).detach())
        if len(members) == 1:
            return None, {}
        others = members[:place] + members[place + 1 :]
        taught_by = {"each": others}
        for name, parts in {"ensemble": members, "others": others}.items():
            if any(term.settings.teacher == name for term in self._terms):
                taught_by[name] = [torch.cat([F.normalize(part) for part in parts], dim=1)]
        student = embedding if self._normalize else raw
        loss: Tensor | None = None
        values: dict[str, Tensor] = {}
        for settings, weights, evaluate in self._terms:
            if not (factor := settings.factor(step)):
                continue
            of_term = evaluate(raw, student, taught_by[settings.teacher])
            for (name, weight), value in zip(weights.items(), of_term, strict=True):
                if weight:
                    values[name] = value
                    loss = factor * weight * value if loss is None else loss + factor * weight * value
        return loss, values


def _terms(config: LossConfig, own: Sequence[Any]) -> list[_Term]:
    """All mutual terms, also those without a weight."""
    relational, similarity, relaxed = config.relational, config.similarity, config.relaxed_contrastive

    def both(raw: Tensor, student: Tensor, teachers: Sequence[Tensor]) -> Sequence[Tensor]:
        with_terms = {"with_distance": relational.distance_weight > 0, "with_angle": relational.angle_weight > 0}
        return relational_losses(student, teachers, **with_terms)

    def similarities(raw: Tensor, student: Tensor, teachers: Sequence[Tensor]) -> Sequence[Tensor]:
        return [similarity_loss(raw, teachers, temperature=similarity.temperature)]

    def contrast(raw: Tensor, student: Tensor, teachers: Sequence[Tensor]) -> Sequence[Tensor]:
        return [relaxed_contrastive_loss(raw, teachers, sigma=relaxed.sigma, delta=relaxed.delta)]

    def call(term: Any, raw: Tensor, student: Tensor, teachers: Sequence[Tensor]) -> Sequence[Tensor]:
        return [term(student, teachers)]

    return [
        _Term(relational, {"distance": relational.distance_weight, "angle": relational.angle_weight}, both),
        _Term(similarity, {"similarity": similarity.weight}, similarities),
        _Term(relaxed, {"relaxed_contrastive": relaxed.weight}, contrast),
        *(
            _Term(settings, {str(settings.label): settings.weight}, partial(call, term))
            for settings, term in zip(config.mutual, own, strict=True)
        ),
    ]


def _try(what: str, term: Any, embedding_size: int, teacher: str) -> None:
    """Calls a copy of an own term on a small batch. Raises UserError if it fails or returns no scalar."""
    student = torch.eye(4, embedding_size).add_(0.1).requires_grad_()
    teachers = [student.detach() + 0.1] * 2
    if teacher != "each":
        teachers = [torch.cat(teachers, dim=1)]
    try:
        with seeded("dry run"):
            copied = copy.deepcopy(term)
            result = copied(student, teachers)
    except Exception as error:
        sizes = ", ".join(str(tuple(each.shape)) for each in teachers)
        given = f"a student {tuple(student.shape)} and a list of teachers {sizes}"
        raise UserError(f"{what} fails on {given}{place_of(error)}: {describe(error)}") from error
    if not (isinstance(result, Tensor) and result.ndim == 0):
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise UserError(f"{what} must return a scalar tensor, and returns {got}")
    if isinstance(copied, nn.Module):
        try:
            require_plain_state(copied)
        except ValueError as error:
            raise UserError(f"{what}: {error}") from None
