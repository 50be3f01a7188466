"""A peer that shares its batches with replicas, against the same peer alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_peer import STILL, batch, build, settings, teachers
from torch.distributed import FileStore  # type: ignore[attr-defined]

from ray_dmml.config.schema import PeerConfig
from ray_dmml.errors import PeerLostError
from ray_dmml.peer.data_parallel import Replica, ReplicaChannel, Replicas
from ray_dmml.peer.peer import Peer

CPU = torch.device("cpu")
SLOW = {"name": "sgd", "lr": 5e-3, "momentum": 0.5, "weight_decay": 1e-3}
"""Rounding grows to 1 % within six steps of a rate of 0.05."""

SIZES = (8, 5)
"""Of the embeddings of two other peers."""


def serve(path: str, rank: int, size: int, config: PeerConfig) -> None:
    torch.set_num_threads(1)
    channel = ReplicaChannel(FileStore(path, size), rank, size, CPU, "peer0", 60)
    Replica(config, 7, channel).serve()


@contextmanager
def shared(folder: Path, config: PeerConfig, size: int, **given: Any) -> Iterator[tuple[Peer, Any]]:
    """A peer of so many processes, and the others of them."""
    path = str(folder / "store")
    others = [
        multiprocessing.get_context("spawn").Process(target=serve, args=(path, n, size, config))
        for n in range(1, size)
    ]
    for other in others:
        other.start()
    try:
        peer = build(config, **given)
        peer.replicas = Replicas(ReplicaChannel(FileStore(path, size), 0, size, CPU, "peer0", 60))
        yield peer, others
    finally:
        for other in others:
            other.kill()
            other.join()


def steps(peer: Peer, start: int, stop: int) -> list[dict[str, float]]:
    rows = []
    for step in range(start, stop):
        peer.embed(batch(step))
        peer.measure()
        rows.append(peer.update(teachers(step, *SIZES)))
    return rows


MUTUAL: dict[str, Any] = {"relational": {"distance_weight": 1.0, "angle_weight": 2.0}}
RAW: dict[str, Any] = {"relational": {**MUTUAL["relational"], "normalize": False}}
CASES = [
    (2, {"batch_norm": "frozen"}, MUTUAL),
    (2, {"batch_norm": "frozen"}, RAW),
    (5, {"batch_norm": "frozen"}, MUTUAL),
    (2, {"batch_norm": "frozen", "ema": {"decay": 0.5, "as_teacher": True}}, MUTUAL),
    (2, {"batch_norm": "frozen", "update_interval": 2}, MUTUAL),
]


@pytest.mark.parametrize(
    ("size", "more", "loss"),
    CASES,
    ids=["even", "before normalisation", "uneven", "averaged weights published", "accumulating"],
)
def test_it_learns_what_one_learns_from_the_whole_batch(
    tmp_path: Path, size: int, more: dict[str, Any], loss: dict[str, Any]
) -> None:
    """12 images on 2, and on 5, which divides them unevenly: losses, weights, embeddings."""
    config = settings(**{**STILL, "optimizer": SLOW, **more})
    alone = build(config, **loss)
    before = [p.detach().clone() for p in alone.net.parameters()]
    expected = steps(alone, 0, 4)
    with shared(tmp_path, config, size, **loss) as (peer, _):
        found = steps(peer, 0, 4)
        published = peer.embed(batch(9)), alone.embed(batch(9))
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(*published, rtol=0, atol=1e-3)
    for old, a, b in zip(before, peer.net.parameters(), alone.net.parameters(), strict=True):
        assert (a - b).norm() <= 0.01 * (b - old).norm() + 1e-6


def test_fewer_images_than_replicas(tmp_path: Path) -> None:
    """As the last images of an evaluation may be."""
    config = settings(**STILL)
    images = batch(0).images[:1]
    view = build(config)._augment(build(config).eval_view, images)
    with shared(tmp_path, config, 3) as (peer, _):
        found = peer._infer(peer.net, view)
    alone = build(config)
    np.testing.assert_allclose(found, alone._infer(alone.net, view), rtol=1e-5, atol=1e-6)


def test_weights_that_were_loaded_reach_the_replicas(tmp_path: Path) -> None:
    """The same bits again after going back to a state; those of other weights in between."""
    config = settings(**STILL, ema={"decay": 0.5})
    with shared(tmp_path, config, 2) as (peer, _):
        steps(peer, 0, 2)
        state = {
            key: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in value.items()}
            if isinstance(value, dict) and key in ("net", "ema")
            else value
            for key, value in peer.state_dict().items()
        }
        before = peer.embed(batch(5))
        steps(peer, 2, 4)
        assert not torch.equal(peer.embed(batch(5)), before)
        peer.load_state_dict(state)
        assert torch.equal(peer.embed(batch(5)), before)


@pytest.mark.parametrize("when", ["embed", "update"])
def test_a_replica_that_dies_is_told(tmp_path: Path, when: str) -> None:
    with shared(tmp_path, settings(**STILL), 3) as (peer, others):
        steps(peer, 0, 1)
        if when == "update":
            peer.embed(batch(1))
        os.kill(others[1].pid, signal.SIGKILL)
        others[1].join()
        with pytest.raises(PeerLostError, match="peer0: one of its replicas was lost"):
            steps(peer, 1, 2) if when == "embed" else peer.update(teachers(1, *SIZES))
