"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def path(text: str) -> Path:
    """The parser of options and arguments that are paths. An empty one, often of an unset variable of a shell, would
    be the current folder."""
    if not text:
        raise typer.BadParameter("the path is empty")
    return Path(text)


def not_empty(text: str) -> str:
    """The parser of a path or URI."""
    return str(text if "://" in text else path(text))


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", parser=path, metavar="FILE", help="YAML config. Default: the quickstart."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as train.steps=500. Repeatable."),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Ray cluster: auto (this node's) or HOST:PORT. Default: RAY_ADDRESS, or a private Ray on this machine.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the results as JSON. Everything else goes to standard error.")
]


def use_address(address: str | None) -> None:
    """Makes ``--address`` the cluster of every Ray session of this process."""
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
