"""``ray-dmml push``"""

from pathlib import Path
from typing import Annotated

import typer

from ray_dmml.cli.options import Run, path
from ray_dmml.cli.output import print_line, show_log, user_errors
from ray_dmml.loggers.output import Console


def push(
    run: Run,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hugging Face hub.")],
    out: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FOLDER", help="Write the same files to a new folder, and upload nothing."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    license: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Licence of the weights, such as apache-2.0. Default: the card states none."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the training images, for the card. Default: none but data.name."),
    ] = None,
    with_code: Annotated[
        bool,
        typer.Option("--with-code", help="Push the Python files of the setting code, too. Own backbones need them."),
    ] = False,
) -> None:
    """Publish the evaluated weights of a run on the Hugging Face hub, with a model card made of its results.

    The files name no path, image or machine. Look at them first with --out.
    """
    with user_errors(), show_log(Console(stderr=True)):
        from ray_dmml.hub.push import push as push_run

        place = push_run(run, repo, out=out, private=private, license=license, dataset=dataset, with_code=with_code)
    print_line(Console(), f"{'pushed' if out is None else 'written'}: {place}")
