"""A hyperparameter search on Ray Tune. Every trial trains a cohort; validation classes compare them.

    sample parameters -> trial: train, report at each evaluation -> the scheduler continues or stops it then: final
    runs of the best trial and of the baseline, evaluated on the test classes

Each trial keeps its own record on disk. A killed search continues every trial where it stood.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ray import cloudpickle, tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from ray_dmml.atomic_files import replace_file
from ray_dmml.config.parts import load_parts
from ray_dmml.errors import CheckpointError, UserError
from ray_dmml.ray_backend.session import ray_session
from ray_dmml.training.images import read_images
from ray_dmml.training.run_dir import RunDir
from ray_dmml.tune.final_runs import LoggerFactory, final_runs, no_logger
from ray_dmml.tune.report import write_report
from ray_dmml.tune.resources import known_nodes, require_resources, trial_resources
from ray_dmml.tune.results import SearchDir, best_trial, pareto_front, tie_message, write_results
from ray_dmml.tune.search_space import Distribution, Params, Search
from ray_dmml.tune.trial import COST, OBJECTIVE, STEP, Trial, run_trial

logger = logging.getLogger(__name__)

Watch = Callable[[Sequence[Trial]], None]
"""Receives all trials whenever one of them has changed."""


def run_search(
    folder: Path,
    search: Search | None = None,
    *,
    gpus_per_trial: float | None = None,
    watch: Watch = lambda trials: None,
    make_logger: LoggerFactory = no_logger,
) -> dict[str, Any]:
    """Runs the trials, then trains the best one and the baseline with several seeds.

    Args:
        folder: for the files of the search.
        search: a new search; None: resume the one in the folder.
        gpus_per_trial: GPUs that the peers of a trial share; None: one, if the cluster has any.
        watch: receives all trials whenever one of them has changed.
        make_logger: makes the logger of each final run.

    Returns:
        the content of ``final.json``, see :func:`~ray_dmml.tune.final_runs.final_runs`.

    Raises:
        UserError: the folder has other files or no search, the trials do not fit on the cluster, or no trial
            finished.
    """
    files = SearchDir(folder)
    is_new = search is not None
    if search is None:
        search = files.search()
    else:
        RunDir(files.path).ensure_empty()
    for config in search.config_variants():
        load_parts(config)
    # Every trial reads the same images. An error in them is reported once, before any trial.
    splits = read_images(search.trial_config({}))
    with ray_session():
        require_resources(search, known_nodes(), gpus_per_trial)
        if is_new:
            files.create(search)
        with RunDir(files.path).lock():
            _run_trials(files, search, gpus_per_trial, watch)
            trials = files.trials(ended=True)
            write_results(files, search, trials)
            best = best_trial(trials)
            if message := tie_message(trials, best):
                logger.info(message)
            replace_file(files.best_file, search.config_of(best.params).to_yaml())
            front = pareto_front(trials) if search.config.cost else []
            write_report(files.report_file, search, trials, best, None, front)
            has_test_classes = splits.test is not None
            if search.config.final_seeds and not has_test_classes:
                logger.info("no final runs, because there are no test classes; best.yaml has the best parameters")
            final = final_runs(files, search, best, trials, make_logger, has_test_classes=has_test_classes)
    replace_file(files.final_file, json.dumps(final, indent=1) + "\n")
    write_report(files.report_file, search, trials, best, final, front)
    return final


def _run_trials(files: SearchDir, search: Search, gpus_per_trial: float | None, watch: Watch) -> None:
    """Runs all trials, and meanwhile keeps ``results.csv`` up to date."""
    _configure_tune()
    nodes = known_nodes()

    def resources(params: dict[str, Any]) -> tune.PlacementGroupFactory:
        try:
            config = search.trial_config(params)
        except UserError:  # The parameters do not fit together. The trial will report it.
            config = search.trial_config({})
        return trial_resources(config, nodes, gpus_per_trial)

    trainable = tune.with_resources(tune.with_parameters(_trainable, search=search, folder=files.path), resources)
    if can_restore(files, search.config.sampler_name):
        tuner = tune.Tuner.restore(str(files.tune_state), trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={key: _domain(distribution) for key, distribution in search.config.space.items()},
            tune_config=tune.TuneConfig(
                num_samples=search.config.num_samples,
                search_alg=make_sampler(search),
                scheduler=make_scheduler(search),
                reuse_actors=True,  # with its peers, see ray_backend/resting_peers.py
            ),
            run_config=tune.RunConfig(
                name=files.tune_state.name,
                storage_path=str(files.path),
                verbose=0,
                callbacks=[EndedTrials(search.baseline)],
            ),
        )
    stop, completed = Event(), Event()
    watcher = Thread(target=watch_trials, args=(files, search, watch, stop, completed))
    watcher.start()
    try:
        record_lost_trials(files, tuner.fit())
        completed.set()
    finally:
        stop.set()
        watcher.join()


def _configure_tune() -> None:
    # results.csv has the reason of a failed trial; Ray Tune would print tracebacks.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Ray Tune counts the reports of a resumed trial from 1 again, and Optuna would warn about it.
    warnings.filterwarnings("ignore", "The reported value is ignored", UserWarning)
    # Ray Tune saves its state after every report, so that a killed search loses no sample.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Ray Tune's handler would end the trials at Ctrl-C and go on to the final runs.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"


def _trainable(params: dict[str, Any], search: Search, folder: Path) -> None:
    """One trial, in a process that did earlier ones, perhaps. Its peers are actors beside it."""
    # A stopped trial gets this long to end before Ray Tune gives its process up.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "30"
    name = tune.get_context().get_trial_id()
    run_trial(params, search, SearchDir(folder).trial_folder(name), tune.report)


def can_restore(files: SearchDir, sampler: str) -> bool:
    """Whether Ray Tune's state is complete. If the search was killed before any trial trained, the remains are
    removed, and the search can start again.

    Raises:
        UserError: trials have trained, and the state is missing or damaged.
    """
    state = files.tune_state
    newest = _newest(state, "experiment_state-*.json")
    with suppress(OSError, ValueError):
        is_whole = newest and json.loads(newest.read_text()) and tune.Tuner.can_restore(str(state))
        if is_whole and _sampler_is_whole(state, sampler):
            return True
    # A trial of several runs has no report before its last run, but it has checkpoints.
    if any(files.trials_folder.glob("*/fold*/checkpoints/*")):
        raise UserError(
            f"Ray Tune's state {state} is {'damaged' if newest else 'missing'}: this search cannot be "
            f"resumed. The results of its trials are in {files.results_file}; start another search with --out"
        )
    for folder in (state, files.trials_folder):
        shutil.rmtree(folder, ignore_errors=True)
    files.trials_folder.mkdir(parents=True)
    return False


def _sampler_is_whole(state: Path, sampler: str) -> bool:
    """Whether the state of the sampler can be read. Without it Ray Tune would fail later, or leave out trials."""
    patterns = ["search_gen_state-*", "searcher-state-*"] if sampler == "optuna" else ["basic-variant-state-*"]
    for file in (_newest(state, pattern) for pattern in patterns):
        if file is None:
            return sampler == "random"  # The experiment's state has the random samples as well.
        try:
            cloudpickle.loads(file.read_bytes())
        except Exception:  # A pickle that is cut off, or of another version, raises anything.
            return False
    return True


def _newest(folder: Path, pattern: str) -> Path | None:
    return max(folder.glob(pattern), default=None, key=lambda file: file.name)


def _domain(distribution: Distribution) -> Any:
    """Ray Tune's form of a distribution."""
    if distribution.integer is not None:
        low, high = distribution.integer
        return tune.randint(low, high + 1)
    if distribution.uniform is not None:
        return tune.uniform(*distribution.uniform)
    if distribution.loguniform is not None:
        return tune.loguniform(*distribution.loguniform)
    return tune.choice(distribution.labels)


