"""One arm with one seed: trained, judged along the way on validation classes, and on the test
classes as it was at its last step and at the step that was best on validation classes.

All peers of an arm are in one process, in turn: the numbers of a cohort of actors, to the bit.
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
"""Added to the seed of the finished teacher: other batches and other initial weights of its head."""


def measure(plan: Plan, arm: Arm, seed: int, splits: Splits) -> dict[str, Any]:
    """The row of an arm and seed; see the module."""
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        teacher = None
        if arm.teacher:
            teacher = Path(folder) / "teacher.safetensors"
            _train_teacher(plan.config(TEACHER, seed + TEACHER_SEED), splits, teacher)
        config = plan.config(arm, seed, teacher)
        with closing(LocalCohort(config, splits)) as cohort:
            row = _run(config, arm, cohort, splits)
            device = device_name(cohort.peers[0].device)
    seconds = round(time.perf_counter() - began, 1)
    return {"seed": seed, **row, "device": device, "seconds": seconds}


def device_name(device: torch.device) -> str:
    """What figures were measured on: they differ between two models in more than the last bit."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu()


def agreement(members: Embeddings) -> float:
    """Mean over pairs of members of the correlation between their matrices of cosines, (N, N) each,
    without the diagonal; 1 where they agree on all relations."""
    above = np.triu_indices(len(members[0]), 1)
    relations = [(each @ each.T)[above] for each in members]
    pairs = combinations(relations, 2)
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]))


def only_one(members: Embeddings, images: ImageSet) -> float:
    """Share of the queries whose nearest neighbour is of their class for exactly one member."""
    right = sum(_right(each, images).astype(int) for each in members)
    return round(float(np.mean(right == 1)), 5)


def _right(embeddings: NDArray[Any], images: ImageSet) -> NDArray[np.bool_]:
    """Of each query, whether its nearest neighbour is of its class."""
    everything = np.arange(len(images))
    query = everything if images.query is None else images.query
    gallery = everything if images.gallery is None else images.gallery
    place = np.full(len(images), -1)
    place[gallery] = np.arange(len(gallery))
    found = nearest(embeddings[query], embeddings[gallery], 1, exclude_self=place[query])
    first = np.concatenate([rows[:, 0] for _, rows in found])
    return images.labels[gallery[first]] == images.labels[query]


def _figures(members: Embeddings, images: ImageSet) -> dict[str, Any]:
    def judged(embeddings: NDArray[Any]) -> dict[str, float]:
        found = retrieval_metrics(
            embeddings, images.labels, recall_at=[1], query=images.query, gallery=images.gallery
        )
        return {metric: round(found[metric], 5) for metric in ("recall@1", "map@r")}

    return {
        "peers": [judged(each) for each in members],
        "ensemble": judged(ensemble_embedding(members)),
    }


def _run(config: Config, arm: Arm, cohort: LocalCohort, splits: Splits) -> dict[str, Any]:
    assert splits.validation is not None  # Plan sees to it
    # For the gap between them: as many classes of either, as Recall@1 falls with their number.
    fewer = min(splits.train.num_classes, splits.validation.num_classes)
    seen, unseen = (_few_classes(each, fewer) for each in (splits.train, splits.validation))
    learners = [peer for peer in cohort.peers if not peer.config.frozen]
    size = config.evaluation.batch_size
    steps, every = config.train.steps, config.train.evaluate_every
    snapshots: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def embedded(images: ImageSet) -> Embeddings:
        return [peer.embed_images(images, size, ema=arm.ema) for peer in learners]

    def judged(images: ImageSet, validation: dict[str, Any]) -> dict[str, Any]:
        members = embedded(images)
        found = {"validation": validation, "test": _figures(members, images)}
        return found if len(members) == 1 else {**found, "only_one": only_one(members, images)}

    curve: list[dict[str, Any]] = []
    best_step, best_of, best_state = 0, {"ensemble": {"recall@1": -1.0}}, {}
    for start in range(0, steps, every):
        step = start + every
        rows = cohort.run(start, step, lambda finished: None)
        members = embedded(splits.validation)
        validation = _figures(members, splits.validation)
        held_out = validation if unseen is splits.validation else _figures(embedded(unseen), unseen)
        metric = [row[peer.name]["metric"] for row in rows for peer in learners if row[peer.name]]
        point = {
            "step": step,
            "mean_peer": round(_mean(validation), 5),
            "ensemble": validation["ensemble"]["recall@1"],
            "gap": round(_mean(_figures(embedded(seen), seen)) - _mean(held_out), 5),
            "metric_loss": round(float(np.mean(metric)), 5) if metric else None,
        }
        if len(members) > 1:
            point["agreement"] = round(agreement(members), 5)
        curve.append(point)
        if point["ensemble"] > best_of["ensemble"]["recall@1"]:
            # The test classes are read at the end, once for each of the two steps.
            best_step, best_of, best_state = step, validation, cohort.state()
        if arm.snapshots > 1 and step % (steps // arm.snapshots) == 0:
            snapshots.append((members[0], embedded(splits.test)[0]))
    if snapshots:
        of_validation, of_test = (list(each) for each in zip(*snapshots, strict=True))
        last = {
            "step": steps,
            "validation": _figures(of_validation, splits.validation),
            "test": _figures(of_test, splits.test),
            "only_one": only_one(of_test, splits.test),
        }
        return {"last": last, "best": last, "curve": curve}
    last = {"step": steps, **judged(splits.test, validation)}
    best = last
    if best_step != steps:
        cohort.load(best_state)
        best = {"step": best_step, **judged(splits.test, best_of)}
    return {"last": last, "best": best, "curve": curve}


def _mean(figures: dict[str, Any]) -> float:
    return float(np.mean([peer["recall@1"] for peer in figures["peers"]]))


def _few_classes(images: ImageSet, num_classes: int) -> ImageSet:
    """So many classes, spread evenly over those of the set."""
    if num_classes == images.num_classes:
        return images
    kept = np.linspace(0, images.num_classes - 1, num_classes).round()
    return images.subset(np.flatnonzero(np.isin(images.labels, kept.astype(int))))


def _train_teacher(config: Config, splits: Splits, file: Path) -> None:
    with closing(LocalCohort(config, splits)) as cohort:
        cohort.run(0, config.train.steps, lambda finished: None)
        net = cohort.peers[0].net.state_dict()
    save_file({name: value.cpu().contiguous() for name, value in net.items()}, file)
