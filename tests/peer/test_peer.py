"""One peer against plain PyTorch written out here: updates, ema, the loss and its gradients."""

from __future__ import annotations

import copy
import math
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import assert_same, state_of, tiny
from pytorch_metric_learning import losses, reducers
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torchvision.transforms import v2

from ray_dmml.checkpoint.peer_state import decode_peer, encode_peer
from ray_dmml.cohort.local import LocalCohort
from ray_dmml.config.schema import Config, LossConfig, PeerConfig, ScheduleConfig
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.loader import Batch, build_sampler
from ray_dmml.errors import NonFiniteLossError, UserError
from ray_dmml.losses.distance_weighted import DistanceWeightedNegativeMiner, ExactEuclideanDistance
from ray_dmml.losses.relational import relational_losses
from ray_dmml.models.embedding_net import EmbeddingNet, build_embedding_net
from ray_dmml.peer.optim import learning_rate_factor
from ray_dmml.peer.peer import Peer, PeerOutput
from ray_dmml.randomness import seeded

CPU = torch.device("cpu")
PLAIN_SGD = {"name": "sgd", "lr": 0.05, "momentum": 0, "weight_decay": 0}
# No draws, so that a naive loop needs none.
STILL: dict[str, Any] = {"view": [{"name": "CenterCrop"}], "optimizer": PLAIN_SGD}
MS_LOSS: dict[str, Any] = {"name": "MultiSimilarityLoss"}
PROXIES: dict[str, Any] = {"name": "ProxyAnchorLoss"}


def settings(**given: Any) -> PeerConfig:
    small = {
        "backbone": "test_resnet",
        "embedding_size": 8,
        "input_size": 32,
        "batch_norm": "train",
    }
    return PeerConfig.model_validate({"name": "peer0", "seed": 3, "init_seed": 4, **small, **given})


def build(config: PeerConfig | None = None, numbers: dict[str, Any] | None = None, **loss: Any) -> Peer:
    loss_config = LossConfig.model_validate({"metric": MS_LOSS, "relational": {"normalize": True}, **loss})
    return Peer(
        config or settings(**STILL),
        loss_config,
        run_seed=7,
        num_classes=4,
        device=CPU,
        **(numbers or {}),
    )


