"""Rows `relational` and `relational-memory`: our relational distillation against the textbook's; row
`ensemble-teacher`: how the cost of the mutual loss grows with the number of peers."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.memory import peak_beyond
from benchmarks.row import Goal, Row, Settings, in_turn, require
from ray_dmml.config.schema import LossConfig
from ray_dmml.losses.mutual import MutualLoss
from ray_dmml.losses.relational import relational_losses
from ray_dmml.ray_backend.process import tune_malloc

SIZE, NUM_OTHERS, REPEATS = 512, 3, 3
Loss = Callable[[Tensor, list[Tensor]], Tensor]


def ours(student: Tensor, others: list[Tensor]) -> Tensor:
    terms = relational_losses(student, others)
    return terms.distance + 2 * terms.angle


def textbook(student: Tensor, teachers: list[Tensor]) -> Tensor:
    """The paper's formulas, by the (N, N, D) tensor of differences: distance + 2 angle, mean over teachers.

    The student's own relations are computed once. Park, Kim, Lu, Cho, *Relational Knowledge
    Distillation*, CVPR 2019, https://arxiv.org/abs/1904.05068
    """
    distances, angles = _relations(student)
    terms = []
    for teacher in teachers:
        with torch.no_grad():
            teacher_distances, teacher_angles = _relations(teacher)
        terms.append(F.smooth_l1_loss(distances, teacher_distances) + 2 * F.smooth_l1_loss(angles, teacher_angles))
    return torch.stack(terms).mean()


def _relations(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """(N, N) distances divided by their mean, and (N, N, N) cosines at the first index."""
    differences = embeddings[None, :, :] - embeddings[:, None, :]  # (N, N, D)
    squared = differences.square().sum(dim=2)
    apart = squared > 0
    # The root has an infinite gradient at zero, so the diagonal is kept out of it.
    distances = squared.where(apart, 1).sqrt() * apart
    normalised = distances / distances[apart].mean()
    directions = F.normalize(differences, dim=2)
    return normalised, torch.bmm(directions, directions.transpose(1, 2))


def batch(num_points: int) -> tuple[Tensor, list[Tensor]]:
    """A student that requires its gradient, and its teachers, (N, 512) float32 of unit length."""
    torch.manual_seed(0)
    points = F.normalize(torch.randn(1 + NUM_OTHERS, num_points, SIZE), dim=2)
    return points[0].requires_grad_(), list(points[1:])


def value_and_gradient(loss: Loss, num_points: int) -> tuple[Tensor, Tensor]:
    student, others = batch(num_points)
    value = loss(student, others)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def require_same(num_points: int) -> None:
    value, gradient = value_and_gradient(ours, num_points)
    expected, expected_gradient = value_and_gradient(textbook, num_points)
    same = abs(value - expected).item() <= 1e-5 * expected.item()
    require(same, "the textbook gives the same loss")
    error = (gradient - expected_gradient).norm() / expected_gradient.norm()
    require(error.item() <= 1e-4, "the textbook gives the same gradient")


def relational(settings: Settings) -> list[Row]:
    """Time at N = 128, one thread."""
    torch.set_num_threads(1)
    require_same(128)

    def milliseconds(loss: Loss) -> float:
        began = time.perf_counter()
        for _ in range(REPEATS):
            value_and_gradient(loss, 128)
        return 1e3 * (time.perf_counter() - began) / REPEATS

    a, b = in_turn(settings.rounds, lambda: milliseconds(ours), lambda: milliseconds(textbook))
    what = "distance + angle against 3 others, N = 128, D = 512, forward and backward / textbook"
    return [Row("relational", what, "ms", a, b, Goal("B/A", ">=", 15))]


def relational_memory(settings: Settings) -> list[Row]:
    """Peak memory at N = 512, with all threads, because the textbook's arithmetic takes long."""
    require_same(512)
    a, b = in_turn(
        settings.rounds,
        lambda: peak_beyond(lambda: value_and_gradient(ours, 512)),
        lambda: peak_beyond(lambda: value_and_gradient(textbook, 512)),
    )
    what = "peak extra memory of the same at N = 512 / textbook"
    return [Row("relational-memory", what, "MiB", a, b, Goal("A", "<=", 256))]


def ensemble_teacher(settings: Settings) -> list[Row]:
    """Time of the mutual loss of a peer with one ensemble as the teacher, one thread; in the details also with each
    other peer as a teacher."""
    torch.set_num_threads(1)
    tune_malloc()  # as the process of a peer does
    losses = {}
    for teacher in ("ensemble", "each"):
        config = LossConfig.model_validate({"relational": {"teacher": teacher}})
        losses[teacher] = MutualLoss(config, SIZE)
    torch.manual_seed(0)
    raw, *teachers = torch.randn(8, 128, SIZE)
    raw.requires_grad_()

    def milliseconds(num_peers: int, teacher: str = "ensemble") -> float:
        began = time.perf_counter()
        for _ in range(10 * REPEATS):
            value, _ = losses[teacher](raw, F.normalize(raw), teachers[: num_peers - 1], 0)
            torch.autograd.grad(value, raw)
        return 1e3 * (time.perf_counter() - began) / (10 * REPEATS)

    a, b = in_turn(settings.rounds, lambda: milliseconds(8), lambda: milliseconds(2))
    each = in_turn(settings.rounds, lambda: milliseconds(8, "each"), lambda: milliseconds(2, "each"))
    details = {f"ms with teacher: each, {num} peers": median(times) for num, times in zip((8, 2), each, strict=True)}
    what = "mutual loss with the ensemble as the teacher, N = 128, D = 512, 8 peers / 2 peers"
    return [Row("ensemble-teacher", what, "ms", a, b, Goal("A/B", "<=", 1.2), details)]
