"""``ray-dmml report``"""

from pathlib import Path
from typing import Annotated

import typer

from ray_dmml.cli.options import TrustCode, path
from ray_dmml.cli.output import print_line, show_log, user_errors
from ray_dmml.loggers.output import Console


def report(
    runs: Annotated[list[Path], typer.Argument(parser=path, metavar="RUN...", help="Folders of runs.")],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FILE",
            help="The page. Default: report.html in the folder of the one run. A report that exists is replaced.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Say where the images of the one run are, such as data.root=FOLDER. Repeatable.",
        ),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Write a page about a run, or about several side by side: results, curves, and what is found for which images.

    The page is one HTML file, which `ray-dmml train` writes, too. It also works for a run that has not ended.
    """
    with user_errors(), show_log(Console(stderr=True)):
        from ray_dmml.training.report import write_report

        file = write_report(runs, out, overrides=overrides or (), trust_code=trust_code)
    print_line(Console(), f"report: {file}")
