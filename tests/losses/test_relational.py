"""The relational losses against their definition, also for embeddings that are close together."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ray_dmml.losses import relational
from ray_dmml.losses.relational import relational_losses

KINDS = ["spread", "bunched", "near pairs", "equal pairs", "all equal"]


def embeddings(kind: str, num: int, size: int, seed: int = 0) -> Tensor:
    """(num, size) float64 of float32 values, so that both precisions can hold them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, size, generator=generator, dtype=torch.float64)
    x = F.normalize(x)
    if kind == "bunched":
        x = F.normalize(x[:1] + 1e-3 / 2 * x)
    elif kind == "near pairs":
        x[1::2] = x[::2] + 1e-4 * x[1::2]
    elif kind == "equal pairs":
        x[1::2] = x[::2]
    elif kind == "all equal":
        x[:] = x[:1]
    return x.float().double()


def naive(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The definitions of the distance and angle terms, triple by triple."""
    n = len(student)

    def distance(x: Tensor, i: int, j: int) -> Tensor:
        return x.new_zeros(()) if torch.equal(x[i], x[j]) else (x[i] - x[j]).norm()

    def distances(x: Tensor) -> Tensor:
        rows = [torch.stack([distance(x, i, j) for j in range(n)]) for i in range(n)]
        d = torch.stack(rows)
        return d / d[d > 0].mean() if (d > 0).any() else d

    def cosine(x: Tensor, i: int, j: int, k: int) -> Tensor:
        if torch.equal(x[i], x[j]) or torch.equal(x[i], x[k]):
            return x.new_zeros(())
        return (x[j] - x[i]) @ (x[k] - x[i]) / (distance(x, i, j) * distance(x, i, k))

    def cosines(x: Tensor) -> Tensor:
        triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
        return torch.stack([cosine(x, *triple) for triple in triples])

    def smooth_l1(a: Tensor, b: Tensor) -> Tensor:
        z = (a - b).abs()
        return torch.where(z < 1, z**2 / 2, z - 0.5).mean()

    teacher = teacher.detach()
    return (
        smooth_l1(distances(student), distances(teacher)),
        smooth_l1(cosines(student), cosines(teacher)),
    )


def textbook(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The usual form with (N, N, D) differences, for batches that are too large for the loops."""

    def relations(x: Tensor) -> tuple[Tensor, Tensor]:
        difference = x[None, :] - x[:, None]
        squared = difference.square().sum(dim=2)
        apart = squared > 0
        d = torch.where(apart, squared, 1).sqrt() * apart
        # Coincident points have no direction: no value and no gradient.
        unit = difference * apart[:, :, None] / torch.where(apart, d, 1)[:, :, None]
        return d / (d.sum() / apart.sum().clamp(min=1) + (~apart.any())), unit @ unit.mT

    (mine, my_cosines), (theirs, their_cosines) = relations(student), relations(teacher.detach())
    return F.smooth_l1_loss(mine, theirs), F.smooth_l1_loss(my_cosines, their_cosines)


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    """The gradient, zero if the loss does not depend on x."""
    if not loss.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """The differences are within ``tolerance`` of the largest wanted number."""
    assert torch.isfinite(got).all()
    scale = wanted.abs().max().clamp(min=1e-12).item()
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_equal_the_loops_over_all_triples(kind: str) -> None:
    """Both terms equal their definition, for every kind of batch and a teacher of another size."""
    student = embeddings(kind, 8, 5).requires_grad_()
    for teacher in (embeddings("spread", 8, 3, seed=1), embeddings(kind, 8, 5, seed=2)):
        wanted = naive(student, teacher)
        got = relational_losses(student, [teacher])
        for a, b in zip(got, wanted, strict=True):
            # For points 1e-4 apart cosines from G lose the square of that, 8 of float64's 16 digits.
            tolerance = 1e-7 if kind == "near pairs" else 1e-10
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-12)
            assert_near(gradient(a, student), gradient(b, student), tolerance)


