"""Distances between the embeddings of a batch, exact enough for near-duplicates and safe to differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pairwise(NamedTuple):
    """All pairs of the embeddings of one batch; each (N, N), float64.

    They are computed from the Gram matrix G = X Xᵀ, ||x_i - x_j||² = G_ii + G_jj - 2 G_ij, so no (N, N, D) tensor of
    differences is needed. The subtractions would cancel digits. To prevent it, the batch is centred and G is float64.
    """

    gram: Tensor
    distances: Tensor
    inverse: Tensor  # 1 / distance, and 0 where two points coincide

    @classmethod
    def of(cls, embeddings: Tensor) -> Pairwise:
        """Pairs of (N, D) embeddings of any float dtype."""
        gram = _gram(embeddings, torch.float32 if embeddings.device.type == "mps" else torch.float64)
        norms = gram.diagonal()
        scale = norms[:, None] + norms[None, :]
        squared = scale - 2 * gram
        # A squared distance from G has an error of a few roundings of G_ii + G_jj. Below 256 roundings two
        # points coincide: no direction between them can be computed. In float64 they are closer than 2.4e-7
        # of their distance from the batch's centre, the rounding of a float32 embedding.
        coincident = squared <= 256 * torch.finfo(gram.dtype).eps * scale
        coincident.fill_diagonal_(True)
        # The root of a coincident pair is never computed: its gradient would be infinite.
        safe = squared.masked_fill(coincident, 1)
        return cls(gram, safe.sqrt().masked_fill(coincident, 0), safe.rsqrt().masked_fill(coincident, 0))


def _gram(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """X Xᵀ of the centred batch."""
    if embeddings.requires_grad or embeddings.device.type != "cpu":
        x = embeddings.to(dtype)
        x = x - x.mean(dim=0)
        return x @ x.T
    # The embeddings of an ensemble are long, and float64 is slow on a CPU: only the upper half is computed, and blocks
    # of dimensions fit into the core's cache.
    num = len(embeddings)
    upper = torch.zeros(num, num, dtype=dtype)
    for block in embeddings.split(1024, dim=1):
        x = block - block.mean(dim=0, dtype=dtype)
        for i in range(0, num, 32):
            upper[i : i + 32, i:].addmm_(x[i : i + 32], x[i:].T)
    return upper.triu() + upper.triu(1).T


def require_same_batch(student: Tensor, teachers: Sequence[Tensor]) -> None:
    """Raises ValueError if an argument is not (N, D), or a teacher has another N than the student."""
    for name, x in [("student", student), *((f"teacher {n}", teacher) for n, teacher in enumerate(teachers))]:
        if x.ndim != 2 or len(x) != len(student):
            wanted = f"embeddings are (N, D) with the student's N, student {tuple(student.shape)}"
            raise ValueError(f"{name} is {tuple(x.shape)}; {wanted}")


def precision_of(student: Tensor) -> torch.dtype:
    """The dtype of a loss: float64 for a float64 student, and float32 otherwise."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32
