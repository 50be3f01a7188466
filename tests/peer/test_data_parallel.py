"""A peer that shares its batches with replicas, against the same peer on one device."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import replica_process
import torch
from test_peer import STILL, batch, build, finish, settings, teachers, train
from torch import Tensor

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import PeerLostError
from ray_dmml.peer.data_parallel import Replicas
from ray_dmml.peer.peer import Peer

pytestmark = pytest.mark.ray


SLOW = {"name": "sgd", "lr": 5e-3, "momentum": 0.5, "weight_decay": 1e-3}
"""With a learning rate of 0.05 rounding grows to 1 % within six steps."""

SIZES = (8, 5)
"""Embedding sizes of two other peers."""

Share = Callable[..., AbstractContextManager[tuple[Peer, list[BaseProcess]]]]


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes as forks of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ray_dmml.peer.data_parallel"])
    return context


@pytest.fixture
def share(processes: Any, tmp_path: Path) -> Share:
    """Builds a peer with replicas: ``with share(config, size, **loss) as (peer, replicas)``."""

    @contextmanager
    def shared(
        config: PeerConfig, size: int, micro_batch: int | None = None, **loss: Any
    ) -> Iterator[tuple[Peer, list[BaseProcess]]]:
        path = str(tmp_path / "store")
        replicas = [
            processes.Process(target=replica_process.serve, args=(path, rank, size, config, micro_batch))
            for rank in range(1, size)
        ]
        for replica in replicas:
            replica.start()
        try:
            peer = build(config, {"micro_batch": micro_batch}, **loss)
            peer.replicas = Replicas(replica_process.connect(path, 0, size))
            yield peer, replicas
        finally:
            for replica in replicas:
                replica.kill()
                replica.join()

    return shared


def publish(peer: Peer, step: int) -> Tensor:
    """The embeddings that the peer publishes for a batch."""
    return peer.forward(batch(step)).published


MUTUAL: dict[str, Any] = {"relational": {"distance_weight": 1.0, "angle_weight": 2.0}}
RAW: dict[str, Any] = {"relational": {**MUTUAL["relational"], "normalize": False}}
MICRO: dict[str, Any] = {**MUTUAL, "micro_batch": 4}
MEMORY = {"name": "CrossBatchMemory", "args": {"memory_size": 30, "loss": {"name": "ContrastiveLoss"}}}
CASES = [
    (2, {"batch_norm": "frozen"}, MUTUAL),
    (2, {"batch_norm": "frozen"}, RAW),
    (5, {"batch_norm": "frozen"}, MUTUAL),
    (2, {"batch_norm": "frozen", "ema": {"decay": 0.5, "as_teacher": True}}, MUTUAL),
    (2, {"batch_norm": "frozen", "update_interval": 2}, MUTUAL),
    (2, {"batch_norm": "frozen"}, {**MUTUAL, "metric": MEMORY}),
    (2, {"batch_norm": "train", "freeze_blocks": "all"}, MUTUAL),
    (2, {"batch_norm": "frozen", "ema": {"decay": 0.5, "as_teacher": True}, "update_interval": 2}, MICRO),
]


@pytest.mark.parametrize(
    ("size", "more", "loss"),
    CASES,
    ids=[
        "even",
        "before normalisation",
        "uneven",
        "averaged weights published",
        "accumulating",
        "a loss with a memory",
        "frozen backbone",
        "micro batches",
    ],
)
def test_replicas_learn_what_one_device_learns_from_the_whole_batch(
    share: Share, size: int, more: dict[str, Any], loss: dict[str, Any]
) -> None:
    """12 images on 2 processes, and on 5, which divides them unevenly: losses, weights, embeddings."""
    config = settings(**{**STILL, "optimizer": SLOW, **more})
    alone = build(config, **{key: value for key, value in loss.items() if key != "micro_batch"})
    before = [p.detach().clone() for p in alone.net.parameters()]
    expected = train(alone, 0, 4, *SIZES)
    with share(config, size, **loss) as (peer, _):
        terms = train(peer, 0, 4, *SIZES)
        published = publish(peer, 9), publish(alone, 9)
    for row, wanted in zip(terms, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(*published, rtol=0, atol=1e-3)
    for old, a, b in zip(before, peer.net.parameters(), alone.net.parameters(), strict=True):
        assert (a - b).norm() <= 0.01 * (b - old).norm() + 1e-6
    assert any(not torch.equal(old, p) for old, p in zip(before, peer.net.parameters(), strict=True))


@pytest.mark.parametrize("has_head", [True, False])
def test_replicas_of_a_frozen_peer_have_its_head_or_none(share: Share, tmp_path: Path, has_head: bool) -> None:
    """A replica does not read the weights, so its peer sends the size of the head."""
    donor = build(settings(embedding_size=5)).net
    torch.save((donor if has_head else donor.backbone).state_dict(), tmp_path / "weights.pth")
    config = settings(**STILL, frozen=True, weights=str(tmp_path / "weights.pth"))
    with share(config, 2) as (peer, _):
        published = publish(peer, 0)
    torch.testing.assert_close(published, publish(build(config), 0), rtol=1e-5, atol=1e-6)


def test_fewer_images_than_replicas(share: Share) -> None:
    """For example the last images of an evaluation."""
    config = settings(**STILL)
    images = batch(0).images[:1]
    with share(config, 3) as (peer, _), torch.no_grad():
        assert peer.replicas is not None
        embeddings = peer.replicas.infer(peer.net.eval(), images, ema=False)
    with torch.no_grad():
        expected = build(config).net.eval().forward_unnormalized(images)
    assert embeddings.shape == (1, 8)
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-6)


def test_features_of_the_backbone(share: Share) -> None:
    """Before the head, from 3 processes as from one."""
    config = settings(**STILL)
    images = batch(0).images
    with share(config, 3) as (peer, _), torch.no_grad():
        assert peer.replicas is not None
        features = peer.replicas.infer(peer.net.eval(), images, ema=False, features=True)
    with torch.no_grad():
        expected = build(config).net.eval().backbone_features(images)
    assert features.shape == (12, expected.shape[1]) and expected.shape[1] != 8
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


def test_loaded_weights_reach_the_replicas(share: Share) -> None:
    """After going back to a state the embeddings have the same bits. In between they differ."""
    config = settings(**STILL, ema={"decay": 0.5})
    with share(config, 2) as (peer, _):
        train(peer, 0, 2, *SIZES)
        state = {
            key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()}
            if isinstance(value, dict) and key in ("net", "ema")
            else value
            for key, value in peer.state_dict().items()
        }
        before = publish(peer, 5)
        train(peer, 2, 4, *SIZES)
        assert not torch.equal(publish(peer, 5), before)
        peer.load_state_dict(state)
        assert torch.equal(publish(peer, 5), before)


@pytest.mark.parametrize("when", ["forward", "step"])
def test_a_dead_replica_is_a_lost_peer(share: Share, when: str) -> None:
    """The error names the peer, whether the replica dies before the embeddings or before the gradients."""
    with share(settings(**STILL), 3) as (peer, replicas):
        out = peer.forward(batch(0))
        if when == "forward":
            finish(peer, out, teachers(0, *SIZES))
        assert replicas[1].pid is not None
        os.kill(replicas[1].pid, signal.SIGKILL)
        replicas[1].join()
        with pytest.raises(PeerLostError, match="peer0: one of its replicas was lost"):
            if when == "forward":
                peer.forward(batch(1))
            else:
                finish(peer, out, teachers(0, *SIZES))
