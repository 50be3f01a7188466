"""Builds a peer from the config of an experiment."""

from __future__ import annotations

import torch

from ray_dmml.config.schema import Config
from ray_dmml.peer.peer import Peer


def build_peer(config: Config, position: int, num_classes: int, device: torch.device, initial_weights: bool) -> Peer:
    """The peer at a position of ``cohort.peers``.

    Args:
        num_classes: number of training classes.
        initial_weights: False leaves the initial weights unread, because a state is loaded next.
    """
    return Peer(
        config.cohort.peers[position],
        config.loss,
        run_seed=config.seed,
        num_classes=num_classes,
        decode_size=config.data.decode_size,
        device=device,
        on_nonfinite=config.failure.on_nonfinite,
        max_consecutive_nonfinite=config.failure.max_consecutive_nonfinite,
        initial_weights=initial_weights,
    )
