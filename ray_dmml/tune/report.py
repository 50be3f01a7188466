"""The HTML report of a search: its trials, which parameters mattered, and the final runs."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ray_dmml.atomic_files import replace_file
from ray_dmml.tune.results import (
    baseline_is_best,
    final_columns,
    final_rows,
    short_name,
    short_value,
)
from ray_dmml.tune.search_space import Search
from ray_dmml.tune.trial import Trial

MIN_TRIALS = 8
"""With fewer trials the report does not say what a setting explains."""

GOOD, BAD, LINE = "#2563a8", "#b8bec6", "#d9822b"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2024; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .25em .7em; text-align: right }
th { border-bottom: 1px solid #888 }
tr.best td { font-weight: 600; background: #eef4fb } tr.bad td { color: #888 }
img { max-width: 100%; height: auto } .scroll { overflow-x: auto } p { max-width: 46em }
"""


def write_report(
    path: Path,
    search: Search,
    trials: Sequence[Trial],
    best: Trial,
    final: Mapping[str, Any] | None,
    front: Sequence[Trial] = (),
) -> None:
    """Writes the report as one HTML file.

    Args:
        best: the trial whose parameters are in best.yaml.
        final: the content of final.json; None: the final runs have not ended.
        front: the Pareto front, if the search minimises the cost as well.
    """
    reported = [trial for trial in trials if trial.reports]
    tested = final if final is not None and final["best"]["test"] else None
    objective = f"{search.config.metric} of the {search.config.objective.replace('_', ' ')}"
    parts = [
        f"<h1>Search: {html.escape(objective)}</h1>",
        f"<p>{len(trials)} trials on {html.escape(search.base.data.name)}, evaluated on validation classes. "
        f"The test classes were used by {'the final runs only' if tested else 'no run'}.</p>",
    ]
    if tested:
        parts += ["<h2>Test classes</h2>", _final_table(tested, search)]
    alike = at_common_step(reported)
    when = "at the last report of each trial, because no step is common to all"
    if len({trial.step for trial in alike}) == 1:
        when = f"at step {alike[0].step}, which all trials reached"
    parts += [
        "<h2>Objective of each trial</h2>",
        _image(_history(reported, objective), "Objective of each trial, and the best so far"),
        "<h2>Parameters of each trial</h2>",
        f"<p>This plot and those below show the objective {when}. Each line is a trial; darker is better. "
        "Orange is the best trial.</p>",
        _image(_parallel(alike, search, best.number), "Parameters and objective of each trial"),
        "<h2>What each setting explains</h2>",
    ]
    if len(alike) < MIN_TRIALS:
        parts.append(f"<p>Left out: it needs {MIN_TRIALS} trials, and there are {len(alike)}.</p>")
    elif len({trial.objective for trial in alike}) == 1:
        parts.append("<p>Left out: all trials are equal.</p>")
    else:
        parts += [
            "<p>The share of the objective's variance that a setting explains alone. Numbers are cut into "
            "three classes of equal size. With few trials this is only a hint.</p>",
            _image(_importance(alike, search), "Share of variance of each setting"),
        ]
    parts += [
        "<h2>Each setting alone</h2>",
        "<p>Each point is a trial. Blue trials are finished, grey ones are not.</p>",
        _image(_marginals(alike, search), "Objective of each trial over each setting"),
    ]
    if front:
        parts += ["<h2>Pareto front of objective and cost of inference</h2>", _trials_table(front, search, best)]
    parts += ["<h2>Trials</h2>", _trials_table(trials, search, best)]
    body = "\n".join(parts)
    replace_file(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Search</title>'
        f"<style>{_STYLE}</style><body>{body}</body></html>\n",
    )


def at_common_step(trials: Sequence[Trial]) -> list[Trial]:
    """The trials as they were at the last step that all of them have reported. Otherwise trials that were stopped
    early would look worse for that reason alone."""
    common = set.intersection(*({r["step"] for r in trial.reports} for trial in trials))
    step = max(common, default=0)
    return [
        replace(trial, reports=[r for r in trial.reports if r["step"] <= step] or trial.reports) for trial in trials
    ]


def importance(trials: Sequence[Trial], search: Search) -> dict[str, float]:
    """The share of the objective's variance that lies between the values of each setting (eta squared), the largest
    first. Numbers are cut into three classes of equal size."""
    objective = np.array([trial.objective for trial in trials], dtype=float)
    variance = float(((objective - objective.mean()) ** 2).sum())
    shares = {}
    for key, distribution in search.config.space.items():
        values = np.array([_position(search, key, trial.params[key]) for trial in trials])
        if distribution.choice is None:
            values = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)
        between = sum(
            (values == value).sum() * (objective[values == value].mean() - objective.mean()) ** 2
            for value in np.unique(values)
        )
        shares[key] = float(between) / variance if variance else 0.0
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def _position(search: Search, key: str, sample: Any) -> float:
    """The place of a sample on its axis, 0 to 1."""
    distribution = search.config.space[key]
    if distribution.choice is not None:
        labels = distribution.labels
        return labels.index(sample) / max(1, len(labels) - 1)
    low, high = distribution.limits or (0, 1)
    if distribution.loguniform is not None:
        return float(np.log(sample / low) / np.log(high / low))
    return float((sample - low) / (high - low))


