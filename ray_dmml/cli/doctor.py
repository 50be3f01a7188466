"""``ray-dmml doctor``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ray_dmml.cli.options import AsJson, Overrides, path
from ray_dmml.cli.output import print_json, print_line, show_log, user_errors
from ray_dmml.errors import UserError
from ray_dmml.loggers.output import Console

if TYPE_CHECKING:
    from rich.table import Table

    from ray_dmml.doctor.check import Check

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            parser=path,
            metavar="FILE",
            help="Also check whether the peers of this config have room here.",
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Examine this machine: what would limit a run here or make it fail, and what to do about it.

    It starts no Ray, and takes seconds. Exit code 0: a run works here, with or without notes; 1: there is a problem.
    """
    with user_errors(), show_log(Console(stderr=True)):
        if overrides and config is None:
            raise UserError("--set changes settings of a config: give --config FILE, too")
        from ray_dmml.config.schema import Config
        from ray_dmml.doctor.examine import examine

        settings = Config.load(config, overrides or ()) if config is not None else None
        checks = list(examine(settings))
    if as_json:
        print_json({"checks": [check.to_json() for check in checks]})
    else:
        console = Console()
        console.print(_table(checks))
        print_line(console, _summary(checks))
    if any(check.state == "problem" for check in checks):
        raise typer.Exit(1)


def _table(checks: Sequence[Check]) -> Table:
    """A row a check; what to do stands below what there is."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")  # long names of files are not cut off
    for check in checks:
        message = Text(check.message)
        if check.advice:
            message.append(f"\n{check.advice}", style="italic")
        table.add_row(Text(check.state, style=STYLES[check.state]), check.name, message)
    return table


def _summary(checks: Sequence[Check]) -> str:
    problems, notes = ([check.name for check in checks if check.state == state] for state in ("problem", "note"))
    if problems:
        return f"a run would fail here: {', '.join(problems)}"
    return f"a run works here; see the notes on {', '.join(notes)}" if notes else "a run works here"