def batch(step: int) -> Batch:
    """4 classes of 3 noisy images as a net of 32 pixels takes them, another batch at every step."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.arange(4).repeat_interleave(3)
    images = torch.randint(0, 128, (12, 3, 36, 36), generator=generator)
    images[:, 0] += 30 * labels[:, None, None]
    return Batch(step, images[:, :, 2:34, 2:34].to(torch.uint8), labels)


def teachers(step: int, *sizes: int) -> list[Tensor]:
    """Unit-length embeddings of other peers."""
    generator = torch.Generator().manual_seed(100 + step)
    return [F.normalize(torch.randn(12, size, generator=generator)) for size in sizes]


def finish(peer: Peer, out: PeerOutput, others: list[Tensor]) -> dict[str, float]:
    """The rest of a step after its forward pass."""
    return peer.step(out, peer.metric_loss(out), others)


def train(peer: Peer, start: int, stop: int, *sizes: int) -> list[dict[str, float]]:
    rows = []
    for step in range(start, stop):
        out = peer.forward(batch(step))
        rows.append(finish(peer, out, teachers(step, *sizes)))
    return rows


def weights(peer: Peer) -> dict[str, Tensor]:
    return copy.deepcopy(peer.net.state_dict())


def channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def plain_loss(net: EmbeddingNet, step: int) -> Tensor:
    given = batch(step)
    return losses.MultiSimilarityLoss()(net(channels_last(given.images)), given.labels)


# --- a cohort of one ------------------------------------------------------------------------


def test_a_cohort_of_one_is_plain_metric_learning(image_folder: Path) -> None:
    """20 steps of the cohort against a training loop as anybody would write it, to the bit."""
    raw = tiny(image_folder, seed=5)
    raw["cohort"]["peers"] = [{"seed": 3, "view": "standard"}]
    config = Config.parse(raw)
    splits = load_splits(config.data)
    with closing(LocalCohort(config, splits)) as cohort:
        rows = cohort.run(0, 20, lambda finished: None)
        found = decode_peer(state_of(cohort)["peer0"])

    net = build_embedding_net(config.cohort.peers[0], 5).to(memory_format=torch.channels_last)
    decaying = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]  # biases and BatchNorm
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decaying, "weight_decay": 1e-5}]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    view = v2.Compose([v2.RandomResizedCrop([32, 32], scale=(0.2, 1.0)), v2.RandomHorizontalFlip()])
    criterion = losses.TripletMarginLoss(margin=0.2, distance=ExactEuclideanDistance(), reducer=reducers.MeanReducer())
    miner = DistanceWeightedNegativeMiner()
    sampler = build_sampler(config, splits)
    net.train()
    history = []
    for step in range(20):
        indices = sampler.batch(step)
        decoded = [splits.train.source.read(int(i)) for i in indices]
        labels = torch.from_numpy(splits.train.labels[indices])
        with seeded(5, 3, step, "view"):
            images = torch.stack([view(image) for image in decoded])
        embeddings = net(images.contiguous(memory_format=torch.channels_last))
        with seeded(5, 3, step, "miner"):
            loss = criterion(embeddings, labels, miner(embeddings, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({"peer0": {"loss": loss.item(), "metric": loss.item()}})
    assert rows == history
    expected = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    assert_same(found["net"], expected)
    assert history[-1] != history[0]


# --- the loss -------------------------------------------------------------------------------


def naive_distance(student: Tensor, teacher: Tensor) -> float:
    matrices = []
    for points in (student.double(), teacher.double()):
        distance = torch.tensor([[math.dist(a, b) for b in points] for a in points])
        matrices.append(distance / distance[distance > 0].mean())
    return float(F.smooth_l1_loss(*matrices))


def naive_angle(student: Tensor, teacher: Tensor) -> float:
    cosines = []
    for points in (student.double(), teacher.double()):
        unit = F.normalize(points[None] - points[:, None], dim=2)  # (N, N, D): vertex, other
        cosines.append(torch.einsum("ijd,ikd->ijk", unit, unit))
    return float(F.smooth_l1_loss(*cosines))


@pytest.mark.parametrize("embeddings", ["unit", "raw"])
def test_the_loss_is_metric_plus_the_mean_over_teachers(embeddings: str) -> None:
    """metric + 1/(M-1) * sum of w_d * distance + w_a * angle, from the published embeddings."""
    peer = build(relational={"distance_weight": 3.0, "angle_weight": 5.0, "normalize": embeddings == "unit"})
    others = teachers(0, 8, 5, 16)
    out = peer.forward(batch(0))
    published = out.published
    metric = float(losses.MultiSimilarityLoss()(F.normalize(published), batch(0).labels))
    distance = np.mean([naive_distance(published, other) for other in others])
    angle = np.mean([naive_angle(published, other) for other in others])
    row = finish(peer, out, others)
    assert row == pytest.approx(
        {
            "loss": metric + 3 * distance + 5 * angle,
            "metric": metric,
            "distance": distance,
            "angle": angle,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("learns", [True, False])
def test_raw_embeddings_are_published_before_normalisation(learns: bool) -> None:
    """The metric loss and evaluations are of those of length 1; the gradient of the mutual term reaches the
    head past the normalisation. A peer that skips the batch publishes alike."""
    more = {} if learns else {"update_interval": 2, "update_mode": "skip"}
    config = settings(**{**STILL, "batch_norm": "frozen", **more})
    peer = build(config, relational={"distance_weight": 3.0, "angle_weight": 5.0, "normalize": False})
    net, others = copy.deepcopy(peer.net), teachers(0, 8, 5)
    raw = net.train(learns).head(net.backbone((channels_last(batch(0).images) - net.mean) / net.std))
    out = peer.forward(batch(0))
    torch.testing.assert_close(out.published, raw)
    row = finish(peer, out, others)
    if not learns:
        assert row == {}
        return
    mutual = relational_losses(raw, others)
    loss = losses.MultiSimilarityLoss()(F.normalize(raw), batch(0).labels)
    loss = loss + 3 * mutual.distance + 5 * mutual.angle
    (gradient,) = torch.autograd.grad(loss, [net.head.weight])
    torch.testing.assert_close(peer.net.head.weight, net.head.weight - PLAIN_SGD["lr"] * gradient, rtol=1e-4, atol=1e-6)


def test_teachers_get_no_gradient() -> None:
    """What is published has no graph, and what is received takes none."""
    peer = build()
    out = peer.forward(batch(0))
    published = out.published
    assert not published.requires_grad and published.dtype == torch.float32
    others = [other.requires_grad_() for other in teachers(0, 8, 6)]
    before = weights(peer)
    finish(peer, out, others)
    assert all(other.grad is None for other in others)
    assert not torch.equal(peer.net.head.weight, before["head.weight"])


def test_warm_up_of_the_mutual_term() -> None:
    """Its weight rises from 0 at the first step to the full one; the metric loss is not touched."""
    settings_ = {"distance_weight": 3.0, "angle_weight": 5.0, "warmup_steps": 4}
    peer = build(settings(**STILL | {"frozen": False}), relational=settings_)
    rows = train(peer, 0, 7, 8)
    assert rows[0] == {"loss": rows[0]["metric"], "metric": rows[0]["metric"]}
    for step, row in enumerate(rows[1:], start=1):
        ramp = min(1.0, step / 4)
        mutual = ramp * (3 * row["distance"] + 5 * row["angle"])
        assert row["loss"] == pytest.approx(row["metric"] + mutual, rel=1e-6)


def test_a_non_finite_term_stops_before_anything_is_learned(image_folder: Path) -> None:
    """The peer, the term and the step are named; weights and optimiser are as they were."""
    peer = build()
    train(peer, 0, 2, 8)
    before = copy.deepcopy(peer.state_dict())
    out = peer.forward(batch(2))
    broken = teachers(2, 8)
    broken[0][3, 1] = math.nan
    with pytest.raises(NonFiniteLossError, match=r"peer0: the distance loss is not finite at step 3;"):
        finish(peer, out, broken)
    after = peer.state_dict()
    assert_same(after["optimizer"], before["optimizer"])
    assert all(
        torch.equal(after["net"][key], before["net"][key])
        for key in before["net"]
        if "running_" not in key and "num_batches" not in key
    )
    with torch.no_grad():
        peer.net.head.weight.fill_(math.inf)
    with pytest.raises(NonFiniteLossError, match=r"peer0: the embedding is not finite at step 4"):
        train(peer, 3, 4)
    with pytest.raises(NonFiniteLossError, match="peer0: the embedding of an image is not finite"):
        peer.embed_images([batch(0).images])


# --- updates --------------------------------------------------------------------------------


SKIP = {"on_nonfinite": "skip", "max_consecutive_nonfinite": 2}


def step_of(peer: Peer, number: int, others: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    out = peer.forward(batch(number))
    published = out.published
    return published, finish(peer, out, others)


def weights_of(peer: Peer) -> dict[str, Any]:
    return {k: v for k, v in copy.deepcopy(peer.state_dict()).items() if k != "num_consecutive_nonfinite"}


def test_nonfinite_values_of_its_own_are_skipped() -> None:
    """`skip`: a batch whose embeddings are not finite moves nothing, BatchNorm's statistics
    included, and the next one is learned from as ever."""
    peer = build(numbers=SKIP)
    head = next(iter(peer.net.head.parameters()))
    step_of(peer, 0, [])
    before = weights_of(peer)
    good = head.detach().clone()
    head.data.fill_(torch.inf)
    published, terms = step_of(peer, 1, [])
    assert not torch.isfinite(published).all() and terms == {"skipped_nonfinite": 1.0}
    head.data.copy_(good)
    assert_same(weights_of(peer), before)
    _, terms = step_of(peer, 2, [])
    assert math.isfinite(terms["loss"])
    assert peer.state_dict()["num_consecutive_nonfinite"] == 0


MEMORY = {"name": "CrossBatchMemory", "args": {"memory_size": 30, "loss": {"name": "ContrastiveLoss"}}}


@pytest.mark.parametrize("teacher", ["each", "ensemble"])
def test_bad_numbers_of_another_do_not_reach_it(teacher: str) -> None:
    """`skip`: a peer whose embeddings are not finite is no teacher at that step; the rest is as if it had not been
    there: the order of the others, the gradients of earlier batches, BatchNorm, the memory of the loss."""
    config, loss = settings(**STILL, update_interval=3), {"metric": MEMORY, "relational": {"teacher": teacher}}
    poisoned, spared = build(config, SKIP, **loss), build(config, SKIP, **loss)
    for step in range(3):
        right = teachers(step, 5, 6)
        bad = right[0].clone()
        bad[3, 2] = torch.nan
        others = right if step == 0 else [bad, right[1]] if step == 1 else [bad]
        left = [other for other in others if other is not bad]
        out, expected = poisoned.forward(batch(step)), spared.forward(batch(step))
        found = poisoned.step(out, poisoned.metric_loss(out), others, place=1)
        assert found == spared.step(expected, spared.metric_loss(expected), left, place=int(step == 0))
        assert ("distance" in found) == (step < 2)
    assert_same(weights_of(poisoned), weights_of(spared))


@pytest.mark.parametrize("interval", [1, 3])
def test_a_batch_that_is_left_out_leaves_no_trace(interval: int) -> None:
    """`skip`: the peer goes on as if the batch had not been, with the gradients of those before and after it."""
    config = settings(**STILL, update_interval=interval, ema={"decay": 0.5})
    disturbed, spared = build(config, SKIP, metric=MEMORY), build(config, SKIP, metric=MEMORY)
    for step in range(6):
        if step == 4:
            weight = next(disturbed.net.parameters()).data
            good = weight.clone()
            weight.fill_(torch.inf)
            assert step_of(disturbed, step, teachers(step, 5))[1] == {"skipped_nonfinite": 1.0}
            weight.copy_(good)
        else:
            assert step_of(disturbed, step, teachers(step, 5))[1] == step_of(spared, step, teachers(step, 5))[1]
    assert_same(weights_of(disturbed), weights_of(spared))


def test_nonfinite_gradients_are_skipped() -> None:
    """`skip`: a finite loss whose gradient is not leaves weights and optimiser as they were."""
    peer = build(numbers=SKIP)
    step_of(peer, 0, [])
    before = weights_of(peer)
    parameter = next(iter(peer.net.head.parameters()))
    handle = parameter.register_hook(lambda gradient: gradient * torch.nan)
    _, terms = step_of(peer, 1, [])
    handle.remove()
    assert terms == {"skipped_nonfinite": 1.0}
    after = weights_of(peer)
    for part in ("metric", "optimizer", "gradients"):
        assert_same(after[part], before[part])
    for name, tensor in peer.net.named_parameters():
        assert torch.equal(tensor, before["net"][name]), name


def test_too_many_bad_batches_in_a_row(image_folder: Path) -> None:
    """`skip` gives up on a peer that does not recover, by name; until then the other learned on,
    and is finite."""
    ruin = {"name": "sgd", "lr": 1e30}
    raw = tiny(image_folder, failure={"on_nonfinite": "skip", "max_consecutive_nonfinite": 3})
    raw["cohort"]["peers"] = [{}, {"optimizer": ruin}]
    config = Config.parse(raw)
    rows: list[Any] = []
    with closing(LocalCohort(config, load_splits(config.data))) as cohort:
        with pytest.raises(NonFiniteLossError, match=r"peer1: .*4 batches in a row.* step 5"):
            for step in range(10):
                rows += cohort.run(step, step + 1, lambda finished: None)
        good = cohort.peers[0]
        assert all(torch.isfinite(p).all() for p in good.net.parameters())
    assert [row["peer1"] for row in rows[1:]] == [{"skipped_nonfinite": 1.0}] * 3
    assert all(math.isfinite(row["peer0"]["loss"]) for row in rows)


def test_the_peer_that_is_the_cause_is_named(image_folder: Path) -> None:
    """`fail`: the peer before it in peer order has a loss that is not finite, too, and only because of it."""
    raw = tiny(image_folder)
    raw["cohort"]["peers"] = [{}, {"optimizer": {"name": "sgd", "lr": 1e30}}]
    config = Config.parse(raw)
    with (
        closing(LocalCohort(config, load_splits(config.data))) as cohort,
        pytest.raises(NonFiniteLossError, match="peer1: the embedding is not finite at step 2"),
    ):
        cohort.run(0, 10, lambda finished: None)


@pytest.mark.parametrize("interval", [1, 3])
def test_accumulating_is_one_step_on_the_mean_gradient(interval: int) -> None:
    """After each k-th batch, and only then, the weights move by lr times the mean of k gradients."""
    peer = build(settings(**STILL, update_interval=interval))
    net = copy.deepcopy(peer.net).train()
    for update in range(2):
        gradients = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        for step in range(update * interval, (update + 1) * interval):
            before = copy.deepcopy(dict(peer.net.named_parameters()))
            for name, parameter in before.items():
                assert torch.equal(parameter, dict(net.named_parameters())[name])
            out = peer.forward(batch(step))
            assert finish(peer, out, []) != {}
            net.zero_grad()
            plain_loss(net, step).backward()
            for name, parameter in net.named_parameters():
                gradients[name] += parameter.grad / interval
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter -= 0.05 * gradients[name]
        for name, parameter in peer.net.named_parameters():
            assert torch.allclose(parameter, dict(net.named_parameters())[name], atol=1e-6), name
        # From here on the two start from the same weights again, so that roundings do not add up.
        net.load_state_dict(peer.net.state_dict())


def test_skipping_only_publishes_between_updates() -> None:
    """In `skip` mode the other batches move neither weights nor BatchNorm statistics nor optimiser;
    what is published then is the net in evaluation mode; the k-th batch alone makes the update."""
    peer = build(settings(**STILL, update_interval=3, update_mode="skip"))
    for step in (0, 1):
        before = copy.deepcopy(peer.state_dict())
        out = peer.forward(batch(step))
        published = out.published
        assert finish(peer, out, teachers(step, 8)) == {}
        assert_same(peer.state_dict(), before)
        with torch.no_grad():
            assert torch.equal(published, peer.net.eval()(channels_last(batch(step).images)))
    net = copy.deepcopy(peer.net).train()
    plain_loss(net, 2).backward()
    [row] = train(peer, 2, 3)
    assert row.keys() == {"loss", "metric"}
    for name, parameter in net.named_parameters():
        moved = dict(peer.net.named_parameters())[name]
        assert torch.allclose(moved, parameter - 0.05 * parameter.grad, atol=1e-6), name
    assert torch.equal(peer.net.backbone.bn1.running_mean, net.backbone.bn1.running_mean)


def test_a_frozen_peer_teaches_and_never_learns(tmp_path: Path) -> None:
    """Its embeddings are those of the file's weights, at every step; nothing of it changes."""
    donor = build_embedding_net(settings(init_seed=9), 0).eval()
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(donor.state_dict(), path)
    peer = build(settings(**STILL, frozen=True, weights=str(path)))
    before = copy.deepcopy(peer.state_dict())
    for step in range(3):
        out = peer.forward(batch(step))
        published = out.published
        with torch.no_grad():
            assert torch.allclose(published, donor(channels_last(batch(step).images)), atol=1e-6)
        assert finish(peer, out, teachers(step, 8)) == {}
    assert_same(peer.state_dict(), before)