def _ticks(search: Search, key: str) -> tuple[list[float], list[str]]:
    """Positions and labels of the ticks of a setting's axis."""
    distribution = search.config.space[key]
    if distribution.choice is not None:
        labels = distribution.labels
        positions = [_position(search, key, label) for label in labels]
        return positions, [short_value(search, key, label) for label in labels]
    low, high = distribution.limits or (0, 1)
    middle = float(np.sqrt(low * high)) if distribution.loguniform is not None else (low + high) / 2
    return [0, 0.5, 1], [f"{value:.3g}" for value in (low, middle, high)]


def _history(trials: Sequence[Trial], objective: str) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for is_finished, colour, label in ((True, GOOD, "finished"), (False, BAD, "not finished")):
        points = [(trial.number, trial.objective) for trial in trials if trial.finished is is_finished]
        if points:
            axes.scatter(*zip(*points, strict=True), color=colour, label=label, zorder=3)
    finished = np.array([trial.objective if trial.finished else np.nan for trial in trials], dtype=float)
    numbers = [trial.number for trial in trials]
    axes.step(numbers, np.fmax.accumulate(finished), where="post", color=LINE, label="best so far")
    axes.set(xlabel="trial (0: baseline)", ylabel=objective)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def _parallel(trials: Sequence[Trial], search: Search, best: int) -> Figure:
    keys = list(search.config.space)
    figure = Figure(figsize=(max(9, 1.5 * len(keys)), 4), layout="constrained")
    axes = figure.add_subplot()
    values = np.array([trial.objective for trial in trials], dtype=float)
    low, high = values.min(), values.max()
    shares = (values - low) / (high - low) if low < high else np.full(len(values), 0.5)
    for index in np.argsort(values):
        trial, share = trials[index], shares[index]
        points = [*(_position(search, key, trial.params[key]) for key in keys), share]
        if trial.number == best:
            axes.plot(points, color=LINE, linewidth=2.5, zorder=3)
        else:
            axes.plot(points, color="#5b6b7b", alpha=0.25 + 0.75 * share, linewidth=1.0)
    ticks = [_ticks(search, key) for key in keys]
    ticks.append(([0.0, 1.0], [f"{low:.3f}", f"{high:.3f}"]) if low < high else ([0.5], [f"{low:.3f}"]))
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}  # Lines cross the labels.
    for place, (positions, labels) in enumerate(ticks):
        axes.axvline(place, color="#ccc", linewidth=0.8, zorder=0)
        for position, label in zip(positions, labels, strict=True):
            axes.text(place + 0.03, position, label, fontsize=8, va="center", bbox=box, zorder=5)
    names = [*map(short_name, keys), search.config.metric]
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
    axes.set(yticks=[], xlim=(-0.1, len(keys) + 0.35), ylim=(-0.05, 1.05))
    return figure


def _importance(trials: Sequence[Trial], search: Search) -> Figure:
    shares = importance(trials, search)
    figure = Figure(figsize=(7, 0.6 + 0.35 * len(shares)), layout="constrained")
    axes = figure.add_subplot(xlim=(0, 1), xlabel="share of variance")
    axes.barh(range(len(shares)), list(shares.values()), color=GOOD)
    axes.set_yticks(range(len(shares)), map(short_name, shares))
    axes.invert_yaxis()
    return figure


def _marginals(trials: Sequence[Trial], search: Search) -> Figure:
    keys = list(search.config.space)
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(2.7 * columns, 2.5 * rows), layout="constrained")
    objectives = np.array([trial.objective for trial in trials], dtype=float)
    colours = [GOOD if trial.finished else BAD for trial in trials]
    for place, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, place + 1, xlim=(-0.08, 1.08))
        axes.scatter([_position(search, key, trial.params[key]) for trial in trials], objectives, c=colours, s=22)
        axes.set_title(short_name(key), fontsize=9)
        axes.set_xticks(*_ticks(search, key), fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        if place % columns == 0:
            axes.set_ylabel(search.config.metric, fontsize=9)
    return figure


def _image(figure: Figure, caption: str) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="scroll"><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"></div>'


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """An HTML table; each row is (CSS class, cells)."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)

    body = "".join(f'<tr class="{kind}">{cells("td", values)}</tr>' for kind, values in rows)
    return f'<div class="scroll"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


def _final_table(final: Mapping[str, Any], search: Search) -> str:
    seeds = len(final["best"]["test"])
    what = f"Mean and standard deviation of {seeds} seeds" if seeds > 1 else "One seed"
    note = " No trial was better than the baseline." if baseline_is_best(final) else ""
    rows = [("best" if n == 0 else "", row) for n, row in enumerate(final_rows(final, search))]
    table = _table(final_columns(search), rows)
    return f"{table}<p>{what} in percent, trained on all training classes.{note}</p>"


def _trials_table(trials: Sequence[Trial], search: Search, best: Trial) -> str:
    names = map(short_name, search.config.space)
    head = ["trial", "status", "step", search.config.metric, "million parameters", "s", *names]
    rows = []
    for trial in trials:
        kind = "best" if trial.number == best.number else "" if trial.finished else "bad"
        status = f"failed: {(trial.error or '')[:60]}" if trial.status == "failed" else trial.status
        number = f"{trial.number} (baseline)" if trial.is_baseline else str(trial.number)
        objective, cost = "-", "-"
        if trial.reports:
            objective, cost = f"{trial.objective:.4f}", f"{trial.reports[-1]['cost']:.2f}"
        params = [short_value(search, key, trial.params[key]) for key in search.config.space]
        rows.append((kind, [number, status, str(trial.step), objective, cost, f"{trial.seconds:.0f}", *params]))
    return _table(head, rows)
