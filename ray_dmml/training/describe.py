"""What is about to run, and what it waited for, in a few lines for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ray_dmml.cohort.cohort import Cohort
from ray_dmml.cohort.phases import WAITING
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.data.augmentations import view_name
from ray_dmml.data.dataset import Splits
from ray_dmml.training.state import TrainingState

LONG_WAIT = 0.1
"""Share of the training time from which on the waiting of a peer is worth a line."""


def describe_cohort(config: Config, splits: Splits, facts: Mapping[str, Any]) -> Iterator[str]:
    """Images, batches, peers and devices; ``facts`` are those of run.json."""
    train, validation = splits.train, splits.validation
    yield f"data      {config.data.name}: train {len(train):,} images of {train.num_classes} classes"
    if validation is not None:
        yield (
            f"          validation {len(validation):,} images of {validation.num_classes} classes, held out of training"
        )
    if splits.test is None:
        yield "          no test images"
    else:
        yield f"          test {len(splits.test):,} images of {splits.test.num_classes} classes"
    num_classes, num_images = config.data.classes_per_batch, config.data.images_per_class
    yield (
        f"          batches of {num_classes * num_images}: {num_classes} classes x {num_images} images, "
        f"an epoch is {facts['steps_per_epoch']} steps"
    )
    for peer in config.cohort.peers:
        yield _describe_peer(peer)
    devices = ", ".join(dict.fromkeys(facts["devices"]))
    threads = ", ".join(map(str, dict.fromkeys(facts["threads"])))
    yield (
        f"cohort    {len(config.cohort.peers)} peers on {devices}, torch threads each: {threads}, "
        f"exchange: {facts['transport']}"
    )


def _describe_peer(peer: PeerConfig) -> str:
    every = "step" if peer.update_interval == 1 else f"{peer.update_interval} steps"
    role = "frozen" if peer.frozen else f"update every {every}"
    if peer.update_mode == "skip" and peer.update_interval > 1:
        role += " (skip)"
    if peer.freeze_blocks is not None:
        role += (
            ", frozen backbone" if peer.freeze_blocks == "all" else f", frozen: stem and {peer.freeze_blocks} blocks"
        )
    if peer.lora is not None:
        role += f", LoRA of rank {peer.lora.rank}"
    size = "" if peer.frozen else f"{peer.embedding_size}-d, "  # that of a frozen peer is that of its weights
    return f"{peer.name:<9} {peer.backbone}, {size}seed {peer.seed}, view {view_name(peer.view)}, {role}"


def describe_early_stop(state: TrainingState, config: Config) -> str:
    """Why a run ended before its last step, and how it goes on."""
    return (
        f"no better validation Recall@1 in {state.num_since_best} evaluations since step {state.best_step}: training "
        f"ends at step {state.step} of {config.train.steps} (train.early_stopping; resume with a larger number or null "
        "to go on)"
    )


def describe_saturation(state: TrainingState) -> str:
    """That no validation can be better any more; empty if that is not so."""
    if state.best < 1 or not state.num_since_best:
        return ""
    advice = "hold out more classes, or evaluate the last weights"
    return f"validation Recall@1 is 100 % since step {state.best_step}: {advice}"


def describe_waits(cohort: Cohort, train_s: float) -> Iterator[str]:
    """Names a peer that is the slowest by far: the cores or GPUs of the others are idle meanwhile."""
    waited = {name: cohort.seconds[name][WAITING] for name in cohort.names}
    slowest = min(waited, key=lambda name: waited[name])
    if max(waited.values()) - waited[slowest] > LONG_WAIT * train_s:
        others = ", ".join(f"{n} {s:.0f} s" for n, s in waited.items() if n != slowest)
        yield f"the other peers waited for {slowest}: {others} of {train_s:.0f} s of training"