@pytest.mark.parametrize("as_teacher", [False, True])
def test_averaging_is_an_exponential_moving_average(as_teacher: bool) -> None:
    """From the weights after the first update on; at updates only; with `as_teacher` it teaches."""
    ema = {"decay": 0.8, "as_teacher": as_teacher}
    peer = build(settings(**STILL, ema=ema, update_interval=2))
    naive: dict[str, Tensor] | None = None
    for step in range(8):
        if naive is not None:
            net = copy.deepcopy(peer.ema.net if as_teacher else peer.net)
            if as_teacher:
                net.eval()
            else:
                net.train()
            with torch.no_grad():
                expected = net(channels_last(batch(step).images))
            out = peer.forward(batch(step))
            assert torch.equal(out.published, expected)
        else:
            out = peer.forward(batch(step))
        finish(peer, out, [])
        live = {name: p.detach().clone() for name, p in peer.net.named_parameters()}
        if step % 2 == 1:
            naive = live if naive is None else {k: 0.8 * naive[k] + 0.2 * live[k] for k in live}
        if naive is not None:
            for name, parameter in peer.ema.net.named_parameters():
                assert torch.allclose(parameter, naive[name], atol=1e-6), name
    assert naive is not None and not torch.allclose(naive["head.weight"], live["head.weight"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1]),
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ({"name": "step", "milestones": [2, 5], "gamma": 0.1}, [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        ({"name": "cosine", "steps": 4}, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0, 0, 0]),
        (
            {"name": "cosine", "steps": 4, "warmup_steps": 2},
            [0.5, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0, 0, 0],
        ),
        ({"name": "cosine", "steps": 4, "cycles": 2}, [1, 0.5, 1, 0.5, 0, 0, 0]),
    ],
)
def test_schedules(schedule: dict[str, Any], expected: list[float]) -> None:
    """The factor at every step, and the weights that follow it (plain SGD moves in proportion)."""
    config = ScheduleConfig.model_validate(schedule)
    assert [learning_rate_factor(config, step) for step in range(7)] == pytest.approx(expected)
    peer = build(settings(**STILL, schedule=schedule))
    for step, factor in enumerate(expected):
        net = copy.deepcopy(peer.net).train()
        plain_loss(net, step).backward()
        train(peer, step, step + 1)
        for name, parameter in net.named_parameters():
            moved = dict(peer.net.named_parameters())[name]
            assert torch.allclose(moved, parameter - 0.05 * factor * parameter.grad, atol=1e-6)


