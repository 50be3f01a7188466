"""``ray-dmml data check`` and ``ray-dmml data fetch``"""

from __future__ import annotations

import os

import typer

from ray_dmml.cli.command import Command, Group
from ray_dmml.cli.options import Address, AsJson, ConfigFile, Overrides, use_address
from ray_dmml.cli.output import print_json, print_line, show_log, user_errors
from ray_dmml.errors import UserError
from ray_dmml.loggers.output import Console

data_app = typer.Typer(cls=Group, help="Audit the images of a data set, or fetch them.", no_args_is_help=True)


@data_app.command(cls=Command)
def check(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Audit a data set: faults of its structure, unreadable images, duplicates, wrong labels, small classes.

    Exit code 0: there are no findings; 1: there are findings; 2: a run would refuse the data set as it is, for a fault
    or, unless data.on_bad_image is skip, for an unreadable image.
    """
    console = Console(stderr=True)
    with user_errors(), show_log(console):
        from rich.progress import Progress

        from ray_dmml.config.loading import QUICKSTART
        from ray_dmml.config.parts import load_parts
        from ray_dmml.config.schema import Config

        whole = Config.load(config or QUICKSTART, overrides or ())
        load_parts(whole)
        settings = whole.data
        from ray_dmml.data.audit import audit, print_report

        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("decoding", total=None)
            report = audit(settings, lambda done, total: progress.update(task, completed=done, total=total))
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report, Console())
    if not report.is_clean():
        is_refused = report.faults or (report.unreadable and settings.on_bad_image == "fail")
        raise typer.Exit(2 if is_refused else 1)


@data_app.command(cls=Command)
def fetch(config: ConfigFile = None, overrides: Overrides = None, address: Address = None) -> None:
    """Copy or download the images to this machine, or to every node of a cluster, and verify them.

    A run does the same on each of its nodes. This command does it before the nodes have to wait.
    """
    console = Console()
    use_address(address)
    with user_errors(), show_log(console):
        from ray_dmml.config.loading import QUICKSTART
        from ray_dmml.config.parts import load_parts
        from ray_dmml.config.schema import Config

        whole = Config.load(config or QUICKSTART, overrides or ())
        code, settings = load_parts(whole), whole.data
        if "RAY_ADDRESS" not in os.environ:
            from ray_dmml.data.datasets import prepare

            print_line(console, prepare(settings))
            return
        from ray_dmml.ray_backend.data_staging import prepare_everywhere
        from ray_dmml.ray_backend.session import ray_session

        errors = []
        with ray_session():
            for node, outcome in prepare_everywhere(settings, code):
                if isinstance(outcome, UserError):
                    errors.append(f"{node}: {outcome}")
                else:
                    print_line(console, f"{node}: {outcome}")
        if errors:
            raise UserError("\n".join(errors))
