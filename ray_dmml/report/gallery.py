"""What is found for which queries: the worst ones, those that peers disagree on, and classes that are confused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from ray_dmml.data.dataset import ImageSet
from ray_dmml.data.decoding import printable
from ray_dmml.evaluation.retrieval import Retrieval
from ray_dmml.report.data import Card, Classes, ClassRow, Confusion, Found, Group, Tile

NUM_WORST, NUM_DISAGREE, NUM_PAIRS, NUM_CONFUSED, NUM_CLASSES = 24, 12, 6, 12, 24
"""How many queries, pairs of peers, pairs of classes, and classes are shown."""

MAX_OF_A_CLASS = 2
"""Queries of one class in a group: of a class that fails as a whole, they all look alike."""

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Retrievals:
    """The evaluated images and what every system retrieves. All systems have the same queries."""

    images: ImageSet
    systems: Mapping[str, Retrieval]
    main: str
    """The system by which queries and classes are ordered: the ensemble, or the only peer."""

    num_tiles: int
    """Images that are shown for a query."""

    @property
    def queries(self) -> np.ndarray:
        """(Q,) int64"""
        return self.systems[self.main].queries

    @property
    def query_labels(self) -> np.ndarray:
        """(Q,) int64"""
        return self.images.labels[self.queries]

    def is_found(self, system: str) -> np.ndarray:
        """(Q,) bool: whether the nearest image is of the query's class."""
        return self.systems[system].first_match == 1

    def class_name(self, label: int) -> str:
        return printable(self.images.class_names[label])

    def tile(self, image: int, query_label: int | None = None, similarity: float | None = None) -> Tile:
        """An image; with the label of a query, as one that was found for it."""
        label = int(self.images.labels[image])
        is_right = None if query_label is None else label == query_label
        name = printable(self.images.source.name(image))
        return Tile(image, self.class_name(label), name, is_right, similarity)

    def card(self, position: int) -> Card:
        """The query at this position, and what every system finds."""
        query = int(self.queries[position])
        label = int(self.images.labels[query])
        found = []
        for name, system in self.systems.items():
            row = zip(system.neighbors[position, : self.num_tiles], system.similarities[position], strict=False)
            tiles = tuple(self.tile(int(image), label, float(similarity)) for image, similarity in row if image >= 0)
            rank = int(system.first_match[position])
            outcome = (
                "found" if rank == 1 else f"first right image at rank {rank:,}" if rank else "no right image found"
            )
            found.append(Found(name, outcome, rank == 1, tiles))
        return Card(self.tile(query), int(self.systems[self.main].num_relevant[position]), tuple(found))


def worst_queries(retrievals: Retrievals) -> Group:
    """The queries for which the first right image comes last, and of equal ones those with the fewest right images."""
    system = retrievals.systems[retrievals.main]
    missed = np.flatnonzero(~retrievals.is_found(retrievals.main))
    order = missed[
        np.lexsort((-system.similarities[missed, 0], system.values["map@r"][missed], -_rank(system)[missed]))
    ]
    chosen = _few_of_a_class(order, retrievals.query_labels, NUM_WORST)
    note = (
        f"{len(missed):,} of {len(retrievals.queries):,} queries have an image of another class first. The worst come "
        f"first: those whose first right image has the highest rank. At most {MAX_OF_A_CLASS} of a class are shown."
    )
    return Group("worst", f"Worst queries of {the(retrievals.main)}", note, tuple(map(retrievals.card, chosen)))


def disagreements(retrievals: Retrievals, peers: Sequence[str]) -> tuple[Group, ...]:
    """For each pair of peers, the queries that the one finds and the other does not."""
    groups: list[tuple[int, Group]] = []
    for one, other in permutations(peers, 2):
        theirs = np.flatnonzero(retrievals.is_found(one) & ~retrievals.is_found(other))
        if len(theirs):
            system = retrievals.systems[other]
            order = theirs[np.lexsort((system.values["map@r"][theirs], -_rank(system)[theirs]))]
            chosen = _few_of_a_class(order, retrievals.query_labels, NUM_DISAGREE)
            note = (
                f"{len(theirs):,} of {len(retrievals.queries):,} queries; those that {other} misses by most come first."
            )
            title = f"{one} finds, {other} does not"
            groups.append((len(theirs), Group(f"only-{len(groups)}", title, note, tuple(map(retrievals.card, chosen)))))
    most = sorted(groups, key=lambda group: -group[0])[:NUM_PAIRS]
    return tuple(group for _, group in sorted(most, key=lambda group: group[1].key))


