"""``ray-dmml evaluate``"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ray_dmml.cli.options import AsJson
from ray_dmml.cli.output import print_json, show_log, user_errors
from ray_dmml.cli.tables import results_table

Weights = StrEnum("Weights", ["last", "best", "ema"])


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    weights: Annotated[
        Weights | None, typer.Option(help="Weights to evaluate. Default: those of the run's own results.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint of a run on its test classes again."""
    with user_errors(), show_log(Console(stderr=True)):
        from ray_dmml.training.run import evaluate as evaluate_run

        results = evaluate_run(run, weights.value if weights else None)
    if as_json:
        print_json(results)
    else:
        results_table(results, Console())
