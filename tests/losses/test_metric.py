"""The metric loss, its miner and its exact distances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from ray_dmml.config.schema import MetricLossConfig
from ray_dmml.errors import UserError
from ray_dmml.losses.metric import (
    DistanceWeightedNegativeMiner,
    ExactEuclideanDistance,
    MetricLoss,
)

OTHER_LOSSES = [
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "MultiSimilarityLoss",
    "ContrastiveLoss",
    "NTXentLoss",
    "ArcFaceLoss",
    "SubCenterArcFaceLoss",
    "MarginLoss",
    "P2SGradLoss",
    "SupConLoss",
]


def build(num_classes: int = 10, size: int = 16, **config: object) -> MetricLoss:
    return MetricLoss(MetricLossConfig.model_validate(config), num_classes, size)


def batch(
    num_classes: int, images: int, size: int, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Normalised float64 embeddings, those of one class within about ``spread`` of each other."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(num_classes, size, generator=generator, dtype=torch.float64))
    labels = torch.arange(num_classes).repeat_interleave(images)
    noise = torch.randn(len(labels), size, generator=generator, dtype=torch.float64)
    return F.normalize(centres[labels] + spread * F.normalize(noise)), labels


def naive_probabilities(x: Tensor, labels: Tensor, anchor: int) -> list[float]:
    """Of being drawn as the negative of ``anchor``, from the formula, one image at a time."""
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
def test_negatives_are_drawn_with_the_papers_probabilities(size: int, spread: float) -> None:
    """Frequencies over many draws follow 1 / q(d), at D = 512 with near positives too."""
    generator = torch.Generator().manual_seed(size)
    x, labels = batch(4, 3, size, spread)
    # Some classes share a direction, so that negatives come at many distances within 1.4.
    common = F.normalize(torch.randn(1, size, generator=generator, dtype=torch.float64))
    x = F.normalize(x + torch.linspace(0, 1, len(x))[:, None].double() * common)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    if spread == 0.1:
        assert distance[0, 1] < 0.5, "positives must be nearer than the cutoff here"
    wanted = torch.tensor([naive_probabilities(x, labels, a) for a in range(len(x))])
    assert wanted.max() > 0.2, "uniform draws would pass otherwise"
    miner = DistanceWeightedNegativeMiner()
    weights = miner.weights(distance, labels[:, None] != labels, size)
    torch.testing.assert_close((weights / weights.sum(1, keepdim=True)).float(), wanted)

    torch.manual_seed(0)
    counts = torch.zeros(len(x), len(x))
    for _ in range(1500):
        anchors, _, negatives = miner(x, labels)
        counts.index_put_((anchors, negatives), torch.ones(len(anchors)), accumulate=True)
    draws = counts.sum(dim=1, keepdim=True)
    assert (draws == 1500 * 2).all()
    sigma = (wanted * (1 - wanted) / draws).sqrt()
    assert ((counts / draws - wanted).abs() <= 5 * sigma + 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=24),
    size=st.sampled_from([2, 3, 64, 512]),
    seed=st.integers(0, 10**6),
)
def test_every_positive_pair_gets_one_negative(labels: list[int], size: int, seed: int) -> None:
    """Whatever the classes: all ordered pairs a != p once, each with an image of another class."""
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


def test_negatives_beyond_the_cutoff_are_drawn_only_where_there_is_no_other() -> None:
    """A negative within 1.4 is always the one; with none, all negatives come equally often."""
    x = torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [0.6, 0.8, 0], [-1, 0, 0], [0, -1, 0.1]])
    labels = torch.tensor([0, 0, 1, 2, 3])
    miner = DistanceWeightedNegativeMiner(nonzero_loss_cutoff=1.2)
    torch.manual_seed(0)
    drawn = torch.cat([miner(x, labels)[2] for _ in range(50)])
    assert (drawn == 2).all()
    far = torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [-1, 0.1, 0], [-1, 0, 0], [-1, -0.1, 0.1]])
    drawn = torch.cat([miner(far, labels)[2] for _ in range(1500)])
    frequency = torch.bincount(drawn, minlength=5) / len(drawn)
    assert frequency[:2].sum() == 0
    torch.testing.assert_close(frequency[2:], torch.full((3,), 1 / 3), rtol=0, atol=0.04)


def test_draws_follow_torchs_seed() -> None:
    """The same seed draws the same negatives, another seed others."""
    x, labels = batch(8, 4, 32)
    miner = DistanceWeightedNegativeMiner()

    def draw(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return miner(x, labels)[2].tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_default_loss_is_the_mean_over_all_triplets() -> None:
    """Margin 0.2 on unsquared L2 of normalised embeddings, triplets without loss included."""
    x, labels = batch(6, 4, 16, spread=0.7)
    loss = build()
    torch.manual_seed(3)
    got = loss(5 * x, labels).item()
    torch.manual_seed(3)
    triplets = list(zip(*(index.tolist() for index in loss.miner(x, labels)), strict=True))
    assert len(triplets) == 6 * 4 * 3
    losses = []
    for a, p, n in triplets:
        positive, negative = math.dist(x[a], x[p]), math.dist(x[a], x[n])
        losses.append(max(0.0, positive - negative + 0.2))
    assert 0 < losses.count(0.0) < len(losses)
    assert got == pytest.approx(sum(losses) / len(losses), rel=1e-10)


def test_gradcheck_of_the_default_loss() -> None:
    """With its triplets fixed, the gradient is that of finite differences."""
    x, labels = batch(3, 3, 4, spread=0.8)
    loss = build()
    triplets = loss.miner(x, labels)
    assert gradcheck(lambda e: loss.loss(e, labels, triplets), (x.requires_grad_(),))


@pytest.mark.parametrize("labels", [torch.zeros(6).long(), torch.arange(6)])
def test_a_batch_without_triplets_gives_zero_with_a_gradient(labels: Tensor) -> None:
    """One class only, or one image a class: the loss is 0 and backward runs."""
    x = torch.randn(6, 16).requires_grad_()
    loss = build()(x, labels)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("name", ["TripletMarginLoss", "ContrastiveLoss", "NCALoss", "FastAPLoss"])
def test_duplicate_images_leave_value_and_gradient_finite(name: str) -> None:
    """Distances of exactly zero, within a class and between classes, for all L2 losses."""
    x, labels = batch(8, 4, 16)
    x = x.float()
    x[1], x[8] = x[0], x[4]
    x.requires_grad_()
    loss = build(name=name)(x, labels)
    loss.backward()
    assert loss.item() > 0
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


def test_gradient_of_the_distance_is_zero_at_zero() -> None:
    """Not NaN and not infinite: a pair that coincides pulls nowhere."""
    x = torch.ones(30, 3, requires_grad=True)
    ExactEuclideanDistance()(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_float32_has_the_value_and_gradient_of_float64(spread: float) -> None:
    """Embeddings within 1e-3 of each other lose no more than the rounding of the inputs costs."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    x = F.normalize(F.normalize(directions[:1]) + spread * F.normalize(directions)).float()
    labels = torch.arange(40) // 4
    loss = build(size=64, args={"margin": 0.0})
    triplets = loss.miner(x, labels)
    results = []
    for dtype in (torch.float64, torch.float32):
        given = x.to(dtype).requires_grad_()
        value = loss.loss(given, labels, triplets)
        value.backward()
        results.append((value.double(), given.grad.double()))
    (wanted, slope), (got, got_slope) = results
    assert abs(got - wanted) <= 1e-3 * wanted
    assert (got_slope - slope).norm() <= 1e-3 * slope.norm()


