"""The tables of results with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_dmml.evaluation.evaluation import ENSEMBLE
from ray_dmml.loggers.figures import (
    Intervals,
    describe_images,
    heading,
    main_metrics,
    rows_of,
    verification_heading,
    verification_keys,
)
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


def verification_table(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> tuple[Table | None, str]:
    """How well a threshold on the similarity separates classes, a row a system, with a note on how to read it; None: it
    was not measured. The figures are those that `ray-dmml evaluate` prints."""
    rows, pairs = [], dict[str, list[str]]()
    keys: list[str] = []
    for name, of in zip(names, results, strict=True):
        for system, figures in of.get("verification", {}).items():
            if figures:
                keys = verification_keys(figures)
                cells = tuple(_verification_cell(key, figures) for key in keys)
                row_name = f"{name}: {system}" if len(results) > 1 else system
                rows.append(Row(row_name, cells, is_main=system == ENSEMBLE))
                pairs.setdefault(_count_pairs(figures), []).append(name)
    if not rows:
        return None, ""
    counts = [f"{', '.join(dict.fromkeys(of))}: {count}" for count, of in pairs.items()]
    note = (
        "Are two images of one class? Two images match if their similarity is above a threshold. FMR is the share of "
        "the pairs of two classes that match, and FNMR the share of the pairs of one class that do not match. "
        f"{'; '.join(counts) if len(pairs) > 1 else f'There are {next(iter(pairs))}'}."
    )
    return Table(("system", *map(verification_heading, keys)), tuple(rows)), note


def _count_pairs(figures: Mapping[str, Any]) -> str:
    counts = (
        f"{figures['num_positive_pairs']:,} pairs of one class and {figures['num_negative_pairs']:,} of two classes"
    )
    return counts if figures["all_pairs"] else f"{counts}, a random part of all pairs"


def _verification_cell(key: str, figures: Mapping[str, Any]) -> Cell:
    factor, digits, unit = (1, 3, "") if key.startswith("threshold") else (100, 1, " %")
    low, high = figures["intervals"].get(key, (None, None))
    around = "" if low is None else f"{factor * low:.{digits}f} – {factor * high:.{digits}f}"
    return Cell(f"{factor * figures[key]:.{digits}f}{unit}", around)


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
