"""The curves of a run, from the rows of metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_dmml.config.schema import Config
from ray_dmml.evaluation.evaluation import ENSEMBLE
from ray_dmml.loggers.figures import heading
from ray_dmml.report.data import Chart, Line, Mark

MAX_POINTS = 60
"""Of a line. Where there are more steps, a point is the mean of several."""

NOT_LOSSES = ("skipped_nonfinite",)


@dataclass(frozen=True)
class Metrics:
    """What metrics.jsonl says of a run."""

    losses: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
    """Term, then peer, to (step, value)."""

    validation: Sequence[tuple[int, Mapping[str, Mapping[str, float]]]]
    """(step, figures by peer and ``ensemble``). With a single peer there is no ensemble."""

    agreement: Sequence[tuple[int, Mapping[str, Mapping[str, float]]]]
    """(step, ...) if it was logged, see :mod:`~ray_dmml.report.agreement`."""

    num_steps: int
    skipped: Mapping[str, int]
    """Batches that a peer has left out because their values were not finite."""

    num_damaged: int
    """Lines that cannot be read."""


def read_metrics(path: Path) -> Metrics:
    """Reads the file of a run that may be going on: its last line may be half written."""
    losses: dict[str, dict[str, list[tuple[int, float]]]] = {}
    validation: list[tuple[int, dict[str, Any]]] = []
    agreement: list[tuple[int, dict[str, Any]]] = []
    skipped: dict[str, int] = {}
    num_steps = num_damaged = 0
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = [b""]
    for line in lines[:-1]:
        try:
            row = json.loads(line)
            step = int(row["step"])
            for name, terms in row.get("peers", {}).items():
                for term, value in terms.items():
                    if term in NOT_LOSSES:
                        skipped[name] = skipped.get(name, 0) + 1
                    elif math.isfinite(value):
                        losses.setdefault(term, {}).setdefault(name, []).append((step, value))
            if "validation" in row:
                figures = dict(row["validation"]["peers"])
                if len(figures) > 1:
                    figures[ENSEMBLE] = row["validation"]["ensemble"]
                validation.append((step, figures))
                if "agreement" in row["validation"]:
                    agreement.append((step, row["validation"]["agreement"]))
            num_steps = max(num_steps, step)
        except (ValueError, KeyError, TypeError, AttributeError):
            num_damaged += 1
    return Metrics(losses, validation, agreement, num_steps, skipped, num_damaged)


@dataclass(frozen=True)
class Best:
    """The best validation Recall@1."""

    step: int
    value: float
    of: str
    num_later: int
    """Evaluations after it, none of which was better."""


def best_validation(metrics: Metrics, config: Config) -> Best | None:
    """The evaluation that the best checkpoint is of, as `train.monitor` says; None: there was none."""
    best: tuple[int, float] | None = None
    num_later = 0
    learners = config.cohort.learners
    for step, figures in metrics.validation:
        rows = [row for name, row in figures.items() if name == ENSEMBLE] or list(figures.values())
        if config.train.monitor == "mean_peer":
            rows = [row for name, row in figures.items() if name in learners]
        value = float(np.mean([row["recall@1"] for row in rows]))
        if best is None or value > best[1]:
            best, num_later = (step, value), 0
        else:
            num_later += 1
    if best is None:
        return None
    of = "mean of the peers" if config.train.monitor == "mean_peer" else ENSEMBLE
    names = list(metrics.validation[0][1])
    return Best(*best, names[0] if len(names) == 1 else of, num_later)


def describe_best(best: Best, name: str = "") -> str:
    """At which step validation stopped improving, in a sentence."""
    of = f"{name}: validation" if name else "Validation"
    start = f"{of} Recall@1 ({best.of}) was best at step {best.step:,}: {100 * best.value:.1f} %."
    if best.num_later == 0:
        return f"{start} That is the last evaluation, so more steps may still help."
    if best.num_later == 1:
        return f"{start} The evaluation after it was not better."
    return f"{start} The {best.num_later} evaluations after it were not better."


@dataclass(frozen=True)
class NamedMetrics:
    """The metrics of a run of several, with what its lines are called."""

    prefix: str
    metrics: Metrics
    best: Best | None


def validation_charts(runs: Sequence[NamedMetrics]) -> tuple[Chart, ...]:
    """A chart for Recall@1, MAP@R, and then the other metrics of the validation classes."""
    found = [name for run in runs for _, rows in run.metrics.validation for row in rows.values() for name in row]
    first = ["recall@1", "map@r"]
    names = [name for name in first if name in found] + [name for name in dict.fromkeys(found) if name not in first]
    charts = []
    for metric in names:
        lines: list[Line] = []
        for run in runs:
            series: dict[str, list[tuple[float, float]]] = {}
            for step, rows in run.metrics.validation:
                for name, row in rows.items():
                    if metric in row:
                        series.setdefault(name, []).append((step, 100 * row[metric]))
            lines += _lines(run.prefix, series, len(lines))
        marks = []
        for run in runs:
            if run.best is not None and metric == "recall@1":
                marks.append(Mark(run.best.step, 100 * run.best.value, f"{run.prefix}best: step {run.best.step:,}"))
        charts.append(
            Chart(
                f"validation-{metric.replace('@', '-')}",
                f"Validation {heading(metric).replace('R@', 'Recall@')}",
                "",
                "%",
                tuple(lines),
                tuple(marks),
            )
        )
    return tuple(charts)


def loss_charts(runs: Sequence[NamedMetrics], config: Config) -> tuple[Chart, ...]:
    """A chart for the loss and one for each of its terms."""
    terms = list(dict.fromkeys(term for run in runs for term in run.metrics.losses))
    notes = {
        "loss": "the sum of the weighted terms, which is minimised",
        "metric": f"{config.loss.metric.name}, of the peer alone",
    }
    charts = []
    for term in terms:
        lines: list[Line] = []
        for run in runs:
            for name, points in run.metrics.losses.get(term, {}).items():
                lines.append(_mean_line(f"{run.prefix}{name}", len(lines), points))
        note = notes.get(term, "a mutual term, before its weight")
        title = {"loss": "Loss", "metric": "Metric loss"}.get(term, term.replace("_", " ").capitalize())
        charts.append(Chart(f"loss-{term}", title, note, "", tuple(lines)))
    return tuple(charts)


def _lines(prefix: str, series: Mapping[str, list[tuple[float, float]]], num_before: int) -> list[Line]:
    lines: list[Line] = []
    for name, points in series.items():
        # Of several runs, each line has a style of its own.
        is_ensemble = name == ENSEMBLE and not prefix
        lines.append(Line(f"{prefix}{name}", -1 if is_ensemble else num_before + len(lines), tuple(points)))
    return lines


def _mean_line(name: str, style: int, points: Sequence[tuple[int, float]]) -> Line:
    """A line of at most MAX_POINTS means, with the range of the values around them."""
    if len(points) <= MAX_POINTS:
        return Line(name, style, tuple((float(step), round(value, 6)) for step, value in points))
    steps, values = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    means, band = [], []
    for part in np.array_split(np.arange(len(points)), MAX_POINTS):
        step = float(steps[part].mean())
        means.append((round(step, 1), float(f"{values[part].mean():.6g}")))
        band.append((step, float(values[part].min()), float(values[part].max())))
    return Line(name, style, tuple(means), tuple(band))
