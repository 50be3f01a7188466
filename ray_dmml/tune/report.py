"""The page of a search: what was tried, what came of it, and which settings mattered. One HTML file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ray_dmml.training.run_dir import replace_file
from ray_dmml.tune.search_space import Search, final_head, final_rows, is_unbeaten

if TYPE_CHECKING:
    from ray_dmml.tune.tuner import Trial

FEW = 8
"""Trials below which nothing is said of what a setting explains."""

GOOD, BAD, LINE = "#2563a8", "#b8bec6", "#d9822b"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2024; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .25em .7em; text-align: right }
th { border-bottom: 1px solid #888 } td.text, th.text { text-align: left }
tr.best td { font-weight: 600; background: #eef4fb } tr.bad td { color: #888 }
img { max-width: 100%; height: auto } .scroll { overflow-x: auto } p { max-width: 46em }
"""


def write_page(
    path: Path,
    search: Search,
    trials: Sequence[Trial],
    best: Trial,
    final: Mapping[str, Any] | None,
    kept: Sequence[Trial] = (),
) -> None:
    """Writes the page.

    Args:
        best: the one that best.yaml is of.
        final: the test figures of the final runs; None: there are none yet.
        kept: the trials that no other beats in objective and cost, where both were searched for.
    """
    judged = [trial for trial in trials if trial.reports]
    finals = final is not None and bool(final["best"]["test"])
    what = f"{search.config.metric} of the {search.config.objective.replace('_', ' ')}"
    parts = [
        f"<h1>Search: {html.escape(what)}</h1>",
        f"<p>{len(trials)} trials on {html.escape(search.base.data.name)}, judged on validation "
        f"classes; the test classes were seen by {'the final runs only' if finals else 'none'}.</p>",
    ]
    if final is not None and finals:
        parts += ["<h2>Test classes</h2>", _final_table(final, search)]
    alike = at_common_step(judged)
    steps = {trial.step for trial in alike}
    when = (
        f"step {steps.pop()}, which all trials reached"
        if len(steps) == 1
        else "the last report of each trial, as no step is common to all"
    )
    parts += [
        "<h2>Objective, trial by trial</h2>",
        _image(_history(judged, what), "Objective of each trial, and the best so far"),
        "<h2>All settings of each trial</h2>",
        f"<p>This and the plots below are of {when}. A line a trial, the darker the better; orange: the "
        "best at its end.</p>",
        _image(_parallel(alike, search, what, best.number), "Settings and figure of each trial"),
        "<h2>What each setting explains</h2>",
        *_explained(alike, search),
        "<h2>Each setting by itself</h2>",
        "<p>A point a trial: blue ones trained to their end, grey ones did not.</p>",
        _image(_marginals(alike, search, what), "Figure of each trial over each setting"),
    ]
    if kept:
        parts += ["<h2>Quality against cost of inference</h2>", _pareto_table(kept, search)]
    parts += ["<h2>Trials</h2>", _trials_table(trials, search, best.number)]
    text = "\n".join(parts)
    replace_file(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Search</title>'
        f"<style>{_STYLE}</style><body>{text}</body></html>\n",
    )


def _explained(trials: Sequence[Trial], search: Search) -> list[str]:
    if len(trials) < FEW:
        return [f"<p>Left out: {len(trials)} trials are too few, it needs {FEW}.</p>"]
    if len({trial.objective for trial in trials}) == 1:
        return ["<p>Left out: all trials are equal.</p>"]
    return [
        "<p>Share of the trials' variance that goes with the setting alone (numbers in three "
        "classes of equal size). With few trials this is a hint and no more.</p>",
        _image(_importance(trials, search), "Share of variance of each setting"),
    ]


def at_common_step(trials: Sequence[Trial]) -> list[Trial]:
    """The trials as they were at the last step that each of them has reported: ones that were ended
    early look worse for that alone."""
    reported = (set(r["step"] for r in trial.reports) for trial in trials)
    common = set.intersection(*reported)
    step = max(common) if common else 0
    then = []
    for trial in trials:
        reports = [r for r in trial.reports if r["step"] <= step] or trial.reports
        params = reports[-1].get("params", trial.params)
        then.append(replace(trial, reports=reports, params=params))
    return then


