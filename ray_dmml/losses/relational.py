"""Relational distillation: a student learns the distances and angles between its teachers' embeddings.

Both terms are computed from the Gram matrix G = X Xᵀ of a batch, (N, N), so that every teacher may have its own
embedding size. The angles follow from (x_j - x_i)·(x_k - x_i) = G_jk - G_ij - G_ik + G_ii.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ray_dmml.losses.pairwise import Pairwise, precision_of, require_same_batch


class RelationalTerms(NamedTuple):
    """The two terms of relational distillation, scalars without weights."""

    distance: Tensor
    angle: Tensor


def relational_losses(
    student: Tensor, teachers: Sequence[Tensor], *, with_distance: bool = True, with_angle: bool = True
) -> RelationalTerms:
    """Relational Knowledge Distillation from several teachers: their mean distance and angle terms.

    The terms make the relations between the student's embeddings of a batch similar to those between a
    teacher's embeddings of the same images:

    1. ``distance``: each pair of images should be as far apart as for the teacher. It is the smooth-L1 loss
       (beta 1) between the (N, N) distances of both, each divided by the mean of its positive entries. The
       gradient includes that of the student's mean.
    2. ``angle``: each triple of images should form the same angles as for the teacher. It is the smooth-L1
       loss between the (N, N, N) cosines of the angles j-i-k. A cosine is zero where j or k coincides with i.

    Each term is the mean over the teachers, summed in the given order. It does not change when all embeddings
    of a network are scaled, rotated or shifted. Time grows with N³, and memory with N².

    Args:
        student: (N, D) of any float dtype. It gets gradients, which cannot be differentiated again.
        teachers: (N, D_n) each, of any float dtype, with the images in the same order. They get no gradients.
        with_distance: False skips the distance term, which is then a constant zero.
        with_angle: the same for the angle term.

    Returns:
        Two scalars, ``distance`` and ``angle``, float64 for a float64 student and float32 otherwise. They are zero
        without a teacher, and for fewer than two distinct points.

    Raises:
        ValueError: an argument is not (N, D), or a teacher has another N.

    References:
        Park, Kim, Lu, Cho, *Relational Knowledge Distillation*, CVPR 2019, https://arxiv.org/abs/1904.05068.
        In *Diversified Mutual Learning* (https://arxiv.org/abs/2009.04170) the teachers are the other peers.

    Examples:
        >>> import torch
        >>> from ray_dmml import relational_losses
        >>> student = torch.randn(8, 16, requires_grad=True)
        >>> teacher = torch.randn(8, 32)
        >>> terms = relational_losses(student, [teacher])
        >>> loss = 1.0 * terms.distance + 2.0 * terms.angle
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([8, 16])
        >>> same_relations = relational_losses(student, [3 * student + 1])
        >>> [round(term.item(), 6) for term in same_relations]
        [0.0, 0.0]
    """
    require_same_batch(student, teachers)
    dtype = precision_of(student)
    distance = angle = student.new_zeros((), dtype=dtype)
    if not teachers or len(student) == 0:
        return RelationalTerms(distance, angle)
    with torch.autocast(student.device.type, enabled=False):
        own = Pairwise.of(student)
        with torch.no_grad():
            targets = [Pairwise.of(teacher.to(student.device)) for teacher in teachers]
        if with_distance:
            distances = _normalized_distances(own)
            terms = [F.smooth_l1_loss(distances, _normalized_distances(t)) for t in targets]
            distance = torch.stack(terms).sum().div(len(terms)).to(dtype)
        if with_angle:
            pairs = [(target.gram, target.inverse) for target in targets]
            angle = _AngleTerm.apply(own.gram, own.inverse, pairs).to(dtype)
    return RelationalTerms(distance, angle)


def _normalized_distances(pairs: Pairwise) -> Tensor:
    num_positive = pairs.distances.count_nonzero().clamp(min=1)
    mean = pairs.distances.sum() / num_positive
    return pairs.distances / torch.where(mean == 0, 1, mean)


class _AngleTerm(torch.autograd.Function):
    """Mean over teachers and triples of smooth-L1 between cosines; value and gradient in one pass.

    c are the student's cosines, t a teacher's, u the inverse distances, z = c - t, and i is the vertex:

        c_ijk = A_ijk u_ij u_ik,   A_ijk = G_jk - G_ij - G_ik + G_ii
        rho'(z) = clamp(z, -1, 1),   rho(z) = rho' (z - rho' / 2)

    All are symmetric in j and k. The triples are computed in blocks of vertices, and only (N, N) sums
    are kept.
    """

    @staticmethod
    def forward(ctx: Any, gram: Tensor, inverse: Tensor, teachers: list[tuple[Tensor, Tensor]]) -> Tensor:
        num_points = gram.shape[0]
        # Triples of one block. On a CPU its buffers fit into the core's cache; a GPU is faster with few
        # kernel launches.
        limit = 2**17 if gram.device.type == "cpu" else 2**23
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
                # dL/du_ij = 2 sum_k g A u_ik, and c already contains A u_ij u_ik.
                by_pair = torch.mul(g, c, out=c).sum(dim=2)
                grad_inverse[i] = 2 * by_pair * torch.where(u == 0, 0, 1 / u)
                # dL/dA, distributed to the four entries of G in A.
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
    """Writes the cosines at the vertices i into ``out``, (block, N, N), and returns it."""
    from_vertex, u = gram[i], inverse[i]
    squared_norm = gram.diagonal()[i, None]
    torch.sub(gram, from_vertex[:, :, None], out=out)
    out.sub_((from_vertex - squared_norm)[:, None, :])
    return out.mul_(u[:, :, None]).mul_(u[:, None, :])
