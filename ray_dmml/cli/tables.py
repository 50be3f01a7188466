"""The table of a run's results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_dmml.loggers.figures import describe_images, describe_unevaluated, heading, rows_of
from ray_dmml.loggers.tables import print_table


def results_table(results: Mapping[str, Any], console: Console) -> None:
    """Prints the content of results.json: a row for each frozen backbone, and one for each peer and for the ensemble
    before and after training, and one for the ensemble of frozen teachers if there are several."""
    if results["split"] is None:
        console.print(describe_unevaluated(results), highlight=False)
        return
    table = Table(
        title=f"{describe_images(results)}, weights: {results['weights']} (step {results['step']}), %",
        title_justify="left",
        title_style="",
        header_style="bold",
    )
    table.add_column("")
    metrics = list(results["ensemble"])
    for metric in metrics:
        table.add_column(heading(metric), justify="right")
    *rows, ensemble = rows_of(results)

    def add_row(name: str, figures: Mapping[str, float], style: str = "") -> None:
        # A dash for a metric that was not measured, because `recall_at` was changed on resume.
        cells = (f"{100 * figures[metric]:.1f}" if metric in figures else "-" for metric in metrics)
        table.add_row(name, *cells, style=style)

    for row in rows:
        add_row(*row)
    table.add_section()
    add_row(*ensemble, style="bold")
    print_table(table, console)
    if "data" in results:
        console.print(f"images: {results['data']}", highlight=False, markup=False, soft_wrap=True)
