"""The evaluation of a whole cohort: its systems, and the form of their figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from retrieval_samples import unit
from threadpoolctl import threadpool_limits

from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.errors import UserError
from ray_dmml.evaluation.bootstrap import class_bootstrap
from ray_dmml.evaluation.ensemble import ensemble_embedding
from ray_dmml.evaluation.evaluation import Evaluation, evaluate_during_training
from ray_dmml.evaluation.retrieval import retrieve


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """40 images of 8 classes of different sizes."""
    labels = np.sort(np.append(np.arange(8).repeat(2), np.random.default_rng(0).integers(0, 8, 24)))
    return ImageSet(FileImages(Path(), map(str, range(40)), 8), labels, tuple("abcdefgh"))


def test_systems_are_the_peers_and_their_ensembles(images: ImageSet) -> None:
    """Each with the figures of its own embeddings; the ensemble of the teachers if there are several."""
    peers = {"one": unit(40, 6), "two": unit(40, 5, seed=1), "three": unit(40, 4, seed=2)}
    evaluation = Evaluation.of(peers, images, recall_at=[1, 4], teachers=["one", "three"], keep=3)
    assert list(evaluation.systems) == list(evaluation.embeddings) == [*peers, "teachers_ensemble", "ensemble"]
    wanted = {
        **peers,
        "teachers_ensemble": ensemble_embedding([peers["one"], peers["three"]]),
        "ensemble": ensemble_embedding(list(peers.values())),
    }
    assert "teachers_ensemble" not in Evaluation.of(peers, images, recall_at=[1], teachers=["one"]).systems
    summary = evaluation.summary()
    assert list(summary["peers"]) == list(peers)
    for name, vectors in wanted.items():
        alone = retrieve(vectors, images, recall_at=[1, 4], keep=3)
        assert (evaluation.embeddings[name] == vectors).all()
        assert (evaluation.systems[name].neighbors == alone.neighbors).all() and alone.neighbors.shape == (40, 3)
        for key, figures in (
            (None, alone.means()),
            ("macro", alone.macro_means(images.labels)),
            ("intervals", class_bootstrap(alone.values, images.labels)),
            ("macro_intervals", class_bootstrap(alone.values, images.labels, macro=True)),
        ):
            of = summary if key is None else summary[key]
            found = of["peers"][name] if name in peers else of[name]
            assert list(found) == list(figures)
            assert found == {metric: pytest.approx(each) for metric, each in figures.items()}


def test_what_says_little_is_named(images: ImageSet) -> None:
    """A K as large as the rest of the gallery, queries that succeed, collapsed embeddings; labels without a class."""
    good = np.eye(8, 20, dtype=np.float32)[images.labels] + 0.01 * unit(40, 20)
    good /= np.linalg.norm(good, axis=1, keepdims=True)
    constant = np.eye(1, 20, dtype=np.float32) + 0.01 * unit(40, 20)
    constant /= np.linalg.norm(constant, axis=1, keepdims=True)
    assert not list(Evaluation.of({"a": unit(40, 20)}, images, recall_at=[1, 38]).warnings())
    evaluation = Evaluation.of({"flat": constant, "good": good}, images, recall_at=[1, 39])
    assert [text.split(":")[0] for text in evaluation.warnings()] == [
        "the embeddings of flat seem to have collapsed",
        "Recall@39 says nothing where a query is compared with 39 images",
        "Recall@1 is 100 %",
    ]
    assert evaluation.summary()["warnings"] == list(evaluation.warnings())
    with pytest.raises(UserError, match="labels beyond the 3 classes that have names"):
        Evaluation.of({"a": good}, replace(images, class_names=tuple("abc")), recall_at=[1])


def test_figures_do_not_depend_on_the_threads_of_blas(images: ImageSet) -> None:
    """To the last bit."""
    evaluation = Evaluation.of({"solo": unit(40, 600)}, images, recall_at=[1])
    summaries = []
    for number in (1, 2):
        with threadpool_limits(number, user_api="blas"):
            summaries.append(evaluation.summary())
    assert summaries[0] == summaries[1]


def test_one_peer_is_its_own_ensemble(images: ImageSet) -> None:
    """It is not searched a second time, and is both rows of the results."""
    evaluation = Evaluation.of({"solo": unit(40, 6)}, images, recall_at=[1])
    assert list(evaluation.systems) == ["solo"]
    summary = evaluation.summary()
    assert summary["peers"] == {"solo": summary["ensemble"]}
    assert summary["intervals"]["peers"] == {"solo": summary["intervals"]["ensemble"]}


def test_figures_during_training_are_those_of_the_whole_evaluation(images: ImageSet) -> None:
    """They are the first ones of it, to the bit."""
    peers = {"one": unit(40, 6), "two": unit(40, 5, seed=1)}
    short, _ = evaluate_during_training(peers, images, [1, 2])
    whole = Evaluation.of(peers, images, recall_at=[2]).summary()
    assert list(short) == ["peers", "ensemble", "agreement"]
    found = [
        system.first_match == 1 for system in list(Evaluation.of(peers, images, recall_at=[2]).systems.values())[:2]
    ]
    shares = [np.mean(found[0] & found[1]), np.mean(found[0] > found[1]), np.mean(found[1] > found[0])]
    assert list(short["agreement"]["one/two"].values()) == [*shares, 1 - np.mean(found[0] | found[1])]
    for found, all_of_it in ((short["ensemble"], whole["ensemble"]), (short["peers"]["two"], whole["peers"]["two"])):
        assert list(found) == ["recall@1", "recall@2", "map@r", "r_precision"] == list(all_of_it)[:4]
        assert found == {metric: all_of_it[metric] for metric in found}
