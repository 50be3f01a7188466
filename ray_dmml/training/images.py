"""Reads the images of a run, and says what is unfortunate about them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.data.dataset import Splits
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.findings import Findings, notes_on_validation
from ray_dmml.data.loader import build_sampler
from ray_dmml.errors import UserError

logger = logging.getLogger(__name__)


def read_images(config: Config) -> Splits:
    """The images of a run. What is wrong with them is known before a process starts.

    Raises:
        UserError: as :func:`~ray_dmml.data.datasets.load_splits`, or no batches of
            data.classes_per_batch x data.images_per_class can be made of them.
    """
    logger.debug("reading the images")
    findings = Findings()
    splits = load_splits(config.data, findings=findings)
    for text in [*findings.notes, *warn_of_images(config, splits)]:
        logger.warning("%s", text)
    if num_small := build_sampler(config, splits).small_classes:
        _refuse_small_classes(config, splits.train.num_classes, num_small)
    return splits


def warn_of_images(config: Config, splits: Splits) -> Iterator[str]:
    """A sentence for each property of the images that makes training or its figures worse."""
    if num_small := build_sampler(config, splits).small_classes:
        yield (
            f"{num_small} training classes have fewer than {config.data.images_per_class} images: they give all they "
            "have, and others fill the batch"
        )
    yield from notes_on_validation(splits.validation)
    yield from _warn_of_frozen_statistics(config)


def _warn_of_frozen_statistics(config: Config) -> Iterator[str]:
    if config.train.init_from:
        return
    for peer in config.cohort.peers:
        if peer.weights == "none" and peer.batch_norm == "frozen" and _has_batch_norm(peer):
            yield (
                f"{peer.name} starts from random weights with frozen BatchNorm statistics; batch_norm: train learns "
                "better from scratch"
            )


def _has_batch_norm(peer: PeerConfig) -> bool:
    from ray_dmml.models.backbone import has_batch_norm  # these import timm
    from ray_dmml.models.own_backbone import is_own_backbone

    # An own backbone may load its weights itself.
    return not is_own_backbone(peer.backbone) and has_batch_norm(peer.backbone)


def _refuse_small_classes(config: Config, num_classes: int, num_small: int) -> None:
    """Raises UserError if the metric loss needs as many images of each class, and small classes have fewer."""
    from ray_dmml.losses.metric import MetricLoss  # takes a second to import
    from ray_dmml.losses.rehearsal import rehearse_small_classes

    size = config.cohort.peers[0].embedding_size
    loss = MetricLoss(config.loss.metric, num_classes, size)
    try:
        rehearse_small_classes(loss, num_classes, size)
    except Exception as error:  # whatever the loss raises
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"loss.metric: {config.loss.metric.name} does not work with batches in which a class has fewer images than "
            f"another, and {num_small} training classes have fewer than data.images_per_class, which is "
            f"{config.data.images_per_class}: {reason}"
        ) from None
