"""Similarity distillation: a student learns which images its teachers find most similar to each image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ray_dmml.losses.pairwise import precision_of, require_same_batch


def similarity_loss(student: Tensor, teachers: Sequence[Tensor], *, temperature: float = 0.1) -> Tensor:
    """Kullback-Leibler divergence between the similarities of a batch, from the student's to the teachers'.

    Each image has a distribution over the N - 1 other images: the softmax of their cosine similarities, divided by
    the temperature. The loss is KL(teacher || student), the mean over images and over teachers.

    Args:
        student: (N, D) of any float dtype and any length. It gets gradients.
        teachers: (N, D_n) each, of any float dtype, with the images in the same order. They get no gradients.
        temperature: above 0. A lower one counts the nearest images more.

    Returns:
        A scalar, float64 for a float64 student and float32 otherwise. It is zero without a teacher, and for fewer
        than two images.

    Raises:
        ValueError: an argument is not (N, D), or a teacher has another N.

    References:
        The distillation term of Roth, Milbich, Ommer, Cohen, Ghassemi, *Simultaneous Similarity-based
        Self-Distillation for Deep Metric Learning* (S2SD), ICML 2021, https://arxiv.org/abs/2009.08348.

    Examples:
        >>> import torch
        >>> from ray_dmml import similarity_loss
        >>> student = torch.randn(8, 16, requires_grad=True)
        >>> similarity_loss(student, [torch.randn(8, 32)], temperature=0.1).backward()
        >>> round(similarity_loss(student, [2 * student]).item(), 6)
        0.0
    """
    require_same_batch(student, teachers)
    dtype = precision_of(student)
    if not teachers or len(student) < 2:
        return student.new_zeros((), dtype=dtype)
    with torch.autocast(student.device.type, enabled=False):
        own = _log_similarities(student.to(dtype), temperature)
        with torch.no_grad():
            targets = [_log_similarities(t.to(student.device, dtype), temperature) for t in teachers]
        terms = [F.kl_div(own, target, reduction="batchmean", log_target=True) for target in targets]
        return torch.stack(terms).mean()


def _log_similarities(embeddings: Tensor, temperature: float) -> Tensor:
    """(N, N - 1) logarithms of each image's distribution over the others."""
    unit = F.normalize(embeddings)
    num = len(unit)
    # All but the diagonal, as a view: a mask would be counted, for which the CPU waits for a GPU.
    others = (unit @ unit.T).flatten()[1:].view(num - 1, num + 1)[:, :-1].reshape(num, num - 1)
    return F.log_softmax(others / temperature, dim=1)
