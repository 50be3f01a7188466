"""``ray-dmml views``"""

from pathlib import Path
from typing import Annotated

import typer

from ray_dmml.cli.options import Overrides, TrustCode, path
from ray_dmml.cli.output import print_line, show_log, user_errors
from ray_dmml.errors import UserError
from ray_dmml.loggers.output import Console


def views(
    run: Annotated[
        Path | None, typer.Argument(parser=path, metavar="RUN", help="Folder of a run, in place of a config.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", parser=path, metavar="FILE", help="YAML config. Default: the quickstart."),
    ] = None,
    overrides: Overrides = None,
    images: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Number of images. Default: 8.", show_default=False)
    ] = 8,
    draws: Annotated[
        int,
        typer.Option(
            min=1, max=16, metavar="N", help="Number of draws of each random view. Default: 3.", show_default=False
        ),
    ] = 3,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=2**31,
            metavar="N",
            help="Another seed gives other images and draws. Default: 0.",
            show_default=False,
        ),
    ] = 0,
    out: Annotated[
        Path,
        typer.Option(
            parser=path, metavar="FILE", help="PNG, JPEG or WebP file. Default: views.png.", show_default=False
        ),
    ] = Path("views.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write a picture of training images under every peer's view, to check augmentations before training.

    Each image is a row: decoded, under each peer's view (several draws), and under the evaluation views.
    """
    with user_errors(), show_log(Console(stderr=True)):
        if run is not None and config is not None:
            raise UserError("the views of a run are those of its own config: give RUN or --config, not both")
        from ray_dmml.config.loading import QUICKSTART
        from ray_dmml.config.schema import Config
        from ray_dmml.training.run_dir import RunDir
        from ray_dmml.training.views import write_views

        source = RunDir.open(run).config_file if run is not None else config or QUICKSTART
        settings = Config.load(source, overrides or ())
        write_views(
            settings,
            out,
            run=run,
            num_images=images,
            num_draws=draws,
            seed=seed,
            overwrite=overwrite,
            trust_code=trust_code,
        )
    print_line(Console(), f"{out}: training images under the views of {len(settings.cohort.peers)} peers")
