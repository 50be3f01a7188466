"""The metric loss: its value and gradient, other losses by name, and settings that do not work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loss_samples import batch, build
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_pairs
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from ray_dmml.config.code import read_code, use_code
from ray_dmml.config.schema import Config
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
        ({"name": "HistogramLoss"}, "HistogramLoss cannot be used: it fails on equal images"),
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


# --- wrappers, and losses of one's own ------------------------------------------------------

MEMORY = {
    "name": "CrossBatchMemory",
    "args": {"memory_size": 60, "loss": {"name": "ContrastiveLoss", "args": {"neg_margin": 0.5}}},
}


def test_the_memory_loss_compares_with_recent_batches() -> None:
    """It equals a contrastive loss over all pairs of the batch and of the last 60 embeddings, written out."""
    loss = build(**MEMORY)
    memory: list[tuple[Tensor, int]] = []
    for seed in range(5):
        x, labels = batch(5, 5, 16, spread=0.7, seed=seed)
        x = x.float()
        got = loss(x, labels).item()
        memory = [*memory, *zip(x, labels.tolist(), strict=True)][-60:]
        here = len(memory) - len(x)  # the batch is the end of the memory
        pairs: dict[bool, list[float]] = {True: [], False: []}
        for i, label in enumerate(labels.tolist()):
            for j, (other, other_label) in enumerate(memory):
                if j != here + i:
                    distance = (x[i] - other).norm().item()
                    pairs[label == other_label].append(distance if label == other_label else max(0.0, 0.5 - distance))
        # The library's reducer of this loss: the mean of the terms above zero, of each kind.
        expected = sum(sum(terms) / max(1, sum(t > 0 for t in terms)) for terms in pairs.values())
        assert got == pytest.approx(expected, rel=1e-5)


def test_the_memory_is_state() -> None:
    """A loss that is stored before, at or after the memory is full goes on to the same bits; building it leaves no
    remembered batch behind."""
    batches = [batch(5, 5, 16, seed=seed) for seed in range(6)]
    whole = build(**MEMORY)
    expected = [whole(x.float(), labels) for x, labels in batches]
    assert expected[0] == build(**MEMORY)(batches[0][0].float(), batches[0][1])
    for stop in range(6):
        first, second = build(**MEMORY), build(**MEMORY)
        got = [first(x.float(), labels) for x, labels in batches[:stop]]
        second.load_state_dict(first.state_dict())
        got += [second(x.float(), labels) for x, labels in batches[stop:]]
        assert torch.equal(torch.stack(got), torch.stack(expected))


def test_the_memory_holds_a_batch() -> None:
    """Otherwise the library would fail in the first step."""
    raw = {"data": {"classes_per_batch": 4, "images_per_class": 3}, "loss": {"metric": MEMORY}}
    assert Config.parse(raw).loss.metric.args["memory_size"] == 60
    raw["data"] = {"classes_per_batch": 16, "images_per_class": 4}
    with pytest.raises(UserError, match=r"memory_size is 60, and must hold at least a batch, which has 64 images"):
        Config.parse(raw)
    raw["loss"]["metric"] = {"name": "MultipleLosses", "args": {"losses": [{"name": "ContrastiveLoss"}, MEMORY]}}
    with pytest.raises(UserError, match=r"loss.metric.args.losses.1.args.memory_size is 60, and must hold"):
        Config.parse(raw)


def test_parts_inside_of_wrappers() -> None:
    """Miners, distances and reducers of the inner losses, and several losses with weights."""
    x, labels = batch(10, 4, 16)
    loss = build(
        name="MultipleLosses",
        args={
            "losses": [
                {"name": "ProxyAnchorLoss"},
                {
                    "name": "ContrastiveLoss",
                    "args": {"distance": {"name": "CosineSimilarity"}},
                    "reducer": "SumReducer",
                },
            ],
            "miners": [None, {"name": "PairMarginMiner"}],
            "weights": [1, 0.5],
        },
    )
    proxies, contrastive = loss.loss.losses
    assert (proxies.num_classes, type(contrastive.distance).__name__) == (10, "CosineSimilarity")
    assert len(list(loss.parameters())) == 1  # the proxies
    mined = loss.loss.miners[1](x.float(), labels)
    expected = proxies(x.float(), labels) + 0.5 * contrastive(x.float(), labels, mined)
    assert torch.equal(loss(x.float(), labels), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "SelfSupervisedLoss"}, "SelfSupervisedLoss cannot be used: it needs two embeddings of each image"),
        ({"name": "CrossBatchMemory"}, "CrossBatchMemory refuses.*loss"),
        ({"name": "CrossBatchMemory", "args": {"loss": "ContrastiveLoss"}}, "args.loss: write {name: "),
        ({"args": {"distance": {"name": "LpDistance", "args": "p"}}}, "args.distance: write {name: "),
        ({"name": "ArcFaceLoss", "args": {"num_classes": 2**70}}, r"^.*ArcFaceLoss refuses [^\n]*it takes [^\n]*$"),
        ({"name": "CrossBatchMemory", "args": {"loss": {"name": "ProxyNCALoss"}}}, "not supported for ProxyNCALoss"),
        ({"name": "CrossBatchMemory", "args": {"loss": {"name": "Contrastive"}}}, "args.loss: there is no loss 'Contr"),
    ],
)
def test_mistakes_in_wrappers_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**config)


OWN = """
import torch
from torch import nn
from pytorch_metric_learning import losses, miners

