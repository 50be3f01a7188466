"""Relational distillation: a student learns the distances and angles between its teachers' points.

Park, Kim, Lu, Cho, *Relational Knowledge Distillation*, CVPR 2019, https://arxiv.org/abs/1904.05068

Both terms need nothing of a batch but its Gram matrix G = X Xᵀ, (N, N):
    ||x_i - x_j||²          = G_ii + G_jj - 2 G_ij
    (x_j - x_i)·(x_k - x_i) = G_jk - G_ij - G_ik + G_ii
so the (N, N, D) tensor of differences is never made, and teachers may have sizes of their own. The
price is cancellation, paid by centring the batch and by float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Squared distances come out of G with an error of a few roundings of G_ii + G_jj. Below so many of
# them two points are one and have no direction between them. In float64: nearer than 2.4e-7 of
# their distance from the batch's centre, which is the rounding of a float32 embedding.
_COINCIDENT = 256

# Triples of a block: on a CPU its buffers stay in the core's cache, elsewhere few launches count.
_BLOCK_CPU = 2**17
_BLOCK_OTHER = 2**23


class RelationalTerms(NamedTuple):
    """The two terms of relational distillation, each a scalar, neither weighted."""

    distance: Tensor
    """Mean over the teachers of :func:`distance_loss`."""

    angle: Tensor
    """Mean over the teachers of :func:`angle_loss`."""


def relational_losses(
    student: Tensor,
    teachers: Sequence[Tensor],
    *,
    with_distance: bool = True,
    with_angle: bool = True,
) -> RelationalTerms:
    """Both terms against every teacher, averaged over the teachers in the order given.

    Args:
        student: (N, D) of any float dtype. Gradients flow to it, once differentiable.
        teachers: (N, D_n) each; D_n may differ from D. No gradient flows to them.
        with_distance: False leaves the distance term out (a constant zero).
        with_angle: False leaves the angle term out (a constant zero).

    Returns:
        Two scalars, float64 for a float64 student and float32 for any other, zero where there is
        nothing to compare: no teacher, or fewer than two distinct points.

    Raises:
        ValueError: an argument is not (N, D), or a teacher has another N.
    """
    _check_shapes(student, teachers)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    distance = angle = student.new_zeros((), dtype=dtype)
    if not teachers or student.shape[0] == 0:
        return RelationalTerms(distance, angle)
    with torch.autocast(student.device.type, enabled=False):
        own = _Relations.of(student)
        with torch.no_grad():
            others = [_Relations.of(teacher.to(student.device)) for teacher in teachers]
        if with_distance:
            mine = own.normalised_distances()
            terms = [F.smooth_l1_loss(mine, other.normalised_distances()) for other in others]
            distance = torch.stack(terms).sum().div(len(terms)).to(dtype)
        if with_angle:
            pairs = [(other.gram, other.inverse) for other in others]
            angle = _AngleTerm.apply(own.gram, own.inverse, pairs).to(dtype)
    return RelationalTerms(distance, angle)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth-L1 (beta 1) between the two matrices of distances, mean over all N² entries.

    Each matrix is divided by the mean of its own positive entries; the student's mean keeps its
    gradient. Arguments and result as in :func:`relational_losses`.
    """
    return relational_losses(student, [teacher], with_angle=False).distance


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth-L1 (beta 1) between the cosines at every vertex i of all pairs j, k; mean over N³.

    A cosine is zero where j or k coincides with i. Arguments and result as in
    :func:`relational_losses`.
    """
    return relational_losses(student, [teacher], with_distance=False).angle


class _Relations(NamedTuple):
    """What the terms need to know of one batch of embeddings; each (N, N), float64."""

    gram: Tensor
    distances: Tensor
    inverse: Tensor
    """1 / distance, and 0 where two points coincide."""

    @classmethod
    def of(cls, embeddings: Tensor) -> _Relations:
        precise = torch.float32 if embeddings.device.type == "mps" else torch.float64
        x = embeddings.to(precise)
        x = x - x.mean(dim=0)
        gram = x @ x.T
        norms = gram.diagonal()
        scale = norms[:, None] + norms[None, :]
        squared = scale - 2 * gram
        coincident = squared <= _COINCIDENT * torch.finfo(precise).eps * scale
        coincident.fill_diagonal_(True)
        # A coincident pair's root is not taken at all: its gradient would be infinite.
        safe = squared.masked_fill(coincident, 1)
        return cls(
            gram, safe.sqrt().masked_fill(coincident, 0), safe.rsqrt().masked_fill(coincident, 0)
        )

    def normalised_distances(self) -> Tensor:
        num_positive = self.distances.count_nonzero().clamp(min=1)
        mean = self.distances.sum() / num_positive
        return self.distances / torch.where(mean == 0, 1, mean)


class _AngleTerm(torch.autograd.Function):
    """Mean over teachers and triples of smooth-L1 between cosines; value and gradient in one pass.

    With c the student's cosines, t a teacher's, u the inverse distances:
        c_ijk = A_ijk u_ij u_ik,   A_ijk = G_jk - G_ij - G_ik + G_ii,   i the vertex
        rho'(z) = clamp(z, -1, 1),   rho(z) = rho' (z - rho' / 2)
    All are symmetric in j and k. The triples go by in blocks of vertices; only (N, N) sums remain.
    """

    @staticmethod
    def forward(
        ctx: Any, gram: Tensor, inverse: Tensor, teachers: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        num_points = gram.shape[0]
        limit = _BLOCK_CPU if gram.device.type == "cpu" else _BLOCK_OTHER
        block = min(num_points, max(1, limit // num_points**2))
        cosines, rest, slope, slopes = gram.new_empty((4, block, num_points, num_points))
        total = gram.new_zeros(())
        grad_gram, grad_inverse = torch.zeros_like(gram), torch.zeros_like(gram)
        for start in range(0, num_points, block):
            i = slice(start, min(start + block, num_points))
            size = i.stop - i.start
            c = _cosines(gram, inverse, i, cosines[:size])
            z, r, g = rest[:size], slope[:size], slopes[:size].zero_()
            for teacher_gram, teacher_inverse in teachers:
                torch.sub(c, _cosines(teacher_gram, teacher_inverse, i, z), out=z)
                torch.clamp(z, -1, 1, out=r)
                g += r
                total += torch.dot(r.view(-1), z.view(-1)) - 0.5 * torch.dot(r.view(-1), r.view(-1))
            if ctx.needs_input_grad[0]:
                u = inverse[i]
                # dL/du_ij = 2 sum_k g A u_ik, and A u_ij u_ik is at hand
                by_pair = torch.mul(g, c, out=c).sum(dim=2)
                grad_inverse[i] = 2 * by_pair * torch.where(u == 0, 0, 1 / u)
                # dL/dA, shared out to the four entries of G that A is made of
                g.mul_(u[:, :, None]).mul_(u[:, None, :])
                grad_gram += g.sum(dim=0)
                by_pair = g.sum(dim=2)
                grad_gram[i] -= 2 * by_pair
                grad_gram.diagonal()[i] += by_pair.sum(dim=1)
        count = len(teachers) * num_points**3
        ctx.save_for_backward(grad_gram.div_(count), grad_inverse.div_(count))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_gram, grad_inverse = ctx.saved_tensors
        return grad * grad_gram, grad * grad_inverse, None


def _cosines(gram: Tensor, inverse: Tensor, i: slice, out: Tensor) -> Tensor:
    """Writes the cosines at the vertices i, (block, N, N), into ``out`` and returns it."""
    from_vertex, u = gram[i], inverse[i]
    to_itself = gram.diagonal()[i, None]
    torch.sub(gram, from_vertex[:, :, None], out=out)
    out.sub_((from_vertex - to_itself)[:, None, :])
    return out.mul_(u[:, :, None]).mul_(u[:, None, :])


def _check_shapes(student: Tensor, teachers: Sequence[Tensor]) -> None:
    for name, x in [("student", student), *((f"teacher {n}", t) for n, t in enumerate(teachers))]:
        if x.ndim != 2 or x.shape[0] != student.shape[0]:
            raise ValueError(
                f"{name} is {tuple(x.shape)}; embeddings are (N, D) with the student's N, "
                f"student {tuple(student.shape)}"
            )