def confusions(retrievals: Retrievals) -> tuple[Confusion, ...]:
    """The pairs of classes that are most often taken for each other by the main system."""
    system = retrievals.systems[retrievals.main]
    wrong = np.flatnonzero(~retrievals.is_found(retrievals.main))
    of, taken_for = retrievals.query_labels[wrong], retrievals.images.labels[system.neighbors[wrong, 0]]
    num_queries = np.bincount(retrievals.query_labels, minlength=retrievals.images.num_classes)
    pairs = np.sort(np.stack([of, taken_for], axis=1), axis=1)
    distinct, which, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    which = which.reshape(-1)
    found = []
    for number in np.lexsort((distinct[:, 0], -counts))[:NUM_CONFUSED]:
        first, second = (int(label) for label in distinct[number])
        inside = wrong[which == number]
        inside = inside[np.argsort(-system.similarities[inside, 0], kind="stable")]
        is_first = retrievals.query_labels[inside] == first
        num_first = int(is_first.sum())
        examples = tuple(_example(retrievals, int(position)) for position in inside[:NUM_EXAMPLES])
        if num_first < len(inside) - num_first:  # the class that is mistaken more often comes first
            first, second, num_first = second, first, len(inside) - num_first
        found.append(
            Confusion(
                (retrievals.class_name(first), retrievals.class_name(second)),
                (num_first, len(inside) - num_first),
                (int(num_queries[first]), int(num_queries[second])),
                examples,
            )
        )
    return tuple(found)


def worst_classes(retrievals: Retrievals) -> Classes:
    """Recall@1 of the classes, the worst first."""
    labels, num_classes = retrievals.query_labels, retrievals.images.num_classes
    num_queries = np.bincount(labels, minlength=num_classes)
    recalls = {
        name: np.bincount(labels, retrievals.is_found(name), num_classes) / np.maximum(num_queries, 1)
        for name in retrievals.systems
    }
    main, system = recalls[retrievals.main], retrievals.systems[retrievals.main]
    there = np.flatnonzero(num_queries)
    order = there[np.lexsort((there, -num_queries[there], main[there]))]
    perfect = int((main[there] == 1).sum())
    rows = []
    for label in order[:NUM_CLASSES]:
        if main[label] == 1:
            break
        positions = np.flatnonzero((labels == label) & ~retrievals.is_found(retrievals.main))
        others, counts = np.unique(retrievals.images.labels[system.neighbors[positions, 0]], return_counts=True)
        instead = f"{retrievals.class_name(int(others[counts.argmax()]))} ({counts.max()})"
        rows.append(
            ClassRow(
                retrievals.class_name(int(label)),
                int(num_queries[label]),
                tuple(float(of[label]) for of in recalls.values()),
                instead,
                tuple(retrievals.tile(int(retrievals.queries[position])) for position in positions[:NUM_EXAMPLES]),
            )
        )
    note = (
        f"{len(there):,} classes have queries. In {perfect:,} of them {the(retrievals.main)} finds every query. "
        "A class of few queries can easily be the worst: look at the number of queries."
    )
    return Classes(tuple(retrievals.systems), tuple(rows), note)


def the(system: str) -> str:
    """A system in a sentence."""
    return "the ensemble" if system == "ensemble" else system


def _example(retrievals: Retrievals, position: int) -> tuple[Tile, Tile]:
    system, query = retrievals.systems[retrievals.main], int(retrievals.queries[position])
    label, nearest = int(retrievals.images.labels[query]), int(system.neighbors[position, 0])
    return retrievals.tile(query), retrievals.tile(nearest, label, float(system.similarities[position, 0]))


def _rank(system: Retrieval) -> np.ndarray:
    """(Q,) rank of the first right image; infinite where the search has not reached one."""
    return np.where(system.first_match > 0, system.first_match, np.inf)


def _few_of_a_class(order: np.ndarray, labels: np.ndarray, number: int) -> list[int]:
    """The first positions of an order, without more than a few of one class."""
    chosen: list[int] = []
    counts: dict[int, int] = {}
    for position in order.tolist():
        label = int(labels[position])
        if counts.get(label, 0) < MAX_OF_A_CLASS:
            counts[label] = counts.get(label, 0) + 1
            chosen.append(position)
            if len(chosen) == number:
                break
    return chosen