def importance(trials: Sequence[Trial], search: Search) -> dict[str, float]:
    """Setting to the share of the objective's variance between its values (eta squared), largest
    first; numbers are cut into three classes of equal size."""
    objective = np.array([trial.objective for trial in trials], dtype=float)
    spread = float(((objective - objective.mean()) ** 2).sum())
    found = {}
    for key, distribution in search.config.space.items():
        values = np.array([_position(search, key, trial.params[key]) for trial in trials])
        if distribution.choice is None:
            values = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)
        between = sum(
            (values == value).sum() * (objective[values == value].mean() - objective.mean()) ** 2
            for value in np.unique(values)
        )
        found[key] = float(between) / spread if spread else 0.0
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _position(search: Search, key: str, drawn: Any) -> float:
    """Where a draw stands on its axis, 0 to 1."""
    distribution = search.config.space[key]
    if distribution.choice is not None:
        labels = distribution.labels
        return labels.index(drawn) / max(1, len(labels) - 1)
    low, high = distribution.ends or (0, 1)
    if distribution.loguniform is not None:
        return float(np.log(drawn / low) / np.log(high / low))
    return float((drawn - low) / (high - low))


def _short(text: Any, width: int = 24) -> str:
    told = f"{text:.3g}" if isinstance(text, float) else str(text)
    return told if len(told) <= width else told[: width - 1] + "…"


def _ticks(search: Search, key: str) -> tuple[list[float], list[str]]:
    """Of a setting's axis."""
    distribution = search.config.space[key]
    if distribution.choice is not None:
        labels = distribution.labels
        positions = [_position(search, key, label) for label in labels]
        long = max(map(len, labels)) > 12
        return positions, [f"no. {n + 1}" if long else label for n, label in enumerate(labels)]
    low, high = distribution.ends or (0, 1)
    middle = float(np.sqrt(low * high)) if distribution.loguniform is not None else (low + high) / 2
    return [0, 0.5, 1], [f"{value:.3g}" for value in (low, middle, high)]


def _last_part(key: str) -> str:
    """The end of a dotted name, with the peer it is of."""
    parts = key.split(".")
    peer = f"peer {parts[2]}: " if parts[:2] == ["cohort", "peers"] and len(parts) > 2 else ""
    return peer + parts[-1]