def test_rates_of_backbone_head_and_proxies() -> None:
    """Each group has its own; by default the head's is that of the backbone, the proxies' 100 fold."""
    peer = build(settings(optimizer={"lr": 0.002}), metric=PROXIES)
    rate_of = {id(p): group["base_lr"] for group in peer.optimizer.param_groups for p in group["params"]}
    assert {rate_of[id(p)] for p in peer.net.parameters()} == {0.002}
    assert {rate_of[id(p)] for p in peer.metric.parameters()} == {0.2}
    for moving, rates in {
        "net.backbone": {"lr": 0.05, "head_lr": 0, "loss_lr": 0},
        "net.head": {"lr": 0, "head_lr": 0.05, "loss_lr": 0},
        "metric": {"lr": 0, "head_lr": 0, "loss_lr": 0.05},
    }.items():
        peer = build(settings(optimizer={**PLAIN_SGD, **rates}), metric=PROXIES)
        named = {"net": peer.net, "metric": peer.metric}
        before = {
            f"{owner}.{name}": p.detach().clone()
            for owner, module in named.items()
            for name, p in module.named_parameters()
        }
        train(peer, 0, 1)
        for owner, module in named.items():
            for name, parameter in module.named_parameters():
                key = f"{owner}.{name}"
                if not key.startswith(moving):
                    assert torch.equal(parameter, before[key]), key
        assert any(
            not torch.equal(dict(named[key.split(".")[0]].named_parameters())[key.split(".", 1)[1]], p)
            for key, p in before.items()
            if key.startswith(moving)
        )


