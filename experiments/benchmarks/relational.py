"""Rows `relational` and `relational-memory`: our relational distillation against the textbook's."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.resident import peak_beyond
from benchmarks.row import Goal, Row, Settings, in_turn, require
from benchmarks.textbook import relational_loss
from ray_dmml.losses.relational import relational_losses

SIZE, NUM_OTHERS, REPEATS = 512, 3, 3
Loss = Callable[[Tensor, list[Tensor]], Tensor]


def ours(student: Tensor, others: list[Tensor]) -> Tensor:
    terms = relational_losses(student, others)
    return terms.distance + 2 * terms.angle


def batch(num_points: int) -> tuple[Tensor, list[Tensor]]:
    """A student that wants its gradient and its teachers, (N, 512) float32 of unit length."""
    torch.manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(1 + NUM_OTHERS, num_points, SIZE), dim=2)
    return points[0].requires_grad_(), list(points[1:])


def evaluate(loss: Loss, num_points: int) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    student, others = batch(num_points)
    value = loss(student, others)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def require_same(num_points: int) -> None:
    (value, gradient), (right, right_gradient) = (
        evaluate(loss, num_points) for loss in (ours, relational_loss)
    )
    require(abs(value - right).item() <= 1e-5 * right.item(), "the textbook gives the same loss")
    error = (gradient - right_gradient).norm() / right_gradient.norm()
    require(error.item() <= 1e-4, "the textbook gives the same gradient")


def relational(settings: Settings) -> list[Row]:
    """Time at N = 128, one thread."""
    torch.set_num_threads(1)
    require_same(128)

    def milliseconds(loss: Loss) -> float:
        began = time.perf_counter()
        for _ in range(REPEATS):
            evaluate(loss, 128)
        return 1e3 * (time.perf_counter() - began) / REPEATS

    a, b = in_turn(
        settings.rounds, lambda: milliseconds(ours), lambda: milliseconds(relational_loss)
    )
    what = "distance + angle against 3 others, N = 128, D = 512, forward and backward / textbook"
    return [Row("relational", what, "ms", a, b, Goal("B/A", ">=", 15))]


def relational_memory(settings: Settings) -> list[Row]:
    """Peak memory at N = 512. All threads: the textbook's arithmetic takes long."""
    require_same(512)
    a, b = in_turn(
        settings.rounds,
        lambda: peak_beyond(lambda: evaluate(ours, 512)),
        lambda: peak_beyond(lambda: evaluate(relational_loss, 512)),
    )
    what = "peak extra memory of the same at N = 512 / textbook"
    return [Row("relational-memory", what, "MiB", a, b, Goal("A", "<=", 256))]