def _history(trials: Sequence[Trial], what: str) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.add_subplot()
    numbers = [trial.number for trial in trials]
    values = [trial.objective for trial in trials]
    done = [trial.finished for trial in trials]
    for state, colour, label in ((True, GOOD, "trained to its end"), (False, BAD, "ended early")):
        points = [(n, v) for n, v, d in zip(numbers, values, done, strict=True) if d is state]
        if points:
            axes.scatter(*zip(*points, strict=True), color=colour, label=label, zorder=3)
    best, line = -np.inf, []
    for trial in trials:
        if trial.finished and trial.objective is not None:
            best = max(best, trial.objective)
        line.append(best if np.isfinite(best) else np.nan)
    axes.step(numbers, line, where="post", color=LINE, label="best so far")
    axes.set(xlabel="trial (0: the config as it is)", ylabel=what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return _plain(figure)


def _parallel(trials: Sequence[Trial], search: Search, what: str, best: int) -> Figure:
    keys = list(search.config.space)
    figure = Figure(figsize=(max(9, 1.5 * len(keys)), 4), layout="constrained")
    axes = figure.add_subplot()
    values = np.array([trial.objective for trial in trials], dtype=float)
    low, high = values.min(), values.max()
    order = np.argsort(values)
    for index in order:
        trial, share = trials[index], (values[index] - low) / (high - low) if low < high else 0.5
        points = [_position(search, key, trial.params[key]) for key in keys] + [share]
        if trial.number == best:
            axes.plot(points, color=LINE, linewidth=2.5, zorder=3)
        else:
            axes.plot(points, color="#5b6b7b", alpha=0.25 + 0.75 * share, linewidth=1.0)
    for place, key in enumerate(keys):
        axes.axvline(place, color="#ccc", linewidth=0.8, zorder=0)
        for position, label in zip(*_ticks(search, key), strict=True):
            # On white: lines go through it.
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
            axes.text(place + 0.03, position, label, fontsize=8, va="center", bbox=box, zorder=5)
    axes.axvline(len(keys), color="#ccc", linewidth=0.8, zorder=0)
    for position, value in ((0.0, low), (1.0, high)) if low < high else ((0.5, low),):
        axes.text(len(keys) + 0.03, position, f"{value:.3f}", fontsize=8, va="center")
    names = [*(_last_part(key) for key in keys), what.split(" of ")[0]]
    axes.set_ylim(-0.05, 1.05)
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
    axes.set(yticks=[], xlim=(-0.1, len(keys) + 0.35))
    return _plain(figure)


def _importance(trials: Sequence[Trial], search: Search) -> Figure:
    found = importance(trials, search)
    figure = Figure(figsize=(7, 0.6 + 0.35 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    names = [_last_part(key) for key in found][::-1]
    axes.barh(range(len(found)), list(found.values())[::-1], color=GOOD)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(0, 1), xlabel="share of variance")
    return _plain(figure)


def _marginals(trials: Sequence[Trial], search: Search, what: str) -> Figure:
    keys = list(search.config.space)
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(2.7 * columns, 2.5 * rows), layout="constrained")
    for place, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, place + 1)
        for trial in trials:
            axes.scatter(
                _position(search, key, trial.params[key]),
                trial.objective or 0.0,
                color=GOOD if trial.finished else BAD,
                s=22,
            )
        axes.set_title(_last_part(key), fontsize=9)
        axes.set_xticks(*_ticks(search, key), fontsize=8)
        axes.set_xlim(-0.08, 1.08)
        axes.tick_params(axis="y", labelsize=8)
        if place % columns == 0:
            axes.set_ylabel(what.split(" of ")[0], fontsize=9)
    return _plain(figure)


def _plain(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _image(figure: Figure, shows: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="scroll"><img alt="{html.escape(shows)}" src="data:image/png;base64,{data}"></div>'


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows are (CSS class, cells)."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)

    body = "".join(f'<tr class="{kind}">{cells("td", values)}</tr>' for kind, values in rows)
    return f'<div class="scroll"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


def _final_table(final: Mapping[str, Any], search: Search) -> str:
    seeds = len(final["best"]["test"])
    of = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    unbeaten = " No trial beat the config as it is." if is_unbeaten(final) else ""
    note = f"<p>Percent; {of}, trained on all training classes.{unbeaten}</p>"
    rows = [("best" if n == 0 else "", row) for n, row in enumerate(final_rows(final, search))]
    return _table(final_head(search), rows) + note


def _pareto_table(kept: Sequence[Trial], search: Search) -> str:
    head = ["trial", search.config.metric, "million parameters", *search.config.space]
    rows = [
        (
            "",
            [
                str(trial.number),
                f"{trial.objective or 0:.4f}",
                f"{trial.reports[-1]['cost']:.2f}",
                *(_short(trial.params[key]) for key in search.config.space),
            ],
        )
        for trial in kept
    ]
    return _table(head, rows)


def _trials_table(trials: Sequence[Trial], search: Search, best: int) -> str:
    head = [
        "trial",
        "status",
        "step",
        search.config.metric,
        "s",
        *map(_last_part, search.config.space),
    ]
    rows = []
    for trial in trials:
        kind = "best" if trial.number == best else "" if trial.finished else "bad"
        value = "-" if trial.objective is None else f"{trial.objective:.4f}"
        told = [_short(trial.params[key]) for key in search.config.space]
        status = (
            trial.status
            if trial.error is None or trial.finished
            else f"failed: {_short(trial.error, 60)}"
        )
        rows.append(
            (
                kind,
                [str(trial.number), status, str(trial.step), value, f"{trial.seconds:.0f}", *told],
            )
        )
    return _table(head, rows)
