"""The sum of the mutual terms: those of relational distillation, and own ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ray_dmml.config.code import read_code, use_code
from ray_dmml.config.schema import LossConfig
from ray_dmml.errors import UserError
from ray_dmml.losses.mutual import MutualLoss
from ray_dmml.losses.relational import relational_losses
from ray_dmml.losses.relaxed_contrastive import relaxed_contrastive_loss
from ray_dmml.losses.similarity import similarity_loss

OWN = """
import torch
from torch import nn

def similarities(student, teachers, power=1):
    terms = [(student @ student.T - teacher @ teacher.T).abs().pow(power).mean() for teacher in teachers]
    return torch.stack(terms).mean()

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, student, teachers):
        self.count += 1
        return similarities(self.scale * student, teachers)

def broken(student, teachers):
    return (student - teachers[0][:, :3]).sum()

class Unsaved(Scaled):
    def get_extra_state(self): return open
    def set_extra_state(self, state): pass

def of_one(student, teachers):
    (teacher,) = teachers
    return (student @ student.T - teacher @ teacher.T).abs().mean()

def by_row(student, teachers):
    return student.sum(dim=1)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path) -> Iterator[None]:
    """The module own_terms."""
    (tmp_path / "own_terms.py").write_text(OWN)
    use_code(read_code([tmp_path / "own_terms.py"]))
    yield
    use_code({})


def build(**config: Any) -> MutualLoss:
    return MutualLoss(LossConfig.model_validate(config), 8)


def batch() -> tuple[Tensor, list[Tensor]]:
    """A student's embeddings before normalization, and those of two teachers of other sizes."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(6, 8, generator=generator).requires_grad_()
    return raw, [torch.randn(6, size, generator=generator) for size in (5, 8)]


def naive(student: Tensor, teachers: list[Tensor], power: int = 1) -> float:
    means = []
    for teacher in teachers:
        total = 0.0
        for i in range(6):
            for j in range(6):
                total += abs(student[i].dot(student[j]) - teacher[i].dot(teacher[j])).item() ** power
        means.append(total / 36)
    return sum(means) / len(means)


@pytest.mark.parametrize("normalize", [True, False])
def test_own_terms_are_added_with_their_weights(normalize: bool) -> None:
    """They get what the relational terms get: unit length, or the head's output; two terms of one function differ
    in args and label. The relaxed contrastive loss always gets the head's output."""
    raw, teachers = batch()
    loss = build(
        relational={"normalize": normalize},
        relaxed_contrastive={"weight": 0.3},
        mutual=[
            {"name": "own_terms:similarities", "weight": 3},
            {"name": "own_terms:similarities", "weight": 0.5, "args": {"power": 2}, "label": "squared"},
            {"name": "own_terms:Scaled", "weight": 0},
        ],
    )
    total, terms = loss(raw, F.normalize(raw), teachers, 0)
    student = (F.normalize(raw) if normalize else raw).detach()
    assert list(terms) == ["distance", "angle", "relaxed_contrastive", "similarities", "squared"]
    torch.testing.assert_close(terms["relaxed_contrastive"], relaxed_contrastive_loss(raw, teachers))
    assert terms["similarities"].item() == pytest.approx(naive(student, teachers), rel=1e-5)
    assert terms["squared"].item() == pytest.approx(naive(student, teachers, 2), rel=1e-5)
    both = relational_losses(student, teachers)
    expected = both.distance + 2 * both.angle + 3 * terms["similarities"] + 0.5 * terms["squared"]
    expected += 0.3 * terms["relaxed_contrastive"]
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    total.backward()
    assert raw.grad is not None and raw.grad.abs().sum() > 0


def test_an_own_term_alone_with_a_warm_up() -> None:
    """Without relational weights only the own term is left, whose weight rises linearly; before that there is none."""
    raw, teachers = batch()
    loss = build(
        relational={"distance_weight": 0, "angle_weight": 0},
        mutual=[{"name": "own_terms:similarities", "weight": 2, "warmup_steps": 4}],
    )
    assert loss(raw, F.normalize(raw), teachers, 0) == (None, {})
    at_one, terms = loss(raw, F.normalize(raw), teachers, 1)
    assert at_one.item() == pytest.approx(0.5 * terms["similarities"].item())
    assert loss(raw, F.normalize(raw), teachers, 9)[0].item() == pytest.approx(2 * terms["similarities"].item())
    assert loss(raw, F.normalize(raw), [], 9) == (None, {})