def make_sampler(search: Search) -> Searcher | SearchAlgorithm:
    """Its first sample is the baseline."""
    config, first = search.config, [dict(search.baseline)]
    if config.sampler_name == "random":
        return BasicVariantGenerator(points_to_evaluate=first, random_state=config.seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tpe = optuna.samplers.TPESampler(
        multivariate=True, seed=config.seed, n_startup_trials=max(3, config.num_samples // 4)
    )
    return OptunaSearch(
        metric=[OBJECTIVE, COST] if config.cost else OBJECTIVE,
        mode=["max", "min"] if config.cost else "max",
        points_to_evaluate=first,
        sampler=tpe,
    )


def make_scheduler(search: Search) -> TrialScheduler:
    if search.config.scheduler == "none":
        return FIFOScheduler()
    train = search.trial_config({}).train
    return _ResumableASHA(
        time_attr=STEP,
        metric=OBJECTIVE,
        mode="max",
        max_t=max(config.train.steps for config in search.config_variants()),
        grace_period=min(train.evaluate_every or train.steps, train.steps),
        reduction_factor=search.config.reduction_factor,
    )


class _ResumableASHA(ASHAScheduler):
    """ASHA that remembers the reports of a resumed search's trials. Ray's own would compare a trial's report of a
    later step with other trials' reports of an earlier one."""

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        super().on_trial_add(tune_controller, trial)
        file = _record_of(trial)
        if file.exists():
            for report in Trial.load(file).reports:
                self._trial_info[trial.trial_id].on_result(trial, report[STEP], report[OBJECTIVE])


class EndedTrials(tune.Callback):
    """Completes the records of trials that cannot do it themselves."""

    def __init__(self, baseline: Params) -> None:
        self.baseline = dict(baseline)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A trial that the scheduler stops is killed within its last report."""
        # If the disk is full: run_search sets it again when the search has ended.
        with suppress(OSError, CheckpointError):
            record = Trial.load(_record_of(trial))
            if not record.finished:
                record.ended = True
                record.save(_record_of(trial))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A process that is killed at its start has no record, which :func:`record_lost_trials` needs."""
        file, params = _record_of(trial), dict(trial.config)
        with suppress(OSError, CheckpointError):
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                is_baseline = params == self.baseline
                Trial(trial.trial_id, params, start_time=time.time(), is_baseline=is_baseline).save(file)


def _record_of(trial: TuneTrial) -> Path:
    """The trial.json of Ray Tune's trial. The folder may have been moved since the search began."""
    return SearchDir(Path(trial.remote_experiment_path).parent).trial_file(trial.trial_id)


def record_lost_trials(files: SearchDir, results: Iterable[tune.Result]) -> None:
    """Writes Ray Tune's reason to the records of trials whose processes were killed."""
    lost = {Path(each.path).name: each.error for each in results if each.error and each.path}
    for trial in files.trials():
        # The name of Ray Tune's folder has the trial's name in it.
        error = next((lost[folder] for folder in lost if f"_{trial.name}_" in folder), None)
        if error is not None and trial.error is None and not trial.finished:
            trial.error = str(error).strip().splitlines()[-1]
            trial.save(files.trial_file(trial.name))


def watch_trials(files: SearchDir, search: Search, watch: Watch, stop: Event, completed: Event) -> None:
    """Passes changed trials to ``watch`` and to ``results.csv``, until ``stop`` and once more after it.

    Args:
        completed: all trials have ended; nothing interrupted the search.
    """
    seen: list[Trial] = []
    is_last = False
    while not is_last:
        is_last = stop.wait(timeout=1.0)
        trials = files.trials(ended=completed.is_set())
        if trials != seen:
            watch(trials)
            seen = trials
            # If the disk is full: run_search writes the file again at the end.
            with suppress(OSError, CheckpointError):
                write_results(files, search, trials)
