"""The tables of results with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_dmml.loggers.figures import Intervals, describe_images, heading, main_metrics, rows_of
from ray_dmml.report.data import Cell, Row, Table


@dataclass(frozen=True)
class _Row:
    name: str
    figures: Mapping[str, float]
    intervals: Intervals
    is_main: bool


def results_tables(
    names: Sequence[str], results: Sequence[Mapping[str, Any]]
) -> tuple[Table | None, tuple[tuple[str, Table], ...], str]:
    """The most important metrics, further tables with their titles, and which images all are of. If there is one run,
    its name is not in the rows."""
    evaluated = [(f"{name}: " if len(results) > 1 else "", of) for name, of in zip(names, results, strict=True)]
    evaluated = [(prefix, of) for prefix, of in evaluated if of["split"] is not None]
    if not evaluated:
        return None, (), ""
    metrics = list(dict.fromkeys(metric for _, of in evaluated for metric in of["ensemble"]))
    first = [metric for metric in metrics if any(metric in main_metrics(of) for _, of in evaluated)]
    further = [metric for metric in metrics if metric not in first]
    means = [row for prefix, of in evaluated for row in _rows(prefix, of)]
    tables = [("Further metrics", _table(means, further))] if further else []
    if all("macro" in of for _, of in evaluated):
        title = "Means over classes: every class counts alike, however many queries it has"
        tables.append((title, _table([row for prefix, of in evaluated for row in _rows(prefix, _macro(of))], metrics)))
    note = "; ".join(dict.fromkeys(describe_images(of) for _, of in evaluated))
    if any(row.intervals for row in means):
        note += ". The small numbers are 95 % intervals, by bootstrap over classes"
    return _table(means, first), tuple(tables), f"{note}."


def _rows(prefix: str, results: Mapping[str, Any]) -> list[_Row]:
    """Without ensembles if there is one peer: they are that peer."""
    has_ensemble = len(results["peers"]) > 1
    return [
        _Row(prefix + label, figures, intervals, figures is results["ensemble"] and has_ensemble)
        for label, figures, intervals in rows_of(results)
        if has_ensemble or not label.startswith("ensemble")
    ]


def _macro(results: Mapping[str, Any]) -> dict[str, Any]:
    """The trained peers and ensembles, as means over classes."""
    nothing: dict[str, Any] = {"untrained": {}, "untrained_ensemble": {}, "frozen_backbones": {}}
    return {**results, **nothing, **results["macro"], "intervals": results.get("macro_intervals", {})}


def _table(rows: Sequence[_Row], metrics: Sequence[str]) -> Table:
    """The rows that have any of the metrics: of untrained peers and frozen backbones, only some are computed."""
    rows = [row for row in rows if any(metric in row.figures for metric in metrics)]
    body = tuple(Row(row.name, tuple(_cell(row, metric) for metric in metrics), row.is_main) for row in rows)
    return Table(("%", *map(heading, metrics)), body)


def _cell(row: _Row, metric: str) -> Cell:
    if metric not in row.figures:
        return Cell("-")
    around = row.intervals.get(metric)
    return Cell(f"{100 * row.figures[metric]:.1f}", f"{100 * around[0]:.1f} – {100 * around[1]:.1f}" if around else "")
