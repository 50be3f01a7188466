"""``ray-dmml train``"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from ray_dmml.cli.lifecycle import Interruptible, ray_and_torch
from ray_dmml.cli.options import (
    Address,
    AsJson,
    ConfigFile,
    NewRun,
    Overrides,
    TrainLocally,
    not_empty,
    path,
    use_address,
)
from ray_dmml.cli.output import elapsed, print_json, print_line, show_log, user_errors
from ray_dmml.errors import UserError
from ray_dmml.loggers.output import Console
from ray_dmml.loggers.results_tables import results_table

if TYPE_CHECKING:
    from ray_dmml.config.schema import Config


def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: NewRun = None,
    resume: Annotated[
        str | None,
        typer.Option(
            parser=not_empty,
            metavar="RUN",
            help="Continue a run from its last checkpoint, or extend it by more train.steps. RUN is a "
            "folder, or the URI of a copy, which is first fetched into --out.",
        ),
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(parser=path, metavar="RUN", help="Start from the weights of another run's peers.")
    ] = None,
    address: Address = None,
    local: TrainLocally = False,
    as_json: AsJson = False,
) -> None:
    """Train a cohort of peers and evaluate it on classes that are not in the training set.

    Without arguments it trains the quickstart: built-in data, no download, a few minutes on two cores.
    """
    console, began = Console(stderr=as_json), time.monotonic()
    use_address(address)
    with user_errors(), Interruptible(console) as signals, show_log(console):
        from ray_dmml.training.quick_check import check_quickly
        from ray_dmml.training.run_dir import RunDir

        if resume is None:
            settings = _new_config(config, overrides, init_from)
            run = out or default_folder(settings)
            RunDir(run).ensure_empty()  # before anything takes time
        else:
            run = _resumed_run(resume, out, init_from)
            settings = _resumed_config(run, config, overrides)
        check_quickly(
            settings,
            on_this_machine=local or "RAY_ADDRESS" not in os.environ,
            reads_weights=resume is None or not RunDir(run).checkpoints.index(),
        )
        train_and_show(settings, run, console, signals, began, resume=bool(resume), local=local, as_json=as_json)


def train_and_show(
    settings: Config,
    run: Path,
    console: Console,
    signals: Interruptible,
    began: float,
    *,
    resume: bool = False,
    local: bool,
    as_json: bool,
) -> None:
    """Trains in the folder ``run`` with a display on the console, and prints the results. ``began`` is the
    ``time.monotonic()`` at which the command began."""
    from ray_dmml.training.run_dir import RunDir

    discard = None if resume else RunDir(run).discard
    signals.resume_with(f"ray-dmml train --resume {quote(str(run))}", run / "checkpoints" / "index.json", discard)
    with nullcontext() if local else ray_and_torch(console), signals.end_early():
        from ray_dmml.loggers.console import show_run
        from ray_dmml.training.run import train as train_cohort

        with show_run(console, settings) as console_logger:
            results = train_cohort(
                settings,
                None if resume else run,
                resume=run if resume else None,
                local=local,
                progress=False,
                loggers=[console_logger, signals],
                should_stop=signals.should_stop,
            )
    if as_json:
        print_json(results)
    else:
        results_table(results, console)
    if settings.train.report and (report := RunDir(run).report_file).exists():
        print_line(console, f"report: {report}")
    print_line(console, f"run: {run}  ({elapsed(began)})")


def default_folder(settings: Config) -> Path:
    """``module:function`` names a data set of one's own; scp and rsync take what is before a colon for a host."""
    return Path("runs") / f"{settings.data.name.replace(':', '-')}-{datetime.now():%Y%m%d-%H%M%S}"


def _new_config(config: Path | None, overrides: list[str] | None, init_from: Path | None) -> Config:
    from ray_dmml.config.loading import QUICKSTART
    from ray_dmml.config.schema import Config

    settings = Config.load(config or QUICKSTART, overrides or ())
    return settings if init_from is None else settings.with_overrides({"train.init_from": init_from})


def _resumed_run(resume: str, out: Path | None, init_from: Path | None) -> Path:
    """The folder of the run to resume. The copy at a URI is fetched into a folder first."""
    if init_from is not None:
        raise UserError("--resume continues from the run's own checkpoint: it takes no --init-from")
    if "://" not in resume:
        if out is not None:
            raise UserError("--resume continues a run in its own folder: give no --out")
        return Path(resume)
    from ray_dmml.checkpoint.remote import RemoteRun

    into = out or Path("runs") / resume.partition("?")[0].rstrip("/").rpartition("/")[2]
    RemoteRun(resume).fetch(into)
    return into


def _resumed_config(run: Path, config: Path | None, overrides: list[str] | None) -> Config:
    from ray_dmml.config.loading import read_settings, refuse_old
    from ray_dmml.config.schema import Config
    from ray_dmml.training.run_dir import RunDir

    path = config or RunDir.open(run).config_file
    refuse_old(read_settings(path), path)
    return Config.load(path, overrides or ())
