"""The table of a run's results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_dmml.loggers.tables import print_table

_HEADINGS = {"map@r": "MAP@R", "r_precision": "R-prec"}


def results_table(results: Mapping[str, Any], console: Console) -> None:
    """Prints the content of results.json: a row for each frozen backbone, and one for each peer and for the ensemble
    before and after training, and one for the ensemble of frozen teachers if there are several."""
    if results["split"] is None:
        what = "images" if results["split_by"] == "image" else "classes"
        console.print(f"not evaluated: all {what} were trained on", highlight=False)
        return
    table = Table(
        title=f"{_describe_images(results)}, weights: {results['weights']} (step {results['step']}), %",
        title_justify="left",
        title_style="",
        header_style="bold",
    )
    table.add_column("")
    metrics = list(results["ensemble"])
    for metric in metrics:
        table.add_column(_HEADINGS.get(metric, metric.replace("recall@", "R@")), justify="right")

    def add_row(name: str, figures: Mapping[str, float], style: str = "") -> None:
        # A dash for a metric that was not measured, because `recall_at` was changed on resume.
        cells = (f"{100 * figures[metric]:.1f}" if metric in figures else "-" for metric in metrics)
        table.add_row(name, *cells, style=style)

    backbones = _distinct(results["frozen_backbones"])
    for names, figures in backbones:
        add_row("frozen backbone" if len(backbones) == 1 else f"{', '.join(names)}, frozen backbone", figures)
    before = "at the start" if results["init_from"] else "untrained"
    for name, figures in results["untrained"].items():
        add_row(f"{name}, {before}", figures)
    if results["untrained_ensemble"]:
        add_row(f"ensemble, {before}", results["untrained_ensemble"])
    for name, figures in results["peers"].items():
        add_row(name, figures)
    table.add_section()
    if "teachers_ensemble" in results:
        add_row("ensemble of the teachers", results["teachers_ensemble"])
        add_row("ensemble of all", results["ensemble"], style="bold")
    else:
        add_row("ensemble", results["ensemble"], style="bold")
    print_table(table, console)
    if "data" in results:
        console.print(f"images: {results['data']}", highlight=False, markup=False, soft_wrap=True)


def _describe_images(results: Mapping[str, Any]) -> str:
    """Which images the figures are of, and whether their classes were trained on."""
    split, images, classes = results["split"], "images", "classes"
    if split == "other":
        images = "other images"
    elif results["split_by"] == "image":
        images, classes = f"{split} images", "known classes"
    else:
        classes = "unseen classes" if split == "test" else f"{split} classes"
    counts = f"{results['num_images']:,} {images}"
    if results["num_queries"] is not None:
        counts = f"{results['num_queries']:,} queries in {results['num_gallery']:,} {images}"
    return f"{counts} of {results['num_classes']} {classes}"


def _distinct(figures_of: Mapping[str, Mapping[str, float]]) -> list[tuple[list[str], Mapping[str, float]]]:
    """Equal figures once, with the names of the peers that have them."""
    rows: list[tuple[list[str], Mapping[str, float]]] = []
    for name, figures in figures_of.items():
        names = next((names for names, known in rows if known == figures), None)
        if names is None:
            rows.append(([name], figures))
        else:
            names.append(name)
    return rows
