"""Figures by class and category, of subsets of the peers, and of clusters."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from retrieval_samples import unit

from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.errors import UserError
from ray_dmml.evaluation import details
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.evaluation.evaluation import Evaluation
from ray_dmml.evaluation.retrieval import retrieve

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])  # the last image has nothing to find
PEERS = {name: unit(10, 4, seed=seed) for seed, name in enumerate(("one", "two", "three"))}


@pytest.fixture(scope="module")
def images() -> ImageSet:
    categories = tuple("fruit" if label in (0, 2) else "" for label in LABELS)
    names = ("ape", "bee", "cat", "dog")
    return ImageSet(FileImages(Path(), map(str, range(10)), 8), LABELS, names, categories=categories)


@pytest.fixture(scope="module")
def evaluation(images: ImageSet) -> Evaluation:
    return Evaluation.of(PEERS, images, recall_at=[1, 2])


def test_classes_and_categories_are_means_over_their_queries(evaluation: Evaluation, images: ImageSet) -> None:
    """The worst first; a class without queries is left out; an image without a category is in the one of those."""
    classes, categories = details.by_class(evaluation), details.by_category(evaluation)
    assert {row["class"]: (row["category"], row["num_queries"]) for row in classes} == {
        "ape": ("fruit", 3), "bee": ("(none)", 2), "cat": ("fruit", 4),
    }  # fmt: skip
    assert {row["category"]: row["num_queries"] for row in categories} == {"fruit": 7, "(none)": 2}
    for rows, members in (
        (classes, {"ape": [0, 1, 2], "bee": [3, 4], "cat": [5, 6, 7, 8]}),
        (categories, {"fruit": [0, 1, 2, 5, 6, 7, 8], "(none)": [3, 4]}),
    ):
        order = [(row["ensemble"]["recall@1"], row["ensemble"]["map@r"]) for row in rows]
        assert order == sorted(order)
        for row in rows:
            its = members[row["class" if rows is classes else "category"]]
            for name in ("one", "ensemble"):
                found = row["ensemble"] if name == "ensemble" else row["peers"][name]
                values = evaluation.systems[name].values
                assert found == pytest.approx({metric: each[its].mean() for metric, each in values.items()})
    assert details.by_category(Evaluation.of(PEERS, replace(images, categories=None), recall_at=[1])) == []


def test_every_subset_of_the_peers(evaluation: Evaluation, images: ImageSet) -> None:
    """Each with the figures of its own ensemble."""
    rows = details.subsets(evaluation)
    wanted = [list(names) for size in (1, 2, 3) for names in combinations(PEERS, size)]
    assert [row["peers"] for row in rows] == wanted
    for row in rows:
        alone = retrieve(ensemble_embedding([PEERS[name] for name in row["peers"]]), images, recall_at=[1, 2])
        assert row["figures"] == pytest.approx(alone.means())
        assert list(row["intervals"]) == list(row["figures"])
    many = Evaluation.of({str(number): unit(10, 2, seed=number) for number in range(9)}, images, recall_at=[1])
    with pytest.raises(UserError, match="subsets of 9 peers are too many to evaluate; at most 8"):
        details.subsets(many)


def test_clusters_agree_with_classes() -> None:
    """Fully where the classes are far apart, and hardly where embeddings are random."""
    labels = np.arange(60) % 4
    apart = np.eye(4, 8, dtype=np.float32)[labels] + 0.01 * unit(60, 8)
    images = ImageSet(FileImages(Path(), map(str, range(60)), 8), labels, tuple("abcd"))
    found = details.clustering(Evaluation.of({"apart": apart, "mixed": unit(60, 8)}, images, recall_at=[1]))
    assert found["apart"] == pytest.approx({"nmi": 1, "ami": 1})
    assert found["mixed"]["ami"] < 0.3 and found["mixed"]["ami"] < found["mixed"]["nmi"]
