"""``ray-dmml evaluate``"""

from pathlib import Path
from typing import Annotated

import typer

from ray_dmml.cli.options import AsJson, Run, RunWeights, TrustCode, path
from ray_dmml.cli.output import print_json, show_log, user_errors
from ray_dmml.cli.tables import results_table
from ray_dmml.loggers.output import Console


def evaluate(
    run: Run,
    weights: RunWeights = None,
    data: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="PLACE",
            help="Other images: a folder with one folder a class, or a manifest (CSV). Default: the run's own.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change where the images are or how they are evaluated, such as data.root=FOLDER. Repeatable.",
        ),
    ] = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint of a run again, on its test classes or on other images.

    It writes nothing. If the run's images have moved, --set data.root=FOLDER says where they are.
    """
    with user_errors(), show_log(Console(stderr=True)):
        from ray_dmml.training.evaluate import changed_config
        from ray_dmml.training.evaluate import evaluate as evaluate_run

        config = changed_config(run, overrides) if overrides else None
        results = evaluate_run(run, weights.value if weights else None, data=data, config=config, trust_code=trust_code)
    if as_json:
        print_json(results)
    else:
        results_table(results, Console())
