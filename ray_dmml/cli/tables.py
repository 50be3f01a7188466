"""The table of a run's results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_CLASSES = {"test": "unseen", "validation": "validation"}


def results_table(results: Mapping[str, Any], console: Console) -> None:
    """Prints the content of results.json: a row for each peer and for the ensemble, before and after training."""
    metrics = list(results["ensemble"])
    table = Table(
        title=f"{_searched(results)} of {results['num_classes']} {_CLASSES[results['split']]} classes, "
        f"weights: {results['weights']} (step {results['step']}), %",
        title_justify="left",
        title_style="",
        header_style="bold",
    )
    table.add_column("")
    for metric in metrics:
        table.add_column(_heading(metric), justify="right")
    before = "at the start" if results["init_from"] else "untrained"
    rows = [(f"{name}, {before}", figures) for name, figures in results["untrained"].items()]
    if results["untrained_ensemble"]:
        rows.append((f"ensemble, {before}", results["untrained_ensemble"]))
    for name, figures in (*rows, *results["peers"].items()):
        table.add_row(name, *(_percent(figures, metric) for metric in metrics))
    table.add_section()
    ensemble = (_percent(results["ensemble"], metric) for metric in metrics)
    table.add_row("ensemble", *ensemble, style="bold")
    console.print(table)


def _searched(results: Mapping[str, Any]) -> str:
    if results["num_queries"] is None:
        return f"{results['num_images']:,} images"
    return f"{results['num_queries']:,} queries in {results['num_gallery']:,} images"


def _percent(figures: Mapping[str, float], metric: str) -> str:
    """A dash for a metric that was not measured, because `recall_at` was changed on resume."""
    return f"{100 * figures[metric]:.1f}" if metric in figures else "-"


def _heading(metric: str) -> str:
    if metric.startswith("recall@"):
        return "R" + metric.removeprefix("recall")
    return {"map@r": "MAP@R", "r_precision": "R-prec"}.get(metric, metric)
