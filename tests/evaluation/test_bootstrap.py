"""Intervals by bootstrap over classes, against loops and against what is known of normal values."""

from __future__ import annotations

import numpy as np
import pytest

from ray_dmml.evaluation.bootstrap import class_bootstrap, paired, resamples


def naive_means(values: np.ndarray, classes: np.ndarray, macro: bool, num: int, seed: int) -> list[float]:
    """The mean of each resample, from the queries of the classes that it has, one after the other."""
    names, means = np.unique(classes), []
    for times in np.concatenate(list(resamples(len(names), num, seed))).astype(int):
        drawn = [values[classes == names[c]] for c in range(len(names)) for _ in range(times[c])]
        means.append(np.mean([each.mean() for each in drawn]) if macro else np.concatenate(drawn).mean())
    return means


@pytest.mark.parametrize("macro", [False, True])
def test_intervals_equal_the_loops(macro: bool) -> None:
    """Several metrics, classes of different sizes with any numbers."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 9, 60) * 5
    values = {"a": rng.random(60), "b": (rng.random(60) > 0.3).astype(float)}
    found = class_bootstrap(values, classes, macro=macro, num_resamples=50, seed=3)
    for metric, each in values.items():
        wanted = np.percentile(naive_means(each, classes, macro, 50, 3), [2.5, 97.5])
        assert found[metric] == pytest.approx(tuple(wanted))


@pytest.mark.parametrize("num_classes", [3, 3000])
def test_a_resample_has_as_many_classes(num_classes: int) -> None:
    """Each class is expected once, in whole numbers; a seed gives the same resamples again, in blocks of any size."""
    blocks = list(resamples(num_classes, 2000, 0))
    assert (len(blocks) > 1) == (num_classes == 3000)
    times = np.concatenate(blocks)
    assert times.shape == (2000, num_classes) and (times.sum(axis=1) == num_classes).all() and (times >= 0).all()
    assert times.mean(axis=0) == pytest.approx(np.ones(num_classes), abs=0.15)
    assert times.var(axis=0) == pytest.approx(np.full(num_classes, 1 - 1 / num_classes), abs=0.25)
    assert (np.concatenate(list(resamples(num_classes, 2000, 0))) == times).all()
    assert num_classes == 3 or len({row.tobytes() for row in times}) == 2000  # no block repeats another one


def test_an_interval_has_the_width_of_the_classes_not_of_the_queries() -> None:
    """100 queries of a class that are all alike are worth one. The known interval is 1.96 standard errors."""
    of_class = np.random.default_rng(0).standard_normal(400)
    values, classes = {"m": np.repeat(of_class, 100)}, np.repeat(np.arange(400), 100)
    low, high = class_bootstrap(values, classes)["m"]
    assert high - low == pytest.approx(2 * 1.96 * of_class.std() / 20, rel=0.1)
    assert (low + high) / 2 == pytest.approx(of_class.mean(), abs=0.02)


def test_paired_differences_cancel_what_is_hard_for_both() -> None:
    """A small difference is certain although each system's own interval is wide; a metric of one system is left out."""
    rng = np.random.default_rng(0)
    classes = np.arange(300) // 3
    hard = rng.random(100)[classes]
    a, b = {"m": hard + 0.01 * rng.random(300), "only": hard}, {"m": hard}
    [(metric, (low, high))] = paired(a, b, classes).items()
    assert metric == "m" and 0.003 < low < high < 0.007
    alone = class_bootstrap(a, classes)["m"]
    assert alone[1] - alone[0] > 10 * (high - low)
    assert paired(b, b, classes, macro=True) == {"m": (0, 0)}


def test_one_class_has_no_interval() -> None:
    assert class_bootstrap({"m": np.ones(5)}, np.zeros(5, np.int64)) == {}
