"""The tables of a run's results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_dmml.loggers.figures import (
    describe_images,
    describe_unevaluated,
    heading,
    main_metrics,
    rows_of,
    verification_heading,
    verification_keys,
)
from ray_dmml.loggers.tables import print_table

MAX_GROUPS = 20
"""Classes, or categories, that a table shows; the worst ones. The rest are in the JSON."""

Interval = Sequence[float]


def results_table(results: Mapping[str, Any], console: Console) -> None:
    """Prints the content of results.json: a row for each frozen backbone, and one for each peer and for the ensemble
    before and after training, and one for the ensemble of frozen teachers if there are several. ± is half of the 95 %
    interval."""
    if results["split"] is None:
        console.print(describe_unevaluated(results), highlight=False)
        return
    title = f"{describe_images(results)}, weights: {results['weights']} (step {results['step']}), %"
    metrics = main_metrics(results)
    table = _table(title, ["", *map(heading, metrics)])
    *rows, ensemble = rows_of(results)
    if ensemble[2]:
        table.caption = "± is half of a 95 % interval, by bootstrap over classes"

    def add_row(name: str, figures: Mapping[str, float], intervals: Mapping[str, Interval], style: str = "") -> None:
        # A dash for a metric that was not measured, because `recall_at` was changed on resume.
        cells = (_percent(figures[metric], intervals.get(metric)) if metric in figures else "-" for metric in metrics)
        table.add_row(name, *cells, style=style)

    for row in rows:
        add_row(*row)
    table.add_section()
    add_row(*ensemble, style="bold")
    print_table(table, console)
    if "data" in results:
        console.print(f"images: {results['data']}", highlight=False, markup=False, soft_wrap=True)


def verification_table(results: Mapping[str, Any], console: Console) -> None:
    """Prints how well a threshold on the similarity separates classes, for each system; nothing if that was not
    measured."""
    rows = {name: figures for name, figures in results.get("verification", {}).items() if figures}
    if not rows:
        return
    first = next(iter(rows.values()))
    keys = verification_keys(first)
    title = "verification: are two images of one class? AUC and FNMR in %"
    table = _table(title, ["", *map(verification_heading, keys)])
    table.caption = (
        f"a pair matches above the threshold; {first['num_positive_pairs']:,} pairs of one class and "
        f"{first['num_negative_pairs']:,} of two"
    )
    for name, figures in rows.items():
        intervals = figures["intervals"]
        cells = (
            _number(figures[key], intervals.get(key), 3)
            if "threshold" in key
            else _percent(figures[key], intervals.get(key))
            for key in keys
        )
        table.add_row(name, *cells, style="bold" if name == "ensemble" else "")
    print_table(table, console)


def details_tables(results: Mapping[str, Any], console: Console) -> None:
    """Prints the worst classes and categories, the subsets of the peers, and the clusters, as far as they were asked
    for."""
    for key, name in (("categories", "category"), ("classes", "class")):
        if results.get(key):
            _groups_table(results[key], name, key, main_metrics(results), console)
    if "subsets" in results:
        metrics = main_metrics(results)
        table = _table("ensembles of the peers, %", ["peers", *map(heading, metrics)])
        for row in results["subsets"]:
            cells = (_percent(row["figures"][metric], row["intervals"].get(metric)) for metric in metrics)
            table.add_row(" + ".join(row["peers"]), *cells)
        print_table(table, console)
    if "clustering" in results:
        table = _table("clusters by k-means, %", ["", "NMI", "AMI"])
        for name, figures in results["clustering"].items():
            table.add_row(name, *(_percent(figures[key], None) for key in ("nmi", "ami")))
        print_table(table, console)


def _groups_table(
    rows: Sequence[Mapping[str, Any]], name: str, plural: str, metrics: Sequence[str], console: Console
) -> None:
    from ray_dmml.data.decoding import printable  # it loads torch, for which --help should not wait

    names = [key for key in ("category", "class") if key in rows[0]]
    more = f", the worst {MAX_GROUPS} of {len(rows):,}" if len(rows) > MAX_GROUPS else ""
    table = _table(f"{plural} by the ensemble{more}, %", [name, *(each for each in names if each != name), "queries"])
    for column in metrics:
        table.add_column(heading(column), justify="right")
    for row in rows[:MAX_GROUPS]:
        others = [Text(printable(row[each])) for each in names if each != name]
        cells = (_percent(row["ensemble"][metric], None) for metric in metrics)
        table.add_row(Text(printable(row[name])), *others, f"{row['num_queries']:,}", *cells)
    print_table(table, console)


def _table(title: str, headings: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="", header_style="bold", caption_justify="left")
    for number, text in enumerate(headings):
        table.add_column(text, justify="right" if number else "left")
    return table


def _percent(value: float, interval: Interval | None) -> str:
    return _number(100 * value, None if interval is None else [100 * end for end in interval], 1)


def _number(value: float, interval: Interval | None, digits: int) -> str:
    half = "" if interval is None else f" ±{(interval[1] - interval[0]) / 2:.{digits}f}"
    return f"{value:.{digits}f}{half}"
