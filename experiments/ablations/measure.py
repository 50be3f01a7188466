"""Trains one arm with one seed, and evaluates it.

Validation classes are evaluated along the way. Test classes are evaluated at the last step, and at the
step that was best on validation classes. All peers of an arm train in this process, which gives the
numbers of a cohort on Ray to the bit.
"""

from __future__ import annotations

import time
from contextlib import closing
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from provenance import cpu
from safetensors.torch import save_file

from ray_dmml.cohort.local import LocalCohort
from ray_dmml.config.schema import Config
from ray_dmml.data.dataset import ImageSet, Splits
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.evaluation.metrics import retrieval_metrics
from ray_dmml.evaluation.neighbors import nearest

from .arms import TEACHER, Arm, Plan

Embeddings = list[NDArray[Any]]
"""Of each member of the ensemble, (N, D)."""

TEACHER_SEED = 1000
"""Added to the seed of self-distillation's teacher: other batches, another initial head."""


def measure(plan: Plan, arm: Arm, seed: int, splits: Splits) -> dict[str, Any]:
    """The row of an arm and seed: `last` and `best` with figures of validation and test classes, and `curve`."""
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        teacher = None
        if arm.teacher:
            teacher = Path(folder) / "teacher.safetensors"
            train_teacher(plan.config(TEACHER, seed + TEACHER_SEED), splits, teacher)
        config = plan.config(arm, seed, teacher)
        with closing(LocalCohort(config, splits)) as cohort:
            row = _run(config, arm, cohort, splits)
            device = device_name(cohort.peers[0].device)
    seconds = round(time.perf_counter() - began, 1)
    return {"seed": seed, **row, "device": device, "seconds": seconds}


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU: figures of two models differ by more than rounding."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu()


def agreement(members: Embeddings) -> float:
    """How much members agree on relations between images.

    The mean over pairs of members of the correlation between their (N, N) matrices of cosines, without
    the diagonal. It is 1 where they agree on all relations.
    """
    above = np.triu_indices(len(members[0]), 1)
    relations = [(each @ each.T)[above] for each in members]
    pairs = combinations(relations, 2)
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]))


def only_one(members: Embeddings, images: ImageSet) -> float:
    """Share of queries whose nearest neighbour has their class for exactly one member."""
    num_correct = sum(_is_correct(each, images).astype(int) for each in members)
    return round(float(np.mean(num_correct == 1)), 5)


def _is_correct(embeddings: NDArray[Any], images: ImageSet) -> NDArray[np.bool_]:
    """(num_queries,): whether the nearest neighbour of a query has its class."""
    everything = np.arange(len(images))
    query = everything if images.query is None else images.query
    gallery = everything if images.gallery is None else images.gallery
    own_row = np.full(len(images), -1)
    own_row[gallery] = np.arange(len(gallery))
    blocks = nearest(embeddings[query], embeddings[gallery], 1, own_rows=own_row[query])
    first = np.concatenate([neighbors[:, 0] for _, neighbors in blocks])
    return images.labels[gallery[first]] == images.labels[query]


def _evaluate(members: Embeddings, images: ImageSet) -> dict[str, Any]:
    def metrics(embeddings: NDArray[Any]) -> dict[str, float]:
        values = retrieval_metrics(embeddings, images.labels, recall_at=[1], query=images.query, gallery=images.gallery)
        return {metric: round(values[metric], 5) for metric in ("recall@1", "map@r")}

    return {
        "peers": [metrics(each) for each in members],
        "ensemble": metrics(ensemble_embedding(members)),
    }


def _run(config: Config, arm: Arm, cohort: LocalCohort, splits: Splits) -> dict[str, Any]:
    assert splits.validation is not None  # Plan refuses a config without
    # The gap compares equal numbers of classes, because Recall@1 falls with their number.
    fewer = min(splits.train.num_classes, splits.validation.num_classes)
    seen, unseen = (_few_classes(each, fewer) for each in (splits.train, splits.validation))
    learners = [peer for peer in cohort.peers if not peer.config.frozen]
    steps, every = config.train.steps, config.train.evaluate_every
    snapshots: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def embed(images: ImageSet) -> Embeddings:
        size = config.evaluation.batch_size
        return [peer.embed_images(images, size, ema=arm.ema) for peer in learners]

    def test(members: Embeddings, step: int, validation: dict[str, Any]) -> dict[str, Any]:
        figures = {
            "step": step,
            "validation": validation,
            "test": _evaluate(members, splits.test),
        }
        if len(members) > 1:
            figures["only_one"] = only_one(members, splits.test)
        return figures

    curve: list[dict[str, Any]] = []
    best_step, best_validation, best_state = 0, {"ensemble": {"recall@1": -1.0}}, {}
    for start in range(0, steps, every):
        step = start + every
        rows = cohort.run(start, step, lambda finished: None)
        members = embed(splits.validation)
        validation = _evaluate(members, splits.validation)
        held_out = validation if unseen is splits.validation else _evaluate(embed(unseen), unseen)
        losses = [row[peer.name]["metric"] for row in rows for peer in learners if row[peer.name]]
        point = {
            "step": step,
            "mean_peer": round(_mean_peer(validation), 5),
            "ensemble": validation["ensemble"]["recall@1"],
            "gap": round(_mean_peer(_evaluate(embed(seen), seen)) - _mean_peer(held_out), 5),
            "metric_loss": round(float(np.mean(losses)), 5) if losses else None,
        }
        if len(members) > 1:
            point["agreement"] = round(agreement(members), 5)
        curve.append(point)
        if point["ensemble"] > best_validation["ensemble"]["recall@1"]:
            # Test classes are evaluated only at the end, for the last and for the best step.
            best_step, best_validation, best_state = step, validation, cohort.state()
        if arm.snapshots > 1 and step % (steps // arm.snapshots) == 0:
            snapshots.append((members[0], embed(splits.test)[0]))
    if snapshots:
        of_validation, of_test = (list(each) for each in zip(*snapshots, strict=True))
        last = test(of_test, steps, _evaluate(of_validation, splits.validation))
        return {"last": last, "best": last, "curve": curve}
    last = best = test(embed(splits.test), steps, validation)
    if best_step != steps:
        cohort.load(best_state)
        best = test(embed(splits.test), best_step, best_validation)
    return {"last": last, "best": best, "curve": curve}


def _mean_peer(figures: dict[str, Any]) -> float:
    return float(np.mean([peer["recall@1"] for peer in figures["peers"]]))


def _few_classes(images: ImageSet, num_classes: int) -> ImageSet:
    """A subset of ``num_classes`` classes, spread evenly over all."""
    if num_classes == images.num_classes:
        return images
    kept = np.linspace(0, images.num_classes - 1, num_classes).round()
    return images.subset(np.flatnonzero(np.isin(images.labels, kept.astype(int))))


def train_teacher(config: Config, splits: Splits, file: Path) -> None:
    with closing(LocalCohort(config, splits)) as cohort:
        cohort.run(0, config.train.steps, lambda finished: None)
        weights = cohort.peers[0].net.state_dict()
    save_file({name: value.cpu().contiguous() for name, value in weights.items()}, file)
