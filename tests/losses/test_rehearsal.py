"""What is found out about a metric loss before a run: every kind of batch that the run can meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ray_dmml.losses.rehearsal import rehearse, rehearse_small_classes


class Recorded(nn.Module):
    """A loss that remembers its batches, over all copies, and has a parameter."""

    def __init__(self, formula: str = "mean") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.formula = formula

    def __deepcopy__(self, memo: object) -> Recorded:
        copy = Recorded(self.formula)
        copy.batches = self.batches
        return copy

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.batches.append((embeddings.detach().clone(), labels))
        match self.formula:
            case "rows":
                return self.weight * embeddings.mean(dim=1)
            case "distance":  # its gradient at equal images is not finite
                return self.weight * (embeddings[:, None] - embeddings).square().sum(dim=2).sqrt().mean()
            case "logarithm":
                return (-self.weight * embeddings.square().sum()).log()
            case "class 7":
                return self.weight * embeddings.mean() * torch.arange(8)[labels].float().mean()
        return self.weight * embeddings.mean()


def equal_pairs(embeddings: Tensor, labels: Tensor) -> set[bool]:
    """Whether pairs of equal rows are of one class, of two classes, or both."""
    pairs = (embeddings[:, None] == embeddings).all(dim=2).triu(diagonal=1).nonzero()
    return {bool(labels[i] == labels[j]) for i, j in pairs}


@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("size", [1, 16])
def test_the_batches_are_those_of_a_run(num_classes: int, size: int) -> None:
    """Unit length, the first and the last class, equal images within a class and between two, small classes."""
    loss = Recorded()
    rehearse(loss, num_classes, size)
    rehearse_small_classes(loss, num_classes, size)
    assert len(loss.batches) == 3 and loss.weight.grad is None
    for embeddings, labels in loss.batches:
        assert embeddings.shape == (len(labels), size) and labels.min() == 0 and labels.max() == num_classes - 1
        assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(labels)))
    counts = [set(labels.unique(return_counts=True)[1].tolist()) for _, labels in loss.batches]
    assert counts[:2] == [{4}, {4}] and len(counts[2]) > 1
    assert size == 1 or [equal_pairs(*batch) for batch in loss.batches] == [set(), {True, False}, set()]


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("rows", "the result is not a single number"),
        ("logarithm", "its value is not finite$"),
        ("distance", "its gradient is not finite"),
        ("class 7", "out of bounds|out of range"),
    ],
)
def test_what_breaks_in_a_run_breaks_here(formula: str, message: str) -> None:
    """A result that is no number, or not finite; a class that the loss does not know."""
    with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
        rehearse(Recorded(formula), 10, 16)
