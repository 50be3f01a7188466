"""``ray-dmml tune``"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_dmml.cli.lifecycle import Interruptible, ray_and_torch
from ray_dmml.cli.options import Address, AsJson, ConfigFile, Overrides, path, use_address
from ray_dmml.cli.output import elapsed, print_json, print_line, show_log, user_errors
from ray_dmml.errors import UserError
from ray_dmml.loggers.output import Console

if TYPE_CHECKING:
    from ray_dmml.config.schema import Config
    from ray_dmml.loggers.logger import Logger
    from ray_dmml.tune.search_space import Search


def tune(
    config: ConfigFile = None,
    overrides: Overrides = None,
    space: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="YAML of the space and the options. Default: the quickstart's."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(parser=path, metavar="DIR", help="Folder of the new search. Default: runs/tune-TIME.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(parser=path, metavar="DIR", help="Continue the search in this folder.")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(metavar="N", help="Number of trials. Default: 8.")] = None,
    sampler: Annotated[
        str | None, typer.Option(metavar="optuna|random", help="Default: optuna if it is installed, else random.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="asha|none", help="asha stops worse trials early. Default: asha.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Seeds of each trial; more than 1 need --scheduler none. Default: 1."),
    ] = None,
    final_seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Final runs of the best trial and of the baseline on test classes. Default: 3."),
    ] = None,
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="NUMBER", help="GPUs that the peers of a trial share. Default: 1, if there is any."
        ),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Search loss weights and diversities on validation classes, then train the best trial again.

    Without arguments it searches the quickstart's loss weights and its three diversities.
    """
    console, began = Console(stderr=as_json), time.monotonic()
    use_address(address)
    folder = resume or out or Path("runs") / f"tune-{datetime.now():%Y%m%d-%H%M%S}"
    changes = dict(num_samples=num_samples, sampler=sampler, scheduler=scheduler, seeds=seeds, final_seeds=final_seeds)
    with user_errors(), Interruptible(console) as signals, show_log(console):
        from ray_dmml.training.quick_check import check_quickly
        from ray_dmml.training.run_dir import RunDir

        if resume is None:
            RunDir(folder).ensure_empty()  # before anything takes time
            search = _new_search(config, overrides, space, changes)
        else:
            search = _resumed_search(folder, config=config, set=overrides, space=space, out=out, **changes)
        signals.resume_with(f"ray-dmml tune --resume {quote(str(folder))}", folder / "search.yaml")
        check_quickly(search.trial_config({}), on_this_machine="RAY_ADDRESS" not in os.environ)
        with ray_and_torch(console):
            from ray_dmml.loggers.console import show_run
            from ray_dmml.tune.progress import TrialsTable, final_table
            from ray_dmml.tune.tuner import run_search

            with TrialsTable(console, search) as table:

                def make_logger(run_config: Config) -> AbstractContextManager[Logger]:
                    table.stop()  # The trials have ended.
                    return show_run(console, run_config)

                final = run_search(
                    folder,
                    None if resume else search,
                    gpus_per_trial=gpus_per_trial,
                    watch=table.show,
                    make_logger=make_logger,
                )
        if as_json:
            print_json(final)
        elif final["best"]["test"]:
            final_table(final, search, console)
        print_line(console, f"search: {folder}, best parameters: {folder / 'best.yaml'}  ({elapsed(began)})")


def _new_search(
    config: Path | None, overrides: list[str] | None, space: Path | None, changes: dict[str, Any]
) -> Search:
    if config is not None and space is None:
        raise UserError("a search of your own config needs its --space, such as experiments/searches/grocery.yaml")
    from ray_dmml.config.loading import QUICKSTART, read_settings
    from ray_dmml.tune.search_space import Search, load_search

    return Search(read_settings(config or QUICKSTART, overrides or ()), load_search(space, **changes))


def _resumed_search(folder: Path, **options: Any) -> Search:
    """Raises UserError if options of a new search are given."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, [])]
    if given:
        raise UserError(
            "--resume continues a search with its own settings: leave out "
            f"{', '.join(given)}, or start another search with --out"
        )
    from ray_dmml.tune.results import SearchDir

    return SearchDir(folder).search()
