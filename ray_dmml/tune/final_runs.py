"""The final runs of a search: the best trial and the baseline, on all training classes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.loggers.logger import Logger
from ray_dmml.training.run import train
from ray_dmml.training.run_dir import RunDir
from ray_dmml.tune.results import SearchDir
from ray_dmml.tune.search_space import Params, Search, changed
from ray_dmml.tune.trial import Trial

logger = logging.getLogger(__name__)

LoggerFactory = Callable[[Config], AbstractContextManager[Logger]]
"""Makes the logger of one final run from its config."""


def no_logger(config: Config) -> AbstractContextManager[Logger]:
    return nullcontext(Logger())


def final_runs(
    files: SearchDir,
    search: Search,
    best: Trial,
    trials: Sequence[Trial],
    make_logger: LoggerFactory = no_logger,
    *,
    has_test_classes: bool = True,
    local: bool = False,
) -> dict[str, Any]:
    """Trains the best trial and the baseline with several seeds and evaluates them on the test classes.

    A run that is finished is read, and one that was killed is continued. A run that fails does not stop the others.

    Args:
        make_logger: makes the logger of each run.
        has_test_classes: False: nothing is trained, because nothing could be compared.
        local: train all peers in this process, without Ray.

    Returns:
        the content of ``final.json``: ``best`` and ``baseline``, each with ``params`` (setting to value),
        ``validation`` (the trial's objective, None if it did not finish) and ``test`` (for each seed the metrics of
        the ``peers`` that learn and of the ``ensemble``, or ``error``).

    Raises:
        UserError: all runs failed.
    """
    baseline = next((trial.objective for trial in trials if trial.is_baseline and trial.finished), None)
    parts: dict[str, tuple[Params, float | None]] = {
        "best": (best.params, best.objective),
        "baseline": (search.baseline, baseline),
    }
    final: dict[str, Any] = {}
    for name, (params, validation) in parts.items():
        if name == "baseline" and best.params == search.baseline:
            final[name] = final["best"]
            continue
        runs: list[dict[str, Any]] = []
        # Another trial may be the best after a resume, so its runs have the trial's name.
        run_name = "baseline" if params == search.baseline else best.name
        config = search.config_of(params)
        num_seeds = search.config.final_seeds if has_test_classes else 0
        for seed in range(config.seed, config.seed + num_seeds):
            logger.info("final run: %s, seed %d", name, seed)
            folder = files.final_folder / f"{run_name}-seed{seed}"
            try:
                results = _results_of(folder, _final_config(config, seed), make_logger, local)
                peers = {name: row for name, row in results["peers"].items() if name in config.cohort.learners}
                runs.append({"seed": seed, "peers": peers, "ensemble": results["ensemble"]})
            except UserError as error:
                logger.warning("final run: %s, seed %d failed: %s", name, seed, error)
                runs.append({"seed": seed, "error": str(error)})
        values = {key: search.config.space[key].value(sample) for key, sample in params.items()}
        final[name] = {"params": values, "validation": validation, "test": runs}
    errors = [run.get("error") for part in final.values() for run in part["test"]]
    if errors and all(errors):
        raise UserError(errors[0])
    return final


def _results_of(folder: Path, config: Config, make_logger: LoggerFactory, local: bool) -> dict[str, Any]:
    run = RunDir(folder)
    if run.results_file.exists():
        return dict(json.loads(run.results_file.read_text()))
    with make_logger(config) as run_logger:
        if run.config_file.exists():
            return train(resume=folder, progress=False, loggers=[run_logger], local=local)
        shutil.rmtree(folder, ignore_errors=True)
        return train(config, folder, progress=False, loggers=[run_logger], local=local)


def _final_config(config: Config, seed: int) -> Config:
    # Without validation classes there are no best weights.
    weights = "ema" if config.evaluation.weights == "ema" else None
    return changed(
        config.model_copy(update={"seed": seed}),
        data={"validation_fraction": 0.0},
        train={"early_stopping": None},
        evaluation={"split": "test", "untrained": False, "weights": weights},
        checkpoint={"storage_path": None},  # A storage has room for one run.
    )
