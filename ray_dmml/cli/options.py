"""Options that several commands share."""

from __future__ import annotations

import os
from enum import StrEnum
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
Run = Annotated[Path, typer.Argument(parser=path, metavar="RUN", help="Folder of a run.")]
NewRun = Annotated[
    Path | None,
    typer.Option(parser=path, metavar="DIR", help="Folder of the new run. Default: runs/NAME-TIME, after data.name."),
]
MovedRun = Annotated[
    Path | None,
    typer.Option(parser=path, metavar="RUN", help="The run that has embedded the images, if it has moved."),
]
Weights = StrEnum("Weights", ["last", "best", "ema"])
RunWeights = Annotated[
    Weights | None,
    typer.Option(metavar="last|best|ema", help="Weights of the peers. Default: those of the run's own results."),
]
OtherImages = Annotated[
    Path | None,
    typer.Option(
        "--data",
        parser=path,
        metavar="PLACE",
        help="Other images: a folder with one folder a class, or a manifest (CSV). Default: those of the run.",
    ),
]
TrainLocally = Annotated[bool, typer.Option("--local", help="Train all peers in this process, without Ray.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Run the Python code that the run's config names.")]


def use_address(address: str | None) -> None:
    """Makes ``--address`` the cluster of every Ray session of this process."""
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
