"""The relaxed contrastive loss: the teachers' similarities in place of the labels of a contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ray_dmml.losses.pairwise import Pairwise, precision_of, require_same_batch


def relaxed_contrastive_loss(
    student: Tensor, teachers: Sequence[Tensor], *, sigma: float = 1.0, delta: float = 1.0
) -> Tensor:
    """A contrastive loss whose pairs are positive to the degree in which they are similar for a teacher.

    With t the unit-length embeddings of a teacher and s those of the student before normalization, it is the mean over
    i ≠ j, and over the teachers, of

        w_ij d_ij² + (1 - w_ij) max(0, δ - d_ij)²

    where w_ij = exp(-||t_i - t_j||² / σ) and d_ij = ||s_i - s_j|| / mean_k ||s_i - s_k||. The mean over k includes
    k = i, as in the authors' code, and it has a gradient.

    Args:
        student: (N, D) of any float dtype. It gets gradients.
        teachers: (N, D_n) each, of any float dtype and any length, with the images in the same order. They get no
            gradients.
        sigma: σ, above 0. A larger one makes more pairs similar.
        delta: δ, the margin, in mean distances.

    Returns:
        A scalar, float64 for a float64 student and float32 otherwise. It is zero without a teacher, and for fewer
        than two images.

    Raises:
        ValueError: an argument is not (N, D), or a teacher has another N.

    References:
        Kim, Kim, Cho, Kwak, *Embedding Transfer with Label Relaxation for Improved Metric Learning*, CVPR 2021,
        https://arxiv.org/abs/2103.14908.

    Examples:
        >>> import torch
        >>> from ray_dmml import relaxed_contrastive_loss
        >>> student = torch.randn(8, 16, requires_grad=True)
        >>> loss = relaxed_contrastive_loss(student, [torch.randn(8, 32)])
        >>> loss.backward()
        >>> loss.shape
        torch.Size([])
    """
    require_same_batch(student, teachers)
    num, dtype = len(student), precision_of(student)
    if not teachers or num < 2:
        return student.new_zeros((), dtype=dtype)
    with torch.autocast(student.device.type, enabled=False):
        distances = Pairwise.of(student).distances
        mean = distances.mean(dim=1, keepdim=True)
        d = distances / torch.where(mean == 0, 1, mean)
        pull, push = d.square(), F.relu(delta - d).square()
        terms = []
        for teacher in teachers:
            with torch.no_grad():
                squared = Pairwise.of(F.normalize(teacher.to(student.device, dtype))).distances.square()
                w = torch.exp(-squared / sigma)
                # An image is no pair with itself.
                closer, apart = w.fill_diagonal_(0), (1 - w).fill_diagonal_(0)
            terms.append((closer * pull + apart * push).sum() / (num * (num - 1)))
        return torch.stack(terms).mean().to(dtype)
