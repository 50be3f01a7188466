"""Retrieval figures of every peer and of the ensemble on the images of one split."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ray_dmml.data.dataset import ImageSet
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.evaluation.metrics import retrieval_metrics

Figures = dict[str, Any]
"""``{"peers": {name: {"recall@1": ...}}, "ensemble": {"recall@1": ...}}``, all as fractions. Final figures of a run
with several frozen peers also have ``teachers_ensemble``. Those of untrained peers also have ``split``, ``test`` or
``validation``, and ``backbones``: the figures of each peer's features before the head."""


def evaluate_embeddings(
    embeddings: Mapping[str, np.ndarray], images: ImageSet, recall_at: Sequence[int], teachers: Collection[str] = ()
) -> Figures:
    """Evaluates each peer's (N, D) unit-length embeddings of the images, and their concatenation.

    Recall@1 is always included. Two or more ``teachers`` are also evaluated as an ensemble of their own. Errors are
    those of :func:`~ray_dmml.evaluation.metrics.retrieval_metrics`.
    """
    figures = {
        "peers": {name: evaluate_vectors(vectors, images, recall_at) for name, vectors in embeddings.items()},
        "ensemble": evaluate_vectors(ensemble_embedding(list(embeddings.values())), images, recall_at),
    }
    taught = [vectors for name, vectors in embeddings.items() if name in teachers]
    if len(taught) > 1:
        figures["teachers_ensemble"] = evaluate_vectors(ensemble_embedding(taught), images, recall_at)
    return figures


def evaluate_vectors(vectors: np.ndarray, images: ImageSet, recall_at: Sequence[int]) -> dict[str, float]:
    """Evaluates (N, D) unit-length vectors of the images. Recall@1 is always included."""
    ks = sorted({1, *recall_at})
    return retrieval_metrics(vectors, images.labels, recall_at=ks, query=images.query, gallery=images.gallery)
