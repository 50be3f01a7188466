"""The command ``ray-dmml``: one module for each subcommand. This one stays quick to import."""

from __future__ import annotations

import io
import logging
import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from ray_dmml.cli.command import Command, Group
from ray_dmml.cli.compare import compare
from ray_dmml.cli.config import config
from ray_dmml.cli.data import data_app
from ray_dmml.cli.distill import distill
from ray_dmml.cli.doctor import doctor
from ray_dmml.cli.embed import embed
from ray_dmml.cli.evaluate import evaluate
from ray_dmml.cli.export import export
from ray_dmml.cli.index import index
from ray_dmml.cli.push import push
from ray_dmml.cli.report import report
from ray_dmml.cli.search import search
from ray_dmml.cli.serve import serve
from ray_dmml.cli.train import train
from ray_dmml.cli.tune import tune
from ray_dmml.cli.views import views

app = typer.Typer(
    name="ray-dmml",
    cls=Group,
    help="Diversified mutual learning for image retrieval: peers that learn from each other, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _command in (
    *(train, evaluate, report, compare, embed, index, search, serve, export, push, tune, distill, views),
    *(config, doctor),
):
    app.command(cls=Command)(_command)
app.add_typer(data_app, name="data")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"ray-dmml {metadata.version('ray-dmml')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point."""
    # The hub that timm downloads weights from logs every retry. Our one error message is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # A terminal may not have every character of a name. That is no reason to fail after finished work.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
