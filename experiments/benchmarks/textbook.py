"""Relational distillation as the paper's formulas read: by the (N, N, D) tensor of differences.

Park, Kim, Lu, Cho, *Relational Knowledge Distillation*, CVPR 2019, https://arxiv.org/abs/1904.05068
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def relational_loss(student: Tensor, teachers: list[Tensor]) -> Tensor:
    """distance + 2 angle, mean over the teachers; (N, D) each. The student's own matrices are
    computed once."""
    distances, angles = relations(student)
    terms = []
    for teacher in teachers:
        with torch.no_grad():
            teacher_distances, teacher_angles = relations(teacher)
        terms.append(
            F.smooth_l1_loss(distances, teacher_distances)
            + 2 * F.smooth_l1_loss(angles, teacher_angles)
        )
    return torch.stack(terms).mean()


def relations(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """(N, N) distances divided by their mean, and (N, N, N) cosines at the first index."""
    differences = embeddings[None, :, :] - embeddings[:, None, :]  # (N, N, D)
    squared = differences.square().sum(dim=2)
    apart = squared > 0
    # The root's gradient is infinite at zero, so the diagonal takes no part in it.
    distances = squared.where(apart, 1).sqrt() * apart
    normalised = distances / distances[apart].mean()
    directions = F.normalize(differences, dim=2)
    return normalised, torch.bmm(directions, directions.transpose(1, 2))
