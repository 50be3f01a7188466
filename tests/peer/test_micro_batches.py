"""Micro batches and activation checkpointing: what a whole batch teaches, with less memory."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from conftest import assert_same
from test_peer import STILL, batch, build, channels_last, finish, settings, teachers, train
from torch import Tensor, nn

from ray_dmml.config.schema import PeerConfig
from ray_dmml.models.embedding_net import build_embedding_net
from ray_dmml.peer.training_pass import TrainingPass
from ray_dmml.randomness import seeded

SLOW = {"name": "sgd", "lr": 5e-3, "momentum": 0.5, "weight_decay": 1e-3}
MUTUAL: dict[str, Any] = {"relational": {"distance_weight": 1.0, "angle_weight": 2.0}}
MEMORY = {"name": "CrossBatchMemory", "args": {"memory_size": 30, "loss": {"name": "ContrastiveLoss"}}}
SIZES = (8, 5)
MICRO = {"micro_batch": 5}
"""12 images in three parts of 4."""


def still(**more: Any) -> PeerConfig:
    return settings(**{**STILL, "optimizer": SLOW, "batch_norm": "frozen", **more})


@pytest.mark.parametrize(
    ("more", "loss"),
    [
        ({}, {"relational": {**MUTUAL["relational"], "normalize": False}}),
        ({"update_interval": 2, "ema": {"decay": 0.5, "as_teacher": True}}, {**MUTUAL, "metric": MEMORY}),
        ({"amp": "bfloat16"}, MUTUAL),
    ],
    ids=["before normalisation", "accumulating, averaged weights, a memory", "mixed precision"],
)
def test_micro_batches_learn_what_the_whole_batch_does(more: dict[str, Any], loss: dict[str, Any]) -> None:
    """Up to rounding: terms, published embeddings and weights."""
    whole, parts = build(still(**more), **loss), build(still(**more), MICRO, **loss)
    before = [p.detach().clone() for p in whole.net.parameters()]
    is_rounded = more.get("amp") == "bfloat16"
    for row, expected in zip(train(parts, 0, 4, *SIZES), train(whole, 0, 4, *SIZES), strict=True):
        assert row == pytest.approx(expected, rel=0.05 if is_rounded else 1e-4, abs=1e-5)
    published = parts.forward(batch(9)).published, whole.forward(batch(9)).published
    torch.testing.assert_close(*published, rtol=0, atol=0.05 if is_rounded else 1e-3)
    for old, a, b in zip(before, parts.net.parameters(), whole.net.parameters(), strict=True):
        assert (a - b).norm() <= (1 if is_rounded else 0.01) * (b - old).norm() + 1e-6
    assert any(not torch.equal(old, p) for old, p in zip(before, parts.net.parameters(), strict=True))


def test_a_batch_that_fits_is_not_divided() -> None:
    """The same bits as without the setting."""
    whole, same = build(still()), build(still(), {"micro_batch": 12})
    assert train(same, 0, 2, 8) == train(whole, 0, 2, 8)
    assert_same(same.state_dict(), whole.state_dict())


def test_both_passes_drop_the_same_and_parts_do_not() -> None:
    """The mask of dropout is drawn again for every part, and is the same when the part is embedded again."""
    net, images = build_embedding_net(still(), 0), channels_last(batch(0).images)
    net.head = nn.Sequential(nn.Dropout(0.5), net.head)
    masks: list[Tensor] = []
    net.head[0].register_forward_hook(lambda module, given, dropped: masks.append(dropped == 0))
    net.train()
    with seeded("a step"):
        embeddings, backward = TrainingPass(still(), net, 5, "peer0").embed(images)
    assert embeddings.shape == (12, 8) and not embeddings.requires_grad
    torch.rand(7)
    backward(torch.ones_like(embeddings))
    assert len(masks) == 6
    assert all(torch.equal(one, other) for one, other in zip(masks[:3], masks[3:], strict=True))
    assert not torch.equal(masks[0], masks[1])


def test_batch_norm_counts_every_part_once() -> None:
    """`batch_norm: train`: the statistics are those of the parts, one after the other."""
    peer = build(still(batch_norm="train"), MICRO)
    net = copy.deepcopy(peer.net).train()
    train(peer, 0, 1)
    with torch.no_grad():
        for part in channels_last(batch(0).images).tensor_split(3):
            net.forward_unnormalized(part)
    for (name, buffer), expected in zip(peer.net.named_buffers(), net.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_checkpointed_activations_change_no_bit() -> None:
    """Weights, statistics of BatchNorm and optimizer after three steps."""
    plain, saving = (build(still(batch_norm="train", checkpoint_activations=on)) for on in (False, True))
    assert train(saving, 0, 3, 8) == train(plain, 0, 3, 8)
    assert_same(saving.state_dict(), plain.state_dict())


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """The most bytes that autograd keeps at a time, without the weights of the net."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(self._pack, lambda holder: holder.tensor)
        self._weights = {parameter.data_ptr() for parameter in net.parameters()}
        self.peak = self._now = 0

    def _pack(self, tensor: Tensor) -> Any:
        holder = _Holder(tensor.detach())
        if tensor.data_ptr() not in self._weights:
            self._change(tensor.nbytes)
            weakref.finalize(holder, self._change, -tensor.nbytes)
        return holder

    def _change(self, by: int) -> None:
        self._now += by
        self.peak = max(self.peak, self._now)


class _Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_memory_falls() -> None:
    """With parts of a third, and with checkpoints: what autograd keeps for the backward pass."""

    def peak(config: PeerConfig, micro_batch: int | None = None) -> int:
        peer = build(config, {"micro_batch": micro_batch})
        saved = SavedBytes(peer.net)
        with saved:
            finish(peer, peer.forward(batch(0)), teachers(0, 8))
        return saved.peak

    whole = peak(still())
    assert peak(still(), 4) < 0.4 * whole
    assert peak(still(checkpoint_activations=True)) < 0.8 * whole
    assert peak(still(checkpoint_activations=True), 4) < 0.35 * whole
