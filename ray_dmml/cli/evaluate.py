"""``ray-dmml evaluate``"""

from pathlib import Path
from typing import Annotated

import typer

from ray_dmml.cli.options import AsJson, OtherImages, RunWeights, TrustCode, path
from ray_dmml.cli.output import print_json, print_line, show_log, user_errors
from ray_dmml.loggers.output import Console
from ray_dmml.loggers.results_tables import details_tables, results_table, verification_table


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            parser=path,
            metavar="RUN|CHECKPOINT",
            help="Folder of a run or of one of its checkpoints. With --data also a pushed cohort: its folder, or "
            "hf-hub:OWNER/NAME.",
        ),
    ],
    weights: RunWeights = None,
    data: OtherImages = None,
    per_class: Annotated[
        bool,
        typer.Option("--per-class", help="Also show each class, and each category of a manifest, the worst first."),
    ] = False,
    clustering: Annotated[
        bool, typer.Option("--clustering", help="Also show NMI and AMI of k-means clusters. Slow with many classes.")
    ] = False,
    subsets: Annotated[
        bool, typer.Option("--subsets", help="Also show the ensemble of every subset of the peers.")
    ] = False,
    embeddings: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Write paths, classes and embeddings to a new Parquet file."),
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

    It writes nothing but --embeddings. If the run's images have moved, --set data.root=FOLDER says where they are.
    """
    with user_errors(), show_log(Console(stderr=True)):
        from ray_dmml.training.evaluate import changed_config
        from ray_dmml.training.evaluate import evaluate as evaluate_run

        results = evaluate_run(
            run,
            weights.value if weights else None,
            data=data,
            config=changed_config(run, overrides) if overrides else None,
            trust_code=trust_code,
            per_class=per_class,
            clustering=clustering,
            subsets=subsets,
            embeddings=embeddings,
        )
    if as_json:
        print_json(results)
        return
    console = Console()
    results_table(results, console)
    verification_table(results, console)
    details_tables(results, console)
    if embeddings is not None:
        print_line(console, f"embeddings: {embeddings}")
