"""Figures of rows, and their intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from ray_dmml.evaluation.compare import t_interval

Seeds = Mapping[int, Mapping[str, Any]]
"""The rows of one arm, by seed."""

Value = Callable[[Mapping[str, Any]], float]
"""A figure of a row, in percent."""


def rounded(figures: Mapping[str, float], metrics: Collection[str] = ("recall@1", "map@r")) -> dict[str, float]:
    """What a row keeps of the figures of a peer or an ensemble."""
    return {metric: round(figures[metric], 5) for metric in metrics}


def paired(arm: Seeds, baseline: Seeds, value: Value, of_baseline: Value | None = None) -> tuple[float, float]:
    """The mean of ``arm`` minus ``baseline`` over the seeds that both have, and half the width of the 95 % interval of
    a paired t-test. The mean is NaN without such a seed, the interval below three seeds. ``of_baseline`` is another
    value, which the baseline is compared by."""
    of_baseline = of_baseline or value
    return t_interval([value(row) - of_baseline(baseline[seed]) for seed, row in arm.items() if seed in baseline])


def points(mean: float, half: float) -> str:
    """A difference in points, with its interval if there is one."""
    interval = "" if np.isnan(half) else f" [{mean - half:+.1f}, {mean + half:+.1f}]"
    return "-" if np.isnan(mean) else f"{mean:+.1f}{interval}"
