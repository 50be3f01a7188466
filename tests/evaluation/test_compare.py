"""Paired differences, against loops and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ray_dmml.evaluation.bootstrap import resamples
from ray_dmml.evaluation.compare import Values, compare_values, t_interval

NUM_CLASSES, NUM_RESAMPLES = 7, 200


@pytest.fixture
def classes() -> np.ndarray:
    """Of 40 queries, some of many and some of few."""
    return np.sort(np.random.default_rng(0).integers(0, NUM_CLASSES, 40) ** 2)


def runs(number: int, seed: int) -> list[Values]:
    rng = np.random.default_rng(seed)
    return [{"recall@1": rng.integers(0, 2, 40).astype(float), "mrr": rng.random(40)} for _ in range(number)]


@pytest.mark.parametrize("macro", [False, True])
@pytest.mark.parametrize("number", [1, 3])
def test_it_is_a_loop_over_resamples(number: int, macro: bool, classes: np.ndarray) -> None:
    """Of classes with all their queries, the same classes for both settings, and a t-test of the pairs of runs."""
    first, second = runs(number, 1), runs(number, 2)
    compared = compare_values(first, second, classes, macro=macro, num_resamples=NUM_RESAMPLES)
    names = np.unique(classes)

    def mean(values: np.ndarray, drawn: list[int]) -> float:
        parts = [values[classes == name] for name in drawn]
        return float(np.mean([part.mean() for part in parts]) if macro else np.concatenate(parts).mean())

    for metric in ("recall@1", "mrr"):
        one, other = (np.mean([run[metric] for run in each], axis=0) for each in (first, second))
        differences = []
        for times in np.concatenate(list(resamples(len(names), NUM_RESAMPLES, 0))):
            drawn = np.repeat(names, times.astype(int)).tolist()
            differences.append(mean(other, drawn) - mean(one, drawn))
        found = compared[metric]
        assert found.first == pytest.approx(mean(one, names.tolist()))
        assert found.difference == pytest.approx(mean(other, names.tolist()) - found.first)
        assert found.interval == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))
        if number == 1:
            assert found.seeds_interval is None
        else:
            pairs = [[mean(run[metric], names.tolist()) for run in each] for each in (second, first)]
            expected = stats.ttest_rel(*pairs).confidence_interval(0.95)
            assert found.seeds_interval == pytest.approx((expected.low, expected.high))


def test_runs_without_pairs_have_no_interval_over_seeds(classes: np.ndarray) -> None:
    found = compare_values(runs(3, 1), runs(4, 2), classes, is_paired=False, num_resamples=10)
    assert found["mrr"].seeds_interval is None and found["mrr"].interval is not None
    one_class = compare_values(runs(1, 1), runs(1, 2), np.zeros(40, int), num_resamples=10)
    assert one_class["mrr"].interval is None
    only_common = [{"recall@1": np.ones(40)}]
    assert list(compare_values(only_common, runs(1, 2), classes, num_resamples=10)) == ["recall@1"]


def test_few_pairs_have_no_interval() -> None:
    assert np.isnan(t_interval([])).all()
    mean, half = t_interval([0.25, 0.75])
    assert mean == 0.5 and np.isnan(half)