def test_large_cosine_differences_are_in_the_linear_part() -> None:
    """Cosines of mirrored points differ by more than 1: loss and gradient equal the definition."""
    student = torch.tensor([[0.0, 0], [1, 0.1], [-1, 0.2], [0, 2]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0], [1, 0.1], [2, 0.2], [0, -2]], dtype=torch.float64)
    student.requires_grad_()
    wanted = naive(student, teacher)[1]
    got = relational_losses(student, [teacher]).angle
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    assert_near(gradient(got, student), gradient(wanted, student), 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_has_the_value_and_gradient_of_float64(kind: str) -> None:
    """No digit is lost to cancellation: float32 inputs are within 1e-6 and 1e-5 of float64."""
    student = embeddings(kind, 40, 64).requires_grad_()
    teachers = [embeddings("spread", 40, 32, seed=1), embeddings(kind, 40, 64, seed=2)]
    single = student.detach().float().requires_grad_()
    for teacher in teachers:
        wanted = textbook(student, teacher)
        got = relational_losses(single, [teacher.float()])
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == torch.float32
            assert_near(a, b.detach(), 1e-6)
            assert_near(gradient(a, single), gradient(b, student), 1e-5)


def test_gradcheck() -> None:
    """The closed-form gradients are those of finite differences."""
    student = embeddings("spread", 6, 4).requires_grad_()
    teachers = [embeddings("spread", 6, 4, seed=1), embeddings("spread", 6, 3, seed=2)]

    def total(x: Tensor) -> Tensor:
        terms = relational_losses(x, teachers)
        return terms.distance + 2 * terms.angle

    assert gradcheck(total, (student,))


def test_many_blocks_give_what_one_block_gives() -> None:
    """A large batch is computed in blocks of vertices, the last one smaller, and equals the usual form."""
    student = embeddings("spread", 75, 6).requires_grad_()
    teacher = embeddings("spread", 75, 6, seed=1)
    got, wanted = relational_losses(student, [teacher]).angle, textbook(student, teacher)[1]
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=0)
    assert_near(gradient(got, student), gradient(wanted, student), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """Value and gradient are the same under bfloat16 autocast, and half-precision inputs are upcast."""
    given_student = embeddings("spread", 12, 16).to(dtype)
    teacher = embeddings("spread", 12, 8, seed=1).to(dtype)
    wide = given_student.detach().clone().float().requires_grad_()
    wanted = sum(relational_losses(wide, [teacher.float()]))
    wanted.backward()
    student = given_student.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sum(relational_losses(student, [teacher]))
        got.backward()
    assert got.dtype == torch.float32
    assert got.item() == wanted.item()
    assert torch.equal(student.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("num", [0, 1, 2])
def test_smallest_batches(num: int) -> None:
    """Two points have one normalised distance and no angle. Fewer points have nothing to compare."""
    student = embeddings("spread", num, 4).requires_grad_()
    terms = relational_losses(student, [embeddings("spread", num, 4, seed=1)])
    assert terms.distance.item() == pytest.approx(0, abs=1e-15)
    assert terms.angle.item() == pytest.approx(0, abs=1e-15)
    if num:
        (terms.distance + terms.angle).backward()
        assert torch.isfinite(student.grad).all()


def test_terms_are_means_over_the_teachers() -> None:
    """With three teachers of different sizes each term is the mean of the three single terms."""
    student = embeddings("spread", 10, 6).requires_grad_()
    teachers = [embeddings("spread", 10, size, seed=size) for size in (3, 6, 9)]
    got = relational_losses(student, teachers)
    single = [relational_losses(student, [teacher]) for teacher in teachers]
    for term, terms in zip(got, zip(*single, strict=True), strict=True):
        wanted = sum(terms) / 3
        torch.testing.assert_close(term, wanted, rtol=1e-12, atol=0)
        assert_near(gradient(term, student), gradient(wanted, student), 1e-12)


def test_a_skipped_term_is_zero_and_does_not_change_the_other() -> None:
    """Without one term the other has the same bits. Without a teacher both are zero."""
    student = embeddings("spread", 10, 6).requires_grad_()
    teacher = embeddings("spread", 10, 6, seed=1)
    both = relational_losses(student, [teacher])
    only_angle = relational_losses(student, [teacher], with_distance=False)
    only_distance = relational_losses(student, [teacher], with_angle=False)
    assert both.distance > 0 and both.angle > 0
    assert only_angle == (0, both.angle)
    assert only_distance == (both.distance, 0)
    assert relational_losses(student, []) == (0, 0)


def test_no_gradient_reaches_a_teacher() -> None:
    """A teacher that is part of a graph gets no gradient."""
    student = embeddings("spread", 6, 4).requires_grad_()
    teacher = embeddings("spread", 6, 4, seed=1).requires_grad_()
    sum(relational_losses(student, [teacher])).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_the_students_mean_distance_keeps_its_gradient() -> None:
    """Distances are relative, so scaling the student changes nothing: the radial gradient is zero."""
    student = embeddings("spread", 8, 4).requires_grad_()
    relational_losses(student, [embeddings("spread", 8, 4, seed=1)]).distance.backward()
    radial = (student.grad * (student - student.mean(dim=0)).detach()).sum()
    assert abs(radial) < 1e-14 < student.grad.abs().max()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num=st.integers(3, 9),
    size=st.integers(2, 6),
    scale=st.floats(1e-3, 1e3),
)
def test_scale_rotation_and_shift_change_nothing(seed: int, num: int, size: int, scale: float) -> None:
    """Relations are relative: student and teacher may be scaled, rotated and shifted."""
    student = embeddings("spread", num, size, seed)
    teacher = embeddings("spread", num, size, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
    moved = scale * (student @ rotation + 1)
    wanted = relational_losses(student, [teacher])
    for got in (
        relational_losses(moved, [teacher]),
        relational_losses(student, [scale * teacher @ rotation]),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-10)
    assert sum(relational_losses(moved, [student])) < 1e-9


class LargestOutput(TorchDispatchMode):
    """Records the largest number of elements that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize(("num", "size"), [(64, 1024), (320, 8)])
def test_memory_is_bounded(num: int, size: int) -> None:
    """No operation returns an (N, N, D) tensor, nor an (N, N, N) one for a large batch."""
    student = embeddings("spread", num, size).requires_grad_()
    teacher = embeddings("spread", num, size, seed=1)
    with LargestOutput() as largest:
        sum(relational_losses(student, [teacher])).backward()
    assert num**2 <= largest.elements <= max(4 * num**2, 2**19)
    assert largest.elements < max(num**2 * size, num**3) / 3


def test_wrong_shapes_are_named() -> None:
    """The error names the number of a teacher with another batch."""
    student = embeddings("spread", 6, 4)
    with pytest.raises(ValueError, match=r"teacher 1 is \(5, 4\)"):
        relational_losses(student, [student, student[:5]])
    with pytest.raises(ValueError, match="student is"):
        relational_losses(student[0], [student])


def test_the_example_of_the_docstring() -> None:
    """It runs, and prints what it shows."""
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    [example] = finder.find(relational_losses, "relational_losses", module=relational)
    result = runner.run(example)
    assert result.attempted >= 7 and result.failed == 0
