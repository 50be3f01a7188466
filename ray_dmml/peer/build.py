"""Builds a peer, and what makes its images, from the config of an experiment."""

from __future__ import annotations

import torch

from ray_dmml.config.schema import Config
from ray_dmml.data.augmentations import views_of
from ray_dmml.data.dataset import Splits
from ray_dmml.data.loader import DecodedBatches, build_sampler
from ray_dmml.data.peer_views import PeerViews
from ray_dmml.data.view_loader import ViewLoader
from ray_dmml.models.embedding_net import input_of
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
        device=device,
        micro_batch=config.data.micro_batch,
        on_nonfinite=config.failure.on_nonfinite,
        max_consecutive_nonfinite=config.failure.max_consecutive_nonfinite,
        initial_weights=initial_weights,
    )


def build_views(config: Config, position: int, splits: Splits) -> PeerViews:
    """The views of the peer at a position of ``cohort.peers``.

    Raises:
        UserError: its backbone is unknown, or its view cannot be built or fails.
    """
    peer = config.cohort.peers[position]
    size, own_crop = input_of(peer)
    view, eval_view = views_of(peer, size, own_crop, config.data.decode_size)
    return PeerViews(splits, build_sampler(config, splits), view, eval_view, config.seed, peer.seed or 0)


def build_view_loader(
    config: Config,
    position: int,
    splits: Splits,
    decoded: DecodedBatches,
    device: torch.device,
    *,
    num_workers: int,
    threads: int,
) -> ViewLoader:
    """What loads the images of the peer at a position of ``cohort.peers``. Build it before the peer: its workers start
    meanwhile.

    Args:
        decoded: decodes for this process.
        num_workers: number of worker processes.
        threads: decoding threads of an evaluation in this process.

    Raises:
        UserError: as :func:`build_views`, and if the workers cannot be started.
    """
    peer = config.cohort.peers[position]
    return ViewLoader(
        build_views(config, position, splits),
        str(peer.name),
        num_workers=num_workers,
        decoded=decoded,
        threads=threads,
        eval_batch_size=config.evaluation.batch_size,
        pin=device.type == "cuda",
        has_kept=peer.teacher_view == "evaluation",
    )
