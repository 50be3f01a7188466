"""What an evaluation gives on request: figures by class and category, of subsets of the peers, and of clusters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np

from ray_dmml.cores import num_cores
from ray_dmml.errors import UserError
from ray_dmml.evaluation.bootstrap import class_bootstrap
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.evaluation.evaluation import ENSEMBLE, TEACHERS, Evaluation, nested
from ray_dmml.evaluation.neighbors import Floats, Ints, faiss_threads
from ray_dmml.evaluation.retrieval import means_by, retrieve

MAX_PEERS = 8
"""The most peers whose subsets are evaluated: 255 of them."""

NO_CATEGORY = "(none)"


def by_class(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Means over the queries of each class, the class with the lowest Recall@1 of the ensemble first.

    Each row has ``class``, ``num_queries``, ``peers`` and ``ensemble``, and ``category`` if the images have categories.
    """
    images = evaluation.images
    rows = _means_by_group(evaluation, evaluation.query_classes, "class", lambda label: images.class_names[label])
    if images.categories is not None:
        _, first = np.unique(images.labels, return_index=True)
        category_of = {images.class_names[images.labels[image]]: images.categories[image] for image in first.tolist()}
        rows = [{"class": row["class"], "category": category_of[row["class"]] or NO_CATEGORY, **row} for row in rows]
    return rows


def by_category(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The same for each category of the queries, with ``category`` instead of ``class``; empty if there are none."""
    categories, queries = evaluation.images.categories, evaluation.queries
    if categories is None:
        return []
    names, numbers = np.unique([categories[image] or NO_CATEGORY for image in queries.tolist()], return_inverse=True)
    return _means_by_group(evaluation, numbers, "category", lambda number: str(names[number]))


def subsets(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The ensemble of every subset of the peers, the smallest first: ``peers`` (their names), ``figures`` as means over
    queries, and ``intervals``.

    Raises:
        UserError: there are more than :data:`MAX_PEERS` peers.
    """
    peers = {name: vectors for name, vectors in evaluation.embeddings.items() if name not in (ENSEMBLE, TEACHERS)}
    require_few(len(peers))
    classes, rows = evaluation.query_classes, []
    for size in range(1, len(peers) + 1):
        for names in combinations(peers, size):
            known = names[0] if size == 1 else ENSEMBLE if size == len(peers) else None
            if known is not None:
                found = evaluation.systems[known]
            else:
                vectors = ensemble_embedding([peers[name] for name in names])
                found = retrieve(vectors, evaluation.images, recall_at=evaluation.recall_at, keep=0)
            intervals = {metric: list(ends) for metric, ends in class_bootstrap(found.values, classes).items()}
            rows.append({"peers": list(names), "figures": found.means(), "intervals": intervals})
    return rows


def require_few(num_peers: int) -> None:
    """Raises UserError if there are more than :data:`MAX_PEERS` peers, see :func:`subsets`."""
    if num_peers > MAX_PEERS:
        raise UserError(f"the subsets of {num_peers} peers are too many to evaluate; at most {MAX_PEERS} peers can be")


def clustering(evaluation: Evaluation, seed: int = 0) -> dict[str, dict[str, float]]:
    """By system, how well as many clusters as there are classes agree with the classes: ``nmi`` and ``ami``, normalised
    and adjusted mutual information. The clusters of all images are those of faiss's k-means."""
    images = evaluation.images
    return {
        name: _agreement(images.labels, _clusters(vectors, images.num_classes, seed))
        for name, vectors in evaluation.embeddings.items()
    }


def _means_by_group(
    evaluation: Evaluation, groups: Ints, kind: str, name_of: Callable[[int], str]
) -> list[dict[str, Any]]:
    numbers, counts, _ = means_by(groups, {})
    means = {name: means_by(groups, system.values)[2] for name, system in evaluation.systems.items()}
    rows = []
    for place, (number, count) in enumerate(zip(numbers.tolist(), counts.tolist(), strict=True)):
        figures = {
            system: {metric: float(values[place]) for metric, values in each.items()} for system, each in means.items()
        }
        rows.append({kind: name_of(number), "num_queries": count, **nested(figures)})
    return sorted(rows, key=lambda row: (row["ensemble"]["recall@1"], row["ensemble"]["map@r"]))


def _clusters(vectors: Floats, num: int, seed: int) -> Ints:
    import faiss

    kmeans = faiss.Kmeans(vectors.shape[1], num, seed=seed, min_points_per_centroid=1)
    vectors = np.ascontiguousarray(vectors, np.float32)
    with faiss_threads(num_cores()):
        kmeans.train(vectors)
        return kmeans.index.search(vectors, 1)[1][:, 0]


def _agreement(labels: Ints, clusters: Ints) -> dict[str, float]:
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    return {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ami": float(adjusted_mutual_info_score(labels, clusters)),
    }