def test_proxies_are_part_of_the_state() -> None:
    """Trained, stored as files, loaded elsewhere: the same proxies, and the same next steps."""
    config = settings(optimizer={"lr": 1e-3}, update_interval=2)
    one, other = build(config, metric=PROXIES), build(config, metric=PROXIES)
    fresh = copy.deepcopy(one.metric.state_dict())
    train(one, 0, 5, 8)
    assert not torch.equal(one.metric.state_dict()["loss.proxies"], fresh["loss.proxies"])
    other.load_state_dict(decode_peer(encode_peer(one.state_dict())))
    assert train(one, 5, 9, 8) == train(other, 5, 9, 8)
    assert_same(other.state_dict(), one.state_dict())


@pytest.mark.parametrize("clip_norm", [0.01, 1e9])
def test_gradients_are_clipped_to_their_total_norm(clip_norm: float) -> None:
    """With rate 1 the weights move by the gradient, scaled down to the norm where it is longer."""
    optimizer = {**PLAIN_SGD, "lr": 1.0, "clip_norm": clip_norm}
    peer = build(settings(**STILL | {"optimizer": optimizer}))
    net = copy.deepcopy(peer.net).train()
    plain_loss(net, 0).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters()))
    assert norm > 0.01
    train(peer, 0, 1)
    moved = sum(
        float((dict(peer.net.named_parameters())[name] - p).detach().square().sum())
        for name, p in net.named_parameters()
    )
    assert math.sqrt(moved) == pytest.approx(min(norm, clip_norm), rel=1e-3)


