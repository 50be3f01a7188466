"""The relaxed contrastive loss against its definition, written with loops."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from ray_dmml.losses import relaxed_contrastive
from ray_dmml.losses.relaxed_contrastive import relaxed_contrastive_loss


def naive(student: Tensor, teachers: list[Tensor], sigma: float, delta: float) -> float:
    n, total = len(student), 0.0
    for teacher in teachers:
        t = [row / row.norm() for row in teacher]
        for i in range(n):
            mean = sum((student[i] - student[k]).norm().item() for k in range(n)) / n
            for j in range(n):
                if i != j:
                    d = (student[i] - student[j]).norm().item() / mean
                    w = math.exp(-((t[i] - t[j]).norm().item() ** 2) / sigma)
                    total += w * d**2 + (1 - w) * max(0.0, delta - d) ** 2
    return total / (n * (n - 1) * len(teachers))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num=st.integers(2, 7),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    sigma=st.floats(0.1, 3),
    delta=st.floats(0.1, 3),
)
def test_it_equals_the_definition(seed: int, num: int, sizes: list[int], sigma: float, delta: float) -> None:
    torch.manual_seed(seed)
    student = torch.randn(num, 4, dtype=torch.float64)
    teachers = [torch.randn(num, size, dtype=torch.float64) for size in sizes]
    value = relaxed_contrastive_loss(student, teachers, sigma=sigma, delta=delta)
    assert value.item() == pytest.approx(naive(student, teachers, sigma, delta), rel=1e-7, abs=1e-10)


def test_gradients() -> None:
    """They are those of finite differences, include that of the mean distance, and teachers get none."""
    torch.manual_seed(0)
    teacher = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    student = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: relaxed_contrastive_loss(x, [teacher.detach()]), student)
    relaxed_contrastive_loss(student, [teacher]).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("num_equal", [2, 6])
def test_equal_images_have_finite_gradients(num_equal: int) -> None:
    """Two equal images, and a batch of nothing else."""
    x = torch.randn(6, 8)
    x[:num_equal] = x[0]
    x.requires_grad_()
    relaxed_contrastive_loss(x, [x.detach() + 1]).backward()
    assert torch.isfinite(x.grad).all()


def test_edges() -> None:
    """A teacher's length does not count; one image or no teacher gives zero; another batch is refused."""
    x, t = torch.randn(6, 8), torch.randn(6, 3)
    torch.testing.assert_close(relaxed_contrastive_loss(x, [t]), relaxed_contrastive_loss(5 * x, [7 * t]))
    assert relaxed_contrastive_loss(x.half(), [t.half()]).dtype == torch.float32
    assert relaxed_contrastive_loss(x, []).item() == 0
    assert relaxed_contrastive_loss(x[:1], [t[:1]]).item() == 0
    with pytest.raises(ValueError, match=r"teacher 0 is \(5, 3\); embeddings are \(N, D\) with the student's N"):
        relaxed_contrastive_loss(x, [t[:5]])


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(relaxed_contrastive).failed == 0
