"""Verification against scikit-learn, and its intervals against a bootstrap pair by pair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_samples import grid, unit
from sklearn.metrics import roc_auc_score, roc_curve

from ray_dmml.data.dataset import FileImages, ImageSet
from ray_dmml.evaluation.bootstrap import resamples
from ray_dmml.evaluation.verification import FMRS, Pairs, verification


def image_set(labels: np.ndarray, **more: np.ndarray) -> ImageSet:
    names = tuple(map(str, range(labels.max() + 1)))
    return ImageSet(FileImages(Path(), map(str, range(len(labels))), 8), labels, names, **more)


def clustered(num: int, num_classes: int, strength: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """(N, 16) embeddings around the centres of their classes, and (N,) labels."""
    labels = np.arange(num) % num_classes
    x = unit(num, 16) + strength * unit(num_classes, 16, seed=1)[labels]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


def naive_pairs(x: np.ndarray, images: ImageSet) -> list[tuple[float, bool, int, int]]:
    """Similarity, whether it is of one class, and both classes, of each query with each gallery image."""
    everything = range(len(images))
    exclude = list(everything) if images.exclude is None else images.exclude.tolist()
    return [
        (float(x[q] @ x[g]), bool(images.labels[q] == images.labels[g]), int(images.labels[q]), int(images.labels[g]))
        for q in (everything if images.query is None else images.query.tolist())
        for g in (everything if images.gallery is None else images.gallery.tolist())
        if exclude[q] != exclude[g]
    ]


def assert_equals_scikit_learn(x: np.ndarray, images: ImageSet) -> None:
    pairs = naive_pairs(x, images)
    scores, is_same = [each[0] for each in pairs], [each[1] for each in pairs]
    found = verification(x, Pairs.of(images), num_resamples=20)
    if len(set(is_same)) < 2:
        assert found == {}
        return
    assert (found["num_positive_pairs"], found["num_negative_pairs"]) == (sum(is_same), len(pairs) - sum(is_same))
    assert found["all_pairs"]
    assert found["roc_auc"] == pytest.approx(roc_auc_score(is_same, scores), abs=1e-6)
    fprs, tprs, _ = roc_curve(is_same, scores, drop_intermediate=False)
    for fmr in FMRS:
        assert found[f"fnmr@{fmr:g}"] == pytest.approx(1 - tprs[fprs <= fmr].max(), abs=1e-6)
        matches = np.array(scores) > found[f"threshold@{fmr:g}"]
        assert np.mean(matches[~np.array(is_same)]) <= fmr
        assert np.mean(~matches[np.array(is_same)]) == pytest.approx(found[f"fnmr@{fmr:g}"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), num=st.integers(4, 40), subset=st.booleans(), bursts=st.booleans())
def test_figures_equal_scikit_learns(seed: int, num: int, subset: bool, bursts: bool) -> None:
    """With many ties, queries against a gallery, classes of one image, and images that exclude each other."""
    rng = np.random.default_rng(seed)
    _, labels = np.unique(rng.integers(0, 6, num), return_inverse=True)
    more = {}
    if subset:
        more = {key: rng.permutation(num)[: rng.integers(1, num + 1)] for key in ("query", "gallery")}
    if bursts:
        more["exclude"] = rng.integers(0, num, num)
    assert_equals_scikit_learn(grid(num, 3, seed), image_set(labels, **more))


def test_figures_of_real_values_equal_scikit_learns() -> None:
    """At a size where an FMR of 0.001 is of many pairs."""
    x, labels = clustered(120, 15)
    assert_equals_scikit_learn(x, image_set(labels))


def naive_intervals(x: np.ndarray, images: ImageSet, num: int, seed: int) -> dict[str, np.ndarray]:
    """Of each resample: weights of all pairs, one after the other."""
    pairs = naive_pairs(x, images)
    scores, is_same = np.array([each[0] for each in pairs], np.float32), np.array([each[1] for each in pairs])
    samples: dict[str, list[float]] = {}
    for times in np.concatenate(list(resamples(images.num_classes, num, seed))):
        weights = np.array([times[a] if same else times[a] * times[b] for _, same, a, b in pairs])
        samples.setdefault("roc_auc", []).append(roc_auc_score(is_same, scores, sample_weight=weights))
        for fmr in FMRS:
            allowed = fmr * weights[~is_same].sum()
            threshold = next(
                t for t in np.sort(scores[~is_same])[::-1] if weights[~is_same & (scores >= t)].sum() > allowed
            )
            missed = weights[is_same & (scores <= threshold)].sum() / weights[is_same].sum()
            samples.setdefault(f"threshold@{fmr:g}", []).append(float(threshold))
            samples.setdefault(f"fnmr@{fmr:g}", []).append(missed)
    return {key: np.percentile(each, [2.5, 97.5]) for key, each in samples.items()}


def test_intervals_equal_the_loops() -> None:
    """Those of the AUC to first order, for which the resamples must not differ too much."""
    x, labels = clustered(60, 20)
    images = image_set(labels)
    found, wanted = verification(x, Pairs.of(images), num_resamples=40), naive_intervals(x, images, 40, 0)
    for key, (low, high) in found["intervals"].items():
        assert low <= found[key] <= high
        assert (low, high) == pytest.approx(wanted[key], abs=0.01 if key == "roc_auc" else 1e-6)


def test_intervals_with_ties_equal_the_loops() -> None:
    """A pair of one class that is as similar as the threshold is no match."""
    labels = np.arange(60) % 12
    x = grid(60, 3) + grid(12, 3, seed=1)[labels]
    images = image_set(labels)
    found, wanted = verification(x, Pairs.of(images), num_resamples=40), naive_intervals(x, images, 40, 0)
    for key in (f"{kind}@{fmr:g}" for kind in ("fnmr", "threshold") for fmr in FMRS):
        assert found["intervals"][key] == pytest.approx(wanted[key].tolist(), abs=1e-6)


def test_the_interval_of_the_auc_has_the_width_of_the_loops() -> None:
    """Also where it is the pairs of two classes that differ: 6 of the 30 classes are nearly the same."""
    labels, centres = np.arange(90) % 30, unit(30, 16, seed=1)
    centres[:6] = centres[0] + 0.1 * centres[:6]
    x = (centres[labels] + 0.25 * unit(90, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    images = image_set(labels)
    low, high = verification(x, Pairs.of(images), num_resamples=40)["intervals"]["roc_auc"]
    wanted = naive_intervals(x, images, 40, 0)["roc_auc"]
    assert high - low == pytest.approx(wanted[1] - wanted[0], rel=0.15)


def test_intervals_of_few_classes_that_are_alike() -> None:
    """The most similar pairs are all of two classes, which most of the resamples lack: their thresholds are lower."""
    labels = np.repeat(np.arange(5), 200)
    centres = np.eye(5, 16)
    centres[1] = 0.9 * centres[0] + 0.3 * centres[1]
    x = (centres[labels] + 0.2 * unit(1000, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = verification(x, Pairs.of(image_set(labels)), num_resamples=30)["intervals"]
    ones, others = np.nonzero(labels[:, None] != labels)
    similarities = (x @ x.T)[ones, others]
    order = np.argsort(-similarities)
    samples = []
    for times in np.concatenate(list(resamples(5, 30, 0))):
        counts = np.cumsum((times[labels[ones]] * times[labels[others]])[order])
        samples += [similarities[order[np.searchsorted(counts, 0.01 * counts[-1], side="right")]]] if counts[-1] else []
    assert found["threshold@0.01"] == pytest.approx(np.percentile(samples, [2.5, 97.5]).tolist(), abs=0.01)
    assert found["threshold@0.01"][0] < 0.5 < found["threshold@0.01"][1]


def test_drawn_pairs_give_nearly_the_same_figures() -> None:
    """A part of the pairs of both kinds, each a pair, and the same ones again from a seed."""
    x, labels = clustered(400, 20)
    images = image_set(labels)
    whole = verification(x, Pairs.of(images))
    pairs = Pairs.of(images, max_positives=3000, max_negatives=40_000)
    ones, others = pairs.positives
    assert (labels[ones] == labels[others]).all() and (ones != others).all()
    part = verification(x, pairs)
    assert whole["all_pairs"] and not part["all_pairs"]
    assert 2000 < part["num_positive_pairs"] <= 3000 and 30_000 < part["num_negative_pairs"] < 50_000
    for key, value in whole.items():
        if isinstance(value, float):
            assert part[key] == pytest.approx(value, abs=0.05)
            ours, theirs = part["intervals"][key], whole["intervals"][key]
            assert ours[1] - ours[0] == pytest.approx(theirs[1] - theirs[0], rel=0.6)
    assert part == verification(x, Pairs.of(images, max_positives=3000, max_negatives=40_000))
    assert not Pairs.of(images, max_positives=3000).is_complete


def test_pairs_of_one_kind_only_have_no_figures() -> None:
    """One class, or no class with two images. Two classes have figures but no intervals."""
    found = verification(unit(6, 8), Pairs.of(image_set(np.arange(6) // 3)))
    assert found["num_negative_pairs"] == 18 and found["intervals"] == {}
    for labels in (np.zeros(4, np.int64), np.arange(4)):
        assert verification(unit(4, 8), Pairs.of(image_set(labels))) == {}
    images = replace(image_set(np.arange(4) // 2), exclude=np.arange(4) // 2)
    assert verification(unit(4, 8), Pairs.of(images)) == {}
