"""Paired differences between two settings that are evaluated on the same queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ray_dmml.evaluation.bootstrap import NUM_RESAMPLES, Interval, paired
from ray_dmml.evaluation.neighbors import Ints
from ray_dmml.evaluation.retrieval import means_by

MIN_SEEDS = 3
"""Fewest seeds for an interval over seeds: two that agree by chance would look certain."""

Values = Mapping[str, NDArray[np.float64]]
"""(Q,) values of the queries by metric, such as ``recall@1``."""


class Difference(NamedTuple):
    """A metric of two settings, as fractions."""

    first: float
    second: float
    difference: float
    """``second - first``"""
    interval: Interval | None
    """95 % interval of the difference by bootstrap over the classes: what it might be on other classes. None if there
    is only one class."""
    seeds_interval: Interval | None
    """95 % interval by Student's t over the pairs of seeds: what it might be with other seeds. None below MIN_SEEDS."""


def compare_values(
    first: Sequence[Values],
    second: Sequence[Values],
    classes: Ints,
    *,
    is_paired: bool = True,
    macro: bool = False,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Difference]:
    """Compares two settings, each of them with one run or with several, by every metric that all of them have.

    Each resample of the bootstrap draws the same classes for both settings.

    Args:
        first, second: the values of each run.
        classes: (Q,) int64, the class of each query.
        is_paired: the runs at the same position are a pair, such as runs with the same seed. Otherwise there is no
            interval over seeds.
        macro: compare means over classes of the means of their queries, instead of means over queries.
        num_resamples: of the bootstrap.
    """
    metrics = [name for name in first[0] if all(name in run for run in (*first, *second))]
    of_first, of_second = (
        {name: np.mean([run[name] for run in runs], axis=0) for name in metrics} for runs in (first, second)
    )
    intervals = paired(of_second, of_first, classes, macro=macro, num_resamples=num_resamples)
    means_first, means_second = (
        [_means({name: run[name] for name in metrics}, classes, macro) for run in runs] for runs in (first, second)
    )
    compared = {}
    for name in metrics:
        one, other = [run[name] for run in means_first], [run[name] for run in means_second]
        of_seeds = None
        if is_paired and len(one) >= MIN_SEEDS:
            mean, half = t_interval(np.subtract(other, one).tolist())
            of_seeds = (mean - half, mean + half)
        averages = float(np.mean(one)), float(np.mean(other))
        difference = averages[1] - averages[0]
        compared[name] = Difference(*averages, difference, intervals.get(name), of_seeds)
    return compared


def _means(values: Values, classes: Ints, macro: bool) -> dict[str, float]:
    if macro:
        return {name: float(means.mean()) for name, means in means_by(classes, values)[2].items()}
    return {name: float(each.mean()) for name, each in values.items()}


def t_interval(differences: Sequence[float]) -> tuple[float, float]:
    """The mean of paired differences, and half the width of the 95 % interval of a paired t-test: NaN below
    MIN_SEEDS."""
    mean, half = float(np.mean(differences)) if differences else float("nan"), float("nan")
    if len(differences) >= MIN_SEEDS:
        half = float(stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences))
    return mean, half
