"""`ray-dmml`: parse, build, run. No algorithm here."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Annotated

import typer
from rich.console import Console

from ray_dmml.config.document import documented_yaml
from ray_dmml.config.loading import QUICKSTART, read_settings, refuse_old
from ray_dmml.config.schema import Config
from ray_dmml.errors import Interrupted, UserError
from ray_dmml.training.run_dir import RunDir
from ray_dmml.tune.search_space import Search, load_search

app = typer.Typer(
    name="ray-dmml",
    help="Diversified mutual learning for image retrieval: peers that learn from each other, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(
    help="Look at a data set, and bring it to where it is read.", no_args_is_help=True
)
app.add_typer(data_app, name="data")

FINDINGS = 1
USER_ERROR = 2
INTERRUPTED = 130


class Weights(StrEnum):
    """Which weights of a run."""

    last = "last"
    best = "best"
    ema = "ema"


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="YAML config; none: the built-in quickstart."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Of a Ray cluster: auto (this node's), HOST:PORT; default: RAY_ADDRESS, or this machine.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, such as train.steps=500 or cohort.peers.1.update_interval=4. Repeatable.",
    ),
]


@app.command()
def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the new run; default: runs/DATA-TIME."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Continue a run from its last checkpoint, or extend it; of a URI, into --out.",
        ),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Start from the weights of another run's peers."),
    ] = None,
    address: Address = None,
    local: Annotated[
        bool, typer.Option("--local", help="All peers in this process, without Ray.")
    ] = False,
) -> None:
    """Train a cohort of peers and judge it on unseen classes.

    With no argument: the quickstart on built-in data, no download, a few minutes on two cores.
    """
    console = Console()
    began = time.monotonic()
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    signals = _Signals(console)
    with user_errors(), _told_how_to_resume(console, signals) as run:
        old: Path | None = None
        if resume is not None:
            if init_from is not None:
                raise UserError(
                    "--resume goes on from a run's own checkpoint: it takes no --init-from"
                )
            if out is not None and "://" not in resume:
                raise UserError("--resume continues a run in its folder: it takes no --out")
            old = _local_run(resume, out)
            run.append(old)
            out = None
            settings = _resumed_config(old, config, overrides)
        else:
            settings = Config.load(config, overrides or ())
            if init_from is not None:
                started = settings.train.model_copy(update={"init_from": init_from.resolve()})
                settings = settings.model_copy(update={"train": started})
            out = out or Path("runs") / f"{settings.data.name}-{datetime.now():%Y%m%d-%H%M%S}"
            run.append(out)
            RunDir(out).ensure_empty()  # before anything takes time
        with _ray_and_training(local):
            from ray_dmml.loggers.console import LiveReporter, PlainReporter, elapsed, results_table
            from ray_dmml.training.trainer import train as train_cohort

            signals.listen()
            results = train_cohort(
                settings,
                out,
                resume=old,
                local=local,
                reporter=LiveReporter(console) if console.is_terminal else PlainReporter(console),
                should_stop=signals.should_stop,
            )
        results_table(results, console)
        told = f"run: {old or out}  ({elapsed(began)})"
        console.print(told, highlight=False, markup=False, soft_wrap=True)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    weights: Annotated[
        Weights | None, typer.Option(help="Which weights; default: those the run was judged by.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Judge a run's checkpoint on its test classes again."""
    with user_errors():
        from ray_dmml.loggers.console import results_table
        from ray_dmml.training.trainer import evaluate as evaluate_run

        results = evaluate_run(run, weights.value if weights else None)
        if as_json:
            print(json.dumps(results, indent=1))
        else:
            results_table(results, Console())


@app.command()
def tune(
    config: ConfigFile = None,
    overrides: Overrides = None,
    space: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML of what to search; none: the quickstart's."),
    ] = None,
    storage: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the search; default: runs/tune-TIME."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with the search in this folder.")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Trials.")] = None,
    search: Annotated[str | None, typer.Option(help="optuna or random.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="asha, pbt or none.")] = None,
    final_seeds: Annotated[
        int | None, typer.Option(help="Final runs of each setting; 0: none.")
    ] = None,
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(min=0, help="Shared by the peers; default: one, if there are any."),
    ] = None,
    address: Address = None,
) -> None:
    """Search loss weights and diversities on validation classes, then train the best anew.

    With no argument: the quickstart's weights, updates and views.
    """
    console = Console()
    began = time.monotonic()
    folder = resume or storage or Path("runs") / f"tune-{datetime.now():%Y%m%d-%H%M%S}"
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    with user_errors(), _told_how_to_go_on(console, folder):
        asked = None
        changes = {
            "num_samples": num_samples,
            "search": search,
            "scheduler": scheduler,
            "final_seeds": final_seeds,
        }
        if resume is not None:
            asked_now = {"config": config, "set": overrides, "space": space, "storage": storage}
            given = [
                f"--{name.replace('_', '-')}"
                for name, value in (asked_now | changes).items()
                if value not in (None, [])
            ]
            if given:
                raise UserError(
                    "--resume goes on with the search as it was asked for: leave out "
                    f"{', '.join(given)}, or begin another search with --storage"
                )
        else:
            if config is not None and space is None:
                raise UserError(
                    "a search of your own config needs its --space; "
                    "experiments/searches/grocery.yaml is an example"
                )
            raw = read_settings(config or QUICKSTART, overrides or ())
            asked = Search(raw, load_search(space, **changes))
        with _ray_and_training(local=False):
            from ray_dmml.loggers.console import PlainReporter, TrialsTable, elapsed, final_table
            from ray_dmml.tune.tuner import SearchFolder, run_search

            table = TrialsTable(console, asked or SearchFolder(folder).search())
            with table:
                final = run_search(
                    folder,
                    asked,
                    gpus_per_trial=gpus_per_trial,
                    watch=table.show,
                    reporter=PlainReporter(console),
                )
        if final["best"]["test"]:
            final_table(final, table.search, console)
        told = f"search: {folder}, best setting: {folder / 'best.yaml'}  ({elapsed(began)})"
        console.print(told, highlight=False, markup=False, soft_wrap=True)