def test_load_weights_takes_the_net_only() -> None:
    """Optimiser and counts start afresh; the average starts from the weights given."""
    config = settings(optimizer={"lr": 1e-3}, ema={"decay": 0.9})
    donor, peer = build(config), build(config)
    train(donor, 0, 3)
    peer.load_weights(donor.state_dict())
    assert_same(weights(peer), weights(donor))
    assert_same(peer.ema.net.state_dict(), donor.net.state_dict())
    assert peer.optimizer.state_dict()["state"] == {} and peer.ema.num_updates == 0
    misfit = build_embedding_net(settings(embedding_size=9), 0).state_dict()
    with pytest.raises(UserError, match=r"weights for peer0 do not fit: head\.weight"):
        peer.load_weights({"net": misfit, "adapters": {}})


# --- precision ------------------------------------------------------------------------------


def test_bfloat16_on_a_cpu() -> None:
    """The net runs in bfloat16, published embeddings and losses are float32 near the exact ones."""
    exact, mixed = build(), build(settings(**STILL, amp="bfloat16"))
    out = mixed.forward(batch(0))
    one, other = exact.forward(batch(0)).published, out.published
    assert other.dtype == torch.float32
    assert torch.allclose(other.norm(dim=1), torch.ones(12), atol=1e-6)
    assert not torch.equal(one, other) and torch.allclose(one, other, atol=0.05)
    assert {p.dtype for p in mixed.net.parameters()} == {torch.float32}
    finish(mixed, out, teachers(0, 8))
    before = weights(mixed)
    rows = train(mixed, 1, 4, 8)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert not torch.equal(mixed.net.head.weight, before["head.weight"])


