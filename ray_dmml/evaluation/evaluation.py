"""Every peer and the ensemble on the images of one split: figures during training, and the whole evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from ray_dmml.data.dataset import ImageSet
from ray_dmml.errors import UserError
from ray_dmml.evaluation.bootstrap import class_bootstrap
from ray_dmml.evaluation.collapse import warn_of_collapse
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.evaluation.neighbors import Floats, Ints
from ray_dmml.evaluation.retrieval import Retrieval, retrieve
from ray_dmml.evaluation.verification import Pairs, verification

Figures = dict[str, Any]
"""``{"peers": {name: {"recall@1": ...}}, "ensemble": {"recall@1": ...}}``, all as fractions. Final figures of a run
with several frozen peers also have ``teachers_ensemble``. Those of untrained peers also have ``split``, ``test`` or
``validation``, and ``backbones``: the figures of each peer's features before the head. Those during training also have
``agreement`` if there are several peers, see :func:`agreement`."""

ENSEMBLE, TEACHERS = "ensemble", "teachers_ensemble"
"""Systems that are no peer: the concatenation of all peers, and that of the frozen ones."""

KINDS = ("both", "only_first", "only_second", "neither")
"""Which of two peers find a query."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What every system retrieves on one set of images.

    A system is a peer, ``teachers_ensemble`` if two or more peers are frozen, and ``ensemble`` if there are two or more
    peers; in this order.

    Attributes:
        images: the N images.
        embeddings: (N, D) float32 of each system, rows of length 1.
        systems: what each system retrieves. All have the same queries.
        recall_at: the values of K.
    """

    images: ImageSet
    embeddings: dict[str, Floats]
    systems: dict[str, Retrieval]
    recall_at: tuple[int, ...]

    @classmethod
    def of(
        cls,
        embeddings: Mapping[str, Floats],
        images: ImageSet,
        *,
        recall_at: Sequence[int],
        teachers: Collection[str] = (),
        keep: int = 10,
    ) -> Evaluation:
        """Evaluates each peer's (N, D) unit-length embeddings of the images, and their concatenations.

        Args:
            embeddings: of each peer, in peer order.
            images: the N images.
            recall_at: the values of K.
            teachers: the frozen peers.
            keep: how many neighbours of each query are kept.

        Raises:
            UserError: a label has no class name; see also :func:`~ray_dmml.evaluation.retrieval.retrieval_metrics`.
        """
        if images.labels.max() >= images.num_classes or images.labels.min() < 0:
            raise UserError(f"the images have labels beyond the {images.num_classes} classes that have names")
        of_all = dict(embeddings)
        taught = [vectors for name, vectors in embeddings.items() if name in teachers]
        if len(taught) > 1:
            of_all[TEACHERS] = ensemble_embedding(taught)
        if len(embeddings) > 1:
            of_all[ENSEMBLE] = ensemble_embedding(list(embeddings.values()))
        systems = {name: retrieve(vectors, images, recall_at=recall_at, keep=keep) for name, vectors in of_all.items()}
        return cls(images, of_all, systems, tuple(recall_at))

    @property
    def query_classes(self) -> np.ndarray:
        """(Q,) int64, the class of each query."""
        return self.images.labels[self.queries]

    @property
    def queries(self) -> Ints:
        """(Q,) int64, the indices of the queries, which are the same for all systems."""
        return next(iter(self.systems.values())).queries

    def summary(self) -> dict[str, Any]:
        """The figures as JSON data.

        ``peers``, ``ensemble`` and perhaps ``teachers_ensemble`` are means over queries. ``macro`` is the same as means
        over classes. ``intervals`` and ``macro_intervals`` are the ends of the 95 % interval of each. ``verification``
        has an entry for each system, see :func:`~ray_dmml.evaluation.verification.verification`. ``num_evaluated`` is
        the number of queries that have something to find. ``warnings`` are sentences.
        """
        # With more threads, BLAS waits longer for them than its small products take.
        with threadpool_limits(1, user_api="blas"):
            return self._summary()

    def _summary(self) -> dict[str, Any]:
        labels, classes = self.images.labels, self.query_classes
        values = {(name, key): each for name, system in self.systems.items() for key, each in system.values.items()}

        def intervals(*, macro: bool) -> Figures:
            found = class_bootstrap(values, classes, macro=macro)
            return nested(
                {
                    name: {key: list(found[name, key]) for key in system.values if (name, key) in found}
                    for name, system in self.systems.items()
                }
            )

        return {
            **nested({name: system.means() for name, system in self.systems.items()}),
            "macro": nested({name: system.macro_means(labels) for name, system in self.systems.items()}),
            "intervals": intervals(macro=False),
            "macro_intervals": intervals(macro=True),
            "verification": self.verification(),
            "num_evaluated": len(self.query_classes),
            "warnings": list(self.warnings()),
        }

    def verification(self) -> dict[str, dict[str, Any]]:
        """By system, whether a threshold on the similarity separates images of one class from those of two."""
        pairs = Pairs.of(self.images)
        return {name: verification(vectors, pairs) for name, vectors in self.embeddings.items()}

    def warnings(self) -> Iterator[str]:
        """A sentence for each sign that the figures say little."""
        for name, vectors in self.embeddings.items():
            if name not in (ENSEMBLE, TEACHERS):
                yield from warn_of_collapse(name, vectors, self.images.num_classes)
        yield from warn_of_small_gallery(self.images, self.recall_at)
        *_, last = self.systems.values()
        if (last.first_match == 1).all():
            yield (
                f"Recall@1 is 100 %: all {len(last.queries):,} queries are found, so nothing is left to measure; "
                "evaluate with more classes, or with classes that are harder to tell apart"
            )


def nested(by_system: Mapping[str, T]) -> dict[str, Any]:
    """What each system has, in the form of results: ``{"peers": {name: ...}, "ensemble": ...}``. One peer alone is its
    own ensemble."""
    peers = {name: each for name, each in by_system.items() if name not in (ENSEMBLE, TEACHERS)}
    ensemble = by_system[ENSEMBLE] if ENSEMBLE in by_system else next(iter(peers.values()))
    teachers = {TEACHERS: by_system[TEACHERS]} if TEACHERS in by_system else {}
    return {"peers": peers, **teachers, "ensemble": ensemble}


def warn_of_small_gallery(images: ImageSet, recall_at: Sequence[int]) -> Iterator[str]:
    """A sentence if a K of Recall@K is not below the number of images that a query is compared with, so that every
    query succeeds."""
    num = len(images) - 1 if images.gallery is None else len(images.gallery)
    if max(recall_at) >= num:
        yield (
            f"Recall@{max(recall_at)} says nothing where a query is compared with {num:,} images: every query has "
            "success; set evaluation.recall_at to lower values"
        )


def evaluate_during_training(
    embeddings: Mapping[str, Floats], images: ImageSet, recall_at: Sequence[int], *, keep: int = 0
) -> tuple[Figures, Retrieval]:
    """Recall@K, MAP@R and R-precision of each peer's (N, D) unit-length embeddings and of their concatenation; and, of
    several peers, which of them find a query, see :func:`agreement`. It does without the other metrics of
    :class:`Evaluation`.

    Returns:
        The figures, and what the ensemble retrieves, with ``keep`` neighbours of each query.
    """
    of_all = dict(embeddings)
    if len(embeddings) > 1:
        of_all[ENSEMBLE] = ensemble_embedding(list(embeddings.values()))
    systems = {
        name: retrieve(vectors, images, recall_at=recall_at, keep=keep, all_metrics=False)
        for name, vectors in of_all.items()
    }
    figures = nested({name: system.means() for name, system in systems.items()})
    if len(embeddings) > 1:
        figures["agreement"] = agreement({name: systems[name] for name in embeddings})
    *_, ensemble = systems.values()
    return figures, ensemble


def agreement(peers: Mapping[str, Retrieval]) -> dict[str, dict[str, float]]:
    """For each pair of peers, ``one/other``: the shares of the queries whose first image is right by ``both``, by
    ``only_first``, by ``only_second``, and by ``neither``."""
    is_found = {name: system.first_match == 1 for name, system in peers.items()}
    found = {}
    for (one, first), (other, second) in combinations(is_found.items(), 2):
        shares = (first & second, first & ~second, ~first & second, ~(first | second))
        found[f"{one}/{other}"] = {kind: float(share.mean()) for kind, share in zip(KINDS, shares, strict=True)}
    return found


def evaluate_vectors(vectors: Floats, images: ImageSet, recall_at: Sequence[int]) -> dict[str, float]:
    """Recall@K, MAP@R and R-precision of (N, D) unit-length vectors of the images."""
    return retrieve(vectors, images, recall_at=recall_at, keep=0, all_metrics=False).means()
