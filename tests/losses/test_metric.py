"""The metric loss: its value and gradient, other losses by name, and settings that do not work."""

from __future__ import annotations

import math

import pytest
import torch
from loss_samples import batch, build
from pytorch_metric_learning import losses
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from ray_dmml.errors import UserError
from ray_dmml.losses.distance_weighted import ExactEuclideanDistance

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


def test_default_loss_is_the_mean_over_all_triplets() -> None:
    """Margin 0.2, L2 distances of normalised embeddings without a square, zero losses included."""
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
    """For fixed triplets the gradient is that of finite differences."""
    x, labels = batch(3, 3, 4, spread=0.8)
    loss = build()
    triplets = loss.miner(x, labels)
    assert gradcheck(lambda e: loss.loss(e, labels, triplets), (x.requires_grad_(),))


@pytest.mark.parametrize("labels", [torch.zeros(6).long(), torch.arange(6)])
def test_a_batch_without_triplets_gives_zero_with_a_gradient(labels: Tensor) -> None:
    """With a single class, or one image of each class, the loss is 0 and backward runs."""
    x = torch.randn(6, 16).requires_grad_()
    loss = build()(x, labels)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("name", ["TripletMarginLoss", "ContrastiveLoss", "NCALoss", "FastAPLoss", "TupletMarginLoss"])
def test_duplicate_images_leave_value_and_gradient_finite(name: str) -> None:
    """Distances of exactly zero, and cosines of exactly one, within a class and between classes."""
    x, labels = batch(8, 4, 16)
    x = x.float()
    x[1], x[8] = x[0], x[4]
    x[12] = x[13] = torch.eye(16)[3]
    x.requires_grad_()
    loss = build(name=name)(x, labels)
    loss.backward()
    assert loss.item() > 0
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_float32_has_the_value_and_gradient_of_float64(spread: float) -> None:
    """Embeddings within 1e-3 of each other lose no more digits than the rounding of the inputs."""
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
    """The loss is computed in float32 under bfloat16 autocast and for bfloat16 embeddings."""
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
    """They work without args. Their proxies, if any, get gradients like the embeddings."""
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


def test_args_reach_the_classes() -> None:
    """The args of loss, miner, reducer and distance arrive in the objects."""
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
        ({"name": "TripletLoss"}, "no loss 'TripletLoss'; did you mean .*TripletMarginLoss"),
        ({"name": "@"}, "no loss '@'; known are .*ContrastiveLoss"),
        ({"name": "HistogramLoss"}, "no loss 'HistogramLoss'"),
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
        (
            {"name": "ArcFaceLoss", "args": {"num_classes": 4}},
            r"loss\.metric\.args\.num_classes is 4, and there are 10 training classes: leave it out",
        ),
        (
            {"name": "ArcFaceLoss", "args": {"embedding_size": 32}},
            r"loss\.metric\.args\.embedding_size is 32, and the embedding_size of a peer is 16: leave it out",
        ),
        ({"reducer": "PerAnchorReducer"}, "with PerAnchorReducer does not work with these settings: Triplet reduction"),
        (
            {"name": "NTXentLoss", "args": {"temperature": 0}},
            "these settings: its value is not finite",
        ),
    ],
)
def test_mistakes_are_named(config: dict[str, object], message: str) -> None:
    """The error proposes similar names, and lists the args that a class takes."""
    with pytest.raises(UserError, match=message):
        build(**config)


def test_bounded_angles_change_nothing_else() -> None:
    """TupletMarginLoss of images that are not equal is the library's, with its gradient."""
    x, labels = batch(6, 4, 16, spread=0.7)
    results = []
    for loss in (build(name="TupletMarginLoss"), losses.TupletMarginLoss()):
        given = x.clone().requires_grad_()
        value = loss(given, labels)
        value.backward()
        results.append((value.detach(), given.grad))
    assert torch.allclose(results[0][0], results[1][0]) and torch.allclose(results[0][1], results[1][1])


def test_building_uses_no_random_numbers_but_for_proxies() -> None:
    """The dry run leaves the state of torch's generator unchanged."""
    torch.manual_seed(0)
    build()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