def test_float16_needs_a_gpu() -> None:
    """On a CPU it is refused before anything is built."""
    with pytest.raises(UserError, match="peer0: amp float16 needs a GPU; use bfloat16 or off"):
        build(settings(amp="float16"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_a_compiled_peer_learns_the_same() -> None:
    """But for the last bits; its checkpoints are those of a peer that is not compiled."""
    plain, compiled = build(), build(settings(**STILL, compile=True))
    expected = train(plain, 0, 4, 8, 5)
    graphs = counters["stats"]["unique_graphs"]
    found = train(compiled, 0, 4, 8, 5)
    assert counters["stats"]["unique_graphs"] > graphs
    for row, expected_row in zip(found, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-3)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[name], tensor, rtol=1e-3, atol=1e-4)
    plain.load_state_dict(compiled.state_dict())
    assert_same(plain.state_dict(), compiled.state_dict())
    images = batch(9).images
    with torch.no_grad():
        assert torch.equal(plain.net.eval()(images), compiled.net.eval()(images))


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is trained, with the compiler's name."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"peer0: compile: true needs a C.. compiler.*no-such"):
        build(settings(**STILL, compile=True))


OUT_OF_MEMORY = """
import resource, sys
from contextlib import closing
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from conftest import tiny
from ray_dmml.cohort.local import LocalCohort
from ray_dmml.config.schema import Config
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError

raw = tiny(Path(sys.argv[1]))
raw["cohort"]["base"]["input_size"] = 1024
config = Config.parse(raw)
with closing(LocalCohort(config, load_splits(config.data))) as cohort:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 100 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        cohort.run(0, 1, lambda finished: None)
    except UserError as error:
        print(error)
"""


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of the address space")
def test_out_of_memory_is_one_sentence(image_folder: Path) -> None:
    """Who, where, what was asked for, what it was for, and what to lower."""
    ended = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(image_folder), str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
    )
    assert ended.stdout.startswith("peer0: cpu ran out of memory in step 1 (12 images a batch):")
    assert "bytes" in ended.stdout and "test_resnet at 1024 pixels" in ended.stdout
    assert "lower data.classes_per_batch" in ended.stdout
