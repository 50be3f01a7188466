"""Trains one arm with one seed, and evaluates it once, at the last step.

All peers of an arm train in this process, which gives the numbers of a cohort on Ray to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from runner.figures import rounded
from runner.folders import device_name

from ray_dmml.cohort.local import LocalCohort
from ray_dmml.config.schema import Config
from ray_dmml.data.dataset import Splits
from ray_dmml.evaluation.evaluation import evaluate_during_training

Split = Literal["validation", "test"]


def measure(config: Config, splits: Splits, split: Split) -> dict[str, Any]:
    """The figures of each peer and of the ensemble on one split, how much the peers agree, the device and the time."""
    began = time.perf_counter()
    with closing(LocalCohort(config, splits)) as cohort:
        cohort.run(0, config.train.steps, lambda finished: None)
        embeddings = cohort.embeddings(split)
        device = cohort.peers[0].device
    figures, _ = evaluate_during_training(embeddings, getattr(splits, split), recall_at=[1])
    return {
        "seed": config.seed,
        "peers": [rounded(peer) for peer in figures["peers"].values()],
        "ensemble": rounded(figures["ensemble"]),
        "agreement": round(agreement(list(embeddings.values())), 5),
        "device": device_name(device),
        "seconds": round(time.perf_counter() - began, 1),
    }


def agreement(members: Sequence[NDArray[Any]]) -> float:
    """How much members agree on relations between images.

    The mean over pairs of members of the correlation between their (N, N) matrices of cosines, without
    the diagonal. It is 1 where they agree on all relations. Embeddings (N, D_m) have unit length.
    """
    count = len(members[0])
    members = [each.astype(np.float64) for each in members]
    mean = [(np.sum(each.sum(0) ** 2) - count) / (count * (count - 1)) for each in members]

    def covariance(a: int, b: int) -> float:
        # The sum of x_ij * y_ij over all i and j is |X^T Y|^2, which needs no (N, N) matrix.
        products = np.sum((members[a].T @ members[b]) ** 2) - count
        return float(products / (count * (count - 1)) - mean[a] * mean[b])

    pairs = combinations(range(len(members)), 2)
    return float(np.mean([covariance(a, b) / np.sqrt(covariance(a, a) * covariance(b, b)) for a, b in pairs]))