class Spread(nn.Module):
    def __init__(self, num_classes, embedding_size, scale=1.0):
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(num_classes, embedding_size))
        self.scale = scale

    def forward(self, embeddings, labels):
        return self.scale * (embeddings - self.centers[labels]).square().mean()

def spread(embeddings, labels, scale=1.0):
    return scale * embeddings.square().mean()

class Pairs(losses.ContrastiveLoss):
    pass

class Miner(miners.BaseMiner):
    def mine(self, embeddings, labels, ref_emb, ref_labels):
        return torch.tensor([0]), torch.tensor([1]), torch.tensor([2])

def wrong(embeddings, labels):
    return embeddings

def broken(embeddings, labels):
    return embeddings @ labels

class Unsaved(Spread):
    kept = None

    def forward(self, embeddings, labels):
        self.kept = {"seen": {1}} if self.kept is None else self.kept
        return super().forward(embeddings, labels)

    def get_extra_state(self):
        return self.kept and self.make()

    def set_extra_state(self, state):
        self.kept = state

    def make(self):
        return nn.Identity()

class Saved(Unsaved):
    def make(self):
        return {"step": 1, "mean": torch.zeros(2), "names": ["a"]}
"""


@pytest.mark.parametrize("miner", ["MultiSimilarityMiner", "TripletMarginMiner"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_miner_outside_of_the_memory_selects_from_the_batch(miner: str, is_nested: bool) -> None:
    """It adds its pairs to those of the memory, wherever in the memory the batch is: by a loop over all pairs."""
    if is_nested:
        loss = build(name="MultipleLosses", args={"losses": [MEMORY], "miners": [{"name": miner}]})
    else:
        loss = build(**MEMORY, miner={"name": miner})
    inner = losses.ContrastiveLoss(neg_margin=0.5)
    memory: list[tuple[Tensor, int]] = []
    for seed in range(4):  # the last one begins again at the first rows
        x, labels = batch(5, 5, 16, spread=0.7, seed=seed)
        x = x.float()
        memory = [*memory, *zip(x, labels.tolist(), strict=True)][-60:]
        here = len(memory) - len(x)  # the batch is the end of the memory
        places = [(i, j) for i in range(len(x)) for j in range(len(memory)) if j != here + i]
        positive = [(i, j) for i, j in places if labels[i] == memory[j][1]]
        negative = [(i, j) for i, j in places if labels[i] != memory[j][1]]
        a1, p, a2, n = convert_to_pairs(getattr(miners, miner)()(x, labels), labels)
        positive += [(i, here + j) for i, j in zip(a1.tolist(), p.tolist(), strict=True)]
        negative += [(i, here + j) for i, j in zip(a2.tolist(), n.tolist(), strict=True)]
        pairs = (*torch.tensor(positive).T, *torch.tensor(negative).T)
        others, other_labels = torch.stack([row for row, _ in memory]), torch.tensor([label for _, label in memory])
        expected = inner(x, labels, pairs, others, other_labels)
        assert loss(x, labels).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[None]:
    """The module own_losses, which no package has."""
    (tmp_path / "own_losses.py").write_text(OWN)
    use_code(read_code([tmp_path / "own_losses.py"]))
    yield
    use_code({})


@pytest.mark.usefixtures("own")
def test_losses_of_ones_own() -> None:
    """A module gets the sizes that it requires, and its parameters learn; a function and a subclass of the library's
    losses work as well, with miners of one's own."""
    x, labels = batch(10, 4, 16)
    x = x.float()
    module = build(name="own_losses:Spread", args={"scale": 2.0})
    module(x, labels).backward()
    (centers,) = module.parameters()
    assert centers.shape == (10, 16) and centers.grad.abs().sum() > 0
    assert module(x, labels) == 2 * x.square().mean()
    assert build(name="own_losses:spread", args={"scale": 3.0})(x, labels) == 3 * x.square().mean()
    pairs = build(name="own_losses:Pairs", args={"neg_margin": 0.5}, miner={"name": "own_losses:Miner"})
    triplets = tuple(torch.tensor([index]) for index in (0, 1, 2))
    assert torch.equal(pairs(x, labels), losses.ContrastiveLoss(neg_margin=0.5)(x, labels, triplets))
    assert build(name="own_losses:Saved")(x, labels) == x.square().mean()
    wrapped = {"loss": {"name": "ContrastiveLoss"}, "miner": {"name": "own_losses:Miner"}}
    assert type(build(name="CrossBatchMemory", args=wrapped).loss.miner).__name__ == "Miner"


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "own_losses:Spred"},
            "loss.metric.name 'own_losses:Spred': module own_losses .* has no Spred; did you",
        ),
        ({"name": "own_losses:Spread", "args": {"size": 1}}, "own_losses:Spread does not fit its args: .*'size'"),
        ({"name": "own_losses:wrong"}, "own_losses:wrong does not work .*: the result is not a single number"),
        (
            {"name": "own_losses:broken"},
            "own_losses:broken does not work .*: RuntimeError: .* at .*own_losses.py, line 29",
        ),
        (
            {"name": "own_losses:Unsaved"},
            r"own_losses:Unsaved does not work .*: get_extra_state may give tensors and plain values only",
        ),
        (
            {"name": "own_losses:spread", "reducer": "MeanReducer"},
            "own_losses:spread does not fit its args: .*'reducer'",
        ),
        ({"miner": {"name": "own_losses:spread"}}, "TripletMarginLoss with own_losses:spread"),
    ],
)
def test_mistakes_in_losses_of_ones_own_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**config)
