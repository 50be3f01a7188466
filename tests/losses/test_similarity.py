"""Similarity distillation against its definition, written with loops."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from ray_dmml.losses import similarity
from ray_dmml.losses.similarity import similarity_loss


def naive(student: Tensor, teachers: list[Tensor], temperature: float) -> float:
    """Mean over teachers and images i of KL(p || q), with p and q over the other images j."""

    def distribution(x: Tensor, i: int) -> list[float]:
        cosines = [(x[i] @ x[j] / (x[i].norm() * x[j].norm())).item() for j in range(len(x)) if j != i]
        weights = [math.exp(cosine / temperature) for cosine in cosines]
        return [weight / sum(weights) for weight in weights]

    divergences = []
    for teacher in teachers:
        for i in range(len(student)):
            pairs = zip(distribution(teacher, i), distribution(student, i), strict=True)
            divergences.append(sum(p * math.log(p / q) for p, q in pairs))
    return sum(divergences) / len(divergences)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num=st.integers(2, 7),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    temperature=st.floats(0.05, 2),
)
def test_it_equals_the_definition(seed: int, num: int, sizes: list[int], temperature: float) -> None:
    torch.manual_seed(seed)
    student = torch.randn(num, 4, dtype=torch.float64)
    teachers = [torch.randn(num, size, dtype=torch.float64) for size in sizes]
    value = similarity_loss(student, teachers, temperature=temperature)
    assert value.item() == pytest.approx(naive(student, teachers, temperature), rel=1e-9, abs=1e-12)


def test_gradients() -> None:
    """They are those of finite differences, and teachers get none; also where two images are equal."""
    torch.manual_seed(0)
    teacher = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    student = torch.randn(5, 4, dtype=torch.float64)
    student[1] = student[0]
    student.requires_grad_()
    assert gradcheck(lambda x: similarity_loss(x, [teacher.detach()], temperature=0.5), student)
    similarity_loss(student, [teacher]).backward()
    assert teacher.grad is None


def test_edges() -> None:
    """Half precision is compared in float32; one image or no teacher gives zero; another batch is refused."""
    half = torch.randn(6, 8).half()
    assert similarity_loss(half, [half.float() * 3]).dtype == torch.float32
    assert similarity_loss(half, [half.float() * 3]).item() == pytest.approx(0, abs=1e-6)
    assert similarity_loss(half, []).item() == 0
    assert similarity_loss(half[:1], [half[:1]]).item() == 0
    with pytest.raises(ValueError, match=r"teacher 0 is \(5, 8\); embeddings are \(N, D\) with the student's N"):
        similarity_loss(half, [half[:5]])


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(similarity).failed == 0
