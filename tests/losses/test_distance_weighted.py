"""Distance-weighted sampling of negatives, and exact Euclidean distances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_samples import batch
from torch import Tensor
from torch.nn import functional as F

from ray_dmml.losses.distance_weighted import DistanceWeightedNegativeMiner, ExactEuclideanDistance


def naive_probabilities(x: Tensor, labels: Tensor, anchor: int) -> list[float]:
    """Each image's probability as the negative of ``anchor``: the formula, one image at a time."""
    size = x.shape[1]
    logs = {}
    for other in range(len(x)):
        if labels[other] == labels[anchor]:
            continue
        d = max(math.dist(x[other].tolist(), x[anchor].tolist()), 0.5)
        if d < 1.4:
            logs[other] = (2 - size) * math.log(d) - (size - 3) / 2 * math.log(1 - d * d / 4)
    if not logs:
        logs = {o: 0.0 for o in range(len(x)) if labels[o] != labels[anchor]}
    top = max(logs.values())
    weights = [math.exp(logs[o] - top) if o in logs else 0.0 for o in range(len(x))]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("size", [128, 512])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_negatives_have_the_probabilities_of_the_paper(size: int, spread: float) -> None:
    """The frequencies of many samples follow 1 / q(d), also at D = 512 with near positives."""
    generator = torch.Generator().manual_seed(size)
    x, labels = batch(4, 3, size, spread)
    # Some classes share a direction, so that negatives have many distances within 1.4.
    common = F.normalize(torch.randn(1, size, generator=generator, dtype=torch.float64))
    x = F.normalize(x + torch.linspace(0, 1, len(x))[:, None].double() * common)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    if spread == 0.1:
        assert distance[0, 1] < 0.5, "positives must be nearer than the cutoff here"
    wanted = torch.tensor([naive_probabilities(x, labels, a) for a in range(len(x))])
    assert wanted.max() > 0.2, "otherwise uniform samples would pass"
    miner = DistanceWeightedNegativeMiner()
    weights = miner.weights(distance, labels[:, None] != labels, size)
    torch.testing.assert_close((weights / weights.sum(1, keepdim=True)).float(), wanted)

    torch.manual_seed(0)
    counts = torch.zeros(len(x), len(x))
    for _ in range(1500):
        anchors, _, negatives = miner(x, labels)
        counts.index_put_((anchors, negatives), torch.ones(len(anchors)), accumulate=True)
    totals = counts.sum(dim=1, keepdim=True)
    assert (totals == 1500 * 2).all()
    sigma = (wanted * (1 - wanted) / totals).sqrt()
    assert ((counts / totals - wanted).abs() <= 5 * sigma + 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=24),
    size=st.sampled_from([2, 3, 64, 512]),
    seed=st.integers(0, 10**6),
)
def test_every_positive_pair_gets_one_negative(labels: list[int], size: int, seed: int) -> None:
    """For any classes: all ordered pairs a != p once, each with an image of another class."""
    torch.manual_seed(seed)
    x, y = torch.randn(len(labels), size), torch.tensor(labels)
    anchors, positives, negatives = DistanceWeightedNegativeMiner()(x, y)
    wanted = [
        (a, p)
        for a in range(len(labels))
        for p in range(len(labels))
        if a != p and labels[a] == labels[p] and len(set(labels)) > 1
    ]
    assert list(zip(anchors.tolist(), positives.tolist(), strict=True)) == wanted
    assert negatives.dtype == torch.int64 and len(negatives) == len(wanted)
    assert (y[anchors] != y[negatives]).all()


def test_negatives_beyond_the_cutoff_are_sampled_only_if_there_is_no_other() -> None:
    """The only negative within the cutoff is always sampled. With none, all are equally frequent."""
    x = torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [0.6, 0.8, 0], [-1, 0, 0], [0, -1, 0.1]])
    labels = torch.tensor([0, 0, 1, 2, 3])
    miner = DistanceWeightedNegativeMiner(nonzero_loss_cutoff=1.2)
    torch.manual_seed(0)
    negatives = torch.cat([miner(x, labels)[2] for _ in range(50)])
    assert (negatives == 2).all()
    far = torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [-1, 0.1, 0], [-1, 0, 0], [-1, -0.1, 0.1]])
    negatives = torch.cat([miner(far, labels)[2] for _ in range(1500)])
    frequency = torch.bincount(negatives, minlength=5) / len(negatives)
    assert frequency[:2].sum() == 0
    torch.testing.assert_close(frequency[2:], torch.full((3,), 1 / 3), rtol=0, atol=0.04)


def test_samples_follow_the_seed_of_torch() -> None:
    """The same seed samples the same negatives, another seed others."""
    x, labels = batch(8, 4, 32)
    miner = DistanceWeightedNegativeMiner()

    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return miner(x, labels)[2].tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_gradient_of_the_distance_is_zero_at_zero() -> None:
    """It is neither NaN nor infinite: coincident points have no direction."""
    x = torch.ones(30, 3, requires_grad=True)
    ExactEuclideanDistance()(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("cutoffs", [(0, 1.4), (1.4, 0.5), (1, 1), (0.5, 2.1)])
def test_impossible_cutoffs_are_refused(cutoffs: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="0 < cutoff < nonzero_loss_cutoff <= 2 is needed"):
        DistanceWeightedNegativeMiner(*cutoffs)


def test_pairwise_and_matrix_distances_agree() -> None:
    """Both are the exact distances, for points that are 1e-5 apart as well."""
    x, _ = batch(3, 10, 8)
    y = x + 1e-5 * torch.flip(x, [0])
    distance = ExactEuclideanDistance(normalize_embeddings=False)
    exact = torch.tensor([math.dist(a, b) for a, b in zip(x, y, strict=True)]).double()
    torch.testing.assert_close(distance.pairwise_distance(x, y), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(distance.compute_mat(x, y).diagonal(), exact, rtol=1e-6, atol=0)
    single = distance.compute_mat(x.float(), y.float()).diagonal().double()
    torch.testing.assert_close(single, exact, rtol=0.02, atol=0)