@app.command(name="config")
def show_config(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Print the effective config with what each setting means, as YAML."""
    with user_errors():
        print(documented_yaml(Config.load(config, overrides or ())), end="")


@data_app.command()
def check(
    config: ConfigFile = None,
    overrides: Overrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all findings, too.")
    ] = None,
) -> None:
    """Look a data set over: unreadable, double and mislabelled images, small classes.

    Exit code 0: nothing to mend; 1: there are findings; 2: it cannot be loaded.
    """
    with user_errors():
        settings = Config.load(config, overrides or ()).data
        from rich.progress import Progress

        from ray_dmml.data.audit import audit, print_report

        console, aside = Console(), Console(stderr=True)
        with Progress(console=aside, transient=True, disable=not aside.is_terminal) as progress:
            task = progress.add_task("decoding", total=None)
            report = audit(
                settings,
                watch=lambda done, total: progress.update(task, completed=done, total=total),
            )
        if json_file is not None:
            try:
                json_file.write_text(json.dumps(report.to_json(), indent=1))
            except OSError as error:
                raise UserError(f"{json_file} cannot be written: {error.strerror}") from None
        print_report(report, console)
    if not report.is_clean():
        raise typer.Exit(FINDINGS)


@data_app.command()
def fetch(config: ConfigFile = None, overrides: Overrides = None, address: Address = None) -> None:
    """Download or copy the images to this machine, or to every node of a cluster, and verify them.

    A run does the same for each node it comes to; here it is done before nodes are paid for waiting.
    """
    console = Console()

    def told(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with user_errors():
        settings = Config.load(config, overrides or ()).data
        address = address or os.environ.get("RAY_ADDRESS")
        if address is None:
            from ray_dmml.data.datasets import prepare

            told(prepare(settings))
            return
        os.environ["RAY_ADDRESS"] = address
        from ray_dmml.ray_backend.data_staging import prepare_everywhere
        from ray_dmml.ray_backend.session import ray_session

        failed = []
        with ray_session():
            for node, outcome in prepare_everywhere(settings):
                if isinstance(outcome, UserError):
                    failed.append(f"{node}: {outcome}")
                else:
                    told(f"{node}: {outcome}")
        if failed:
            raise UserError("\n".join(failed))


def _local_run(resume: str, out: Path | None) -> Path:
    """The run's folder; one that is in a storage is fetched first."""
    if "://" not in resume:
        return Path(resume)
    from ray_dmml.checkpoint.remote import RemoteRun

    into = out or Path("runs") / resume.partition("?")[0].rstrip("/").rpartition("/")[2]
    RemoteRun(resume).fetch(into)
    return into


def _resumed_config(run: Path, config: Path | None, overrides: list[str] | None) -> Config:
    stored = RunDir.open(run).config_file
    path = config or stored
    raw = read_settings(path, overrides or ())
    refuse_old(raw, path)
    return Config.parse(raw, source=str(path))


@contextmanager
def _ray_and_training(local: bool) -> Iterator[None]:
    """Ray takes seconds to start its processes, and Python as long to import torch: both at once."""
    if local:
        yield
        return
    from ray_dmml.ray_backend.session import ray_session

    loading = Thread(target=import_module, args=("ray_dmml.training.trainer",))
    loading.start()
    try:
        with ray_session():
            loading.join()
            yield
    finally:
        loading.join()  # Python cannot end amid the import of torch


@contextmanager
def user_errors() -> Iterator[None]:
    """A user's mistake is one message on standard error, not a traceback."""
    try:
        yield
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(USER_ERROR) from None


class _Signals:
    """Ctrl-C or SIGTERM: the first asks the run to stop after its step, the second ends it now."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.received = 0
        """The first signal; 0: none."""

    def listen(self) -> None:
        """From now on the run can stop by itself; before, every signal ends the process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def should_stop(self) -> bool:
        return self.received != 0

    def _handle(self, number: int, frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        told = "stopping after this step, with a checkpoint; once more: stop now"
        with suppress(RuntimeError):  # amid another print; the signal counts all the same
            self._console.print(told, highlight=False)

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 and the signal's number."""
        return 128 + (self.received or signal.SIGINT)


@contextmanager
def _told_how_to_resume(console: Console, signals: _Signals) -> Iterator[list[Path]]:
    run: list[Path] = []
    try:
        yield run
    except (KeyboardInterrupt, Interrupted) as end:
        if isinstance(end, Interrupted):
            console.print(str(end), highlight=False)
        if run and RunDir(run[0]).checkpoints.index():
            told = f"interrupted; go on with: ray-dmml train --resume {run[0]}"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
        else:
            console.print("interrupted")
        raise typer.Exit(signals.exit_code) from None


@contextmanager
def _told_how_to_go_on(console: Console, folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.print("interrupted")
        if (folder / "search.yaml").exists():
            told = f"go on with: ray-dmml tune --resume {folder}"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


def main() -> None:
    """The entry point."""
    # Hubs that timm asks for weights log every retry; the one message of ours says it all.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    app()


if __name__ == "__main__":
    main()