def test_parameters_and_buffers_of_a_term_are_those_of_the_loss() -> None:
    """They learn and are stored; building the loss leaves them as they were."""
    loss = build(mutual=[{"name": "own_terms:Scaled"}])
    assert [value.item() for value in loss.state_dict().values()] == [1, 0]
    raw, teachers = batch()
    loss(raw, F.normalize(raw), teachers, 0)[0].backward()
    (scale,) = loss.parameters()
    assert scale.grad is not None and scale.grad != 0
    assert [value.item() for value in loss.state_dict().values()] == [1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "own_terms:broken",
            r"loss.mutual.0: own_terms:broken fails on a student .* \(4, 8\) at .*own_terms.py, line 20",
        ),
        ("own_terms:by_row", r"loss.mutual.0: own_terms:by_row must return a scalar tensor, and returns \(4,\)"),
        ("own_terms:Unsaved", r"loss.mutual.0: own_terms:Unsaved: get_extra_state may give tensors and plain values"),
        ("own_terms:rows", r"loss.mutual.0.name 'own_terms:rows': module own_terms .*has no rows"),
    ],
)
def test_mistakes_are_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(mutual=[{"name": name}])


def test_a_term_of_one_teacher_is_tried_with_one() -> None:
    for teacher in ("ensemble", "others"):
        build(mutual=[{"name": "own_terms:of_one", "teacher": teacher}])
    with pytest.raises(UserError, match=r"a student \(4, 8\) and a list of teachers \(4, 8\), \(4, 8\) at .*, line 27"):
        build(mutual=[{"name": "own_terms:of_one"}])


@pytest.mark.parametrize("teacher", ["ensemble", "others"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_teacher_of_many_peers(place: int, teacher: str) -> None:
    """Every term with `teacher: ensemble` sees one teacher: the peer's own published embeddings and those of all
    others, at unit length, concatenated in peer order. It has no gradient. `others` leaves out the peer's own."""
    raw, teachers = batch()
    published = 3 * torch.randn(6, 4)
    ensemble = {"teacher": teacher}
    loss = build(
        relational={**ensemble, "normalize": False},
        similarity={**ensemble, "weight": 0.3, "temperature": 0.2},
        relaxed_contrastive={**ensemble, "weight": 0.7, "sigma": 0.5},
        mutual=[
            {"name": "own_terms:similarities", **ensemble},
            {"name": "own_terms:similarities", "label": "each"},
        ],
    )
    total, terms = loss(raw, F.normalize(raw), teachers, 0, published=published, place=place)
    members = [*teachers[:place], *([published] if teacher == "ensemble" else []), *teachers[place:]]
    one = torch.cat([member / member.norm(dim=1, keepdim=True) for member in members], dim=1)
    student = raw.detach()
    both = relational_losses(student, [one])
    expected = {
        "distance": both.distance,
        "angle": both.angle,
        "similarity": similarity_loss(student, [one], temperature=0.2),
        "relaxed_contrastive": relaxed_contrastive_loss(student, [one], sigma=0.5),
        "similarities": torch.tensor(naive(student, [one])),
        "each": torch.tensor(naive(student, teachers)),
    }
    assert list(terms) == list(expected)
    torch.testing.assert_close(terms, expected)
    weights = {"distance": 1, "angle": 2, "similarity": 0.3, "relaxed_contrastive": 0.7, "similarities": 1, "each": 1}
    assert total.item() == pytest.approx(sum(weights[name] * value.item() for name, value in expected.items()))
    own = build(
        relational={"distance_weight": 0, "angle_weight": 0}, mutual=[{"name": "own_terms:similarities", **ensemble}]
    )
    unit = F.normalize(raw)
    published_now, published_before = (
        torch.autograd.grad(own(raw, unit, teachers, 0, published=embedding, place=place)[0], raw, retain_graph=True)
        for embedding in (None, unit.detach())
    )
    torch.testing.assert_close(published_now, published_before)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({}, {0: 1, 1000: 1}),
        ({"warmup_steps": 4}, {0: 0, 1: 0.25, 4: 1, 1000: 1}),
        ({"decay_until": 10}, {0: 1, 5: 0.5, 9: 0.1, 10: 0, 1000: 0}),
        ({"warmup_steps": 2, "decay_until": 6}, {0: 0, 1: 0.5, 2: 1, 4: 0.5, 6: 0, 7: 0}),
    ],
)
def test_weights_rise_and_fall_linearly(settings: dict[str, int], factors: dict[int, float]) -> None:
    raw, teachers = batch()
    loss = build(relational={**settings, "distance_weight": 3, "angle_weight": 0})
    for step, factor in factors.items():
        total, terms = loss(raw, F.normalize(raw), teachers, step)
        if factor:
            assert list(terms) == ["distance"]
            assert total.item() == pytest.approx(3 * factor * terms["distance"].item())
        else:
            assert (total, terms) == (None, {})


def test_a_fall_must_end_after_the_warm_up() -> None:
    with pytest.raises(ValueError, match="decay_until 5 must be above warmup_steps 5"):
        LossConfig.model_validate({"similarity": {"weight": 1, "warmup_steps": 5, "decay_until": 5}})