def test_autocast_changes_nothing() -> None:
    """Under bfloat16 autocast, and for bfloat16 embeddings, the loss is computed in float32."""
    x, labels = batch(8, 4, 16)
    x = x.bfloat16()
    loss = build(name="ProxyAnchorLoss")
    wanted = loss(x.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(x, labels)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_other_losses_by_name(name: str) -> None:
    """They build without settings, and proxies, where they have any, learn with the embeddings."""
    x, labels = batch(10, 4, 16)
    x = x.float().requires_grad_()
    loss = build(name=name)
    value = loss(x, labels)
    value.backward()
    assert torch.isfinite(value) and value.ndim == 0
    for tensor in [x, *loss.parameters()]:
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0
    has_proxies = any(word in name for word in ("Proxy", "ArcFace", "P2SGrad"))
    assert (len(list(loss.parameters())) > 0) == has_proxies


def test_settings_reach_the_classes() -> None:
    """Settings of loss, miner, reducer and distance are what the objects hold."""
    loss = build(
        name="ContrastiveLoss",
        args={"pos_margin": 0.9, "neg_margin": 0.3, "distance": {"name": "CosineSimilarity"}},
        miner={"name": "PairMarginMiner", "args": {"pos_margin": 0.1, "neg_margin": 0.7}},
        reducer="SumReducer",
    )
    assert (loss.loss.pos_margin, loss.loss.neg_margin) == (0.9, 0.3)
    assert type(loss.loss.distance).__name__ == "CosineSimilarity"
    assert (loss.miner.pos_margin, loss.miner.neg_margin) == (0.1, 0.7)
    assert type(loss.miner.distance) is ExactEuclideanDistance
    reducers = loss.loss.reducer.reducers.values()
    assert {type(reducer).__name__ for reducer in reducers} == {"SumReducer"}
    assert build(name="NCALoss").loss.distance.power == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "TripletLoss"}, "no loss 'TripletLoss'.*TripletMarginLoss"),
        ({"miner": {"name": "DistanceWeighted"}}, "no miner.*DistanceWeightedMiner"),
        ({"reducer": "Mean"}, "no reducer 'Mean'.*MeanReducer"),
        ({"reducer": "ThresholdReducer"}, "ThresholdReducer refuses"),
        ({"args": {"marge": 1}}, "does not take marge; it takes margin"),
        ({"args": {"margin": "wide"}}, "does not work with these settings"),
        ({"args": {"distance": "cosine"}}, "distance: write"),
        ({"name": "RankedListLoss"}, "RankedListLoss refuses.*margin"),
        (
            {"miner": {"name": "DistanceWeightedNegativeMiner", "args": {"cutoff": 1.5}}},
            "0 < cutoff < nonzero_loss_cutoff <= 2",
        ),
        ({"name": "PNPLoss", "miner": {"name": "HDCMiner"}}, "PNPLoss with HDCMiner"),
    ],
)
def test_mistakes_are_named(config: dict[str, object], message: str) -> None:
    """Unknown names come with near ones, refused settings with what is taken."""
    with pytest.raises(UserError, match=message):
        build(**config)


def test_building_draws_nothing_beyond_the_proxies() -> None:
    """The rehearsal at construction leaves torch's generator where it was."""
    torch.manual_seed(0)
    build()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
