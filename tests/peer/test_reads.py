"""How often a step waits for its device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reads import Reads
from test_peer import SKIP, STILL, batch, build, finish, settings, teachers, train

TERMS = {
    "relational": {"teacher": "ensemble"},
    "similarity": {"weight": 0.1},
    "relaxed_contrastive": {"weight": 0.1},
    "metric": {},
}
CLIPPED = {**STILL["optimizer"], "clip_norm": 1.0}  # adam's counts are tensors on the CPU, which are counted here


@pytest.mark.parametrize(
    ("more", "numbers"),
    [
        ({"ema": {"decay": 0.5, "as_teacher": True}, "optimizer": CLIPPED}, {}),
        ({"update_interval": 2}, SKIP),
        ({"update_interval": 2, "checkpoint_activations": True}, {"micro_batch": 5}),
        ({"update_interval": 2, "update_mode": "skip"}, {}),
    ],
    ids=["averaged and clipped", "skipping and accumulating", "micro batches", "not learning"],
)
def test_a_step_reads_once_from_its_device(more: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Whether all is finite, all terms and the norm of the gradient: together, by one copy."""
    peer = build(settings(**{**STILL, **more}), numbers, **TERMS)
    train(peer, 0, 2, 8, 5)
    for step in (2, 3):
        given, others = batch(step), teachers(step, 8, 5)
        with Reads(given.labels) as reads:
            finish(peer, peer.forward(given), others)
        assert len(reads.names) == 1, reads.names


def test_reads_are_counted() -> None:
    """What the test above relies on."""
    values, labels = torch.arange(4.0), torch.arange(4)
    with Reads(labels) as reads:
        bool((values > 1).any())
        values[values > 1] + 1
        torch.where(values > 1)
        values.tolist()
        torch.where(labels > 1)
        values[labels]
    assert reads.names == ["aten._local_scalar_dense.default", "aten.index.Tensor", "aten.nonzero.default", "tolist"]
