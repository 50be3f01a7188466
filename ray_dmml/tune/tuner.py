"""A search on Ray Tune: every trial trains a cohort and is judged on validation classes alone.

    propose settings -> trial: train, report at each evaluation -> the scheduler goes on or ends it
    then: the best setting and the config as it is, on all training classes, with several seeds,
    judged on the test classes

    FOLDER/
        search.yaml           the settings and the search, as they were asked for
        ray/                  Ray Tune's own state
        trials/ID/            trial.json (draw, figures at each report, error) and the trial's run
        results.csv           a line a trial
        best.yaml             the config with the best draw: ray-dmml train --config best.yaml
        final/ID-seedN/       the final runs of the best trial; default-seedN: of the config as it is
        final.json, report.html

What a trial has reported is in its own folder, written by the trial: a search that is killed goes on
with every trial where that one stood.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import ray
from pydantic import ValidationError
from ray import cloudpickle, tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from ray_dmml.config import yamlio
from ray_dmml.config.loading import read_yaml, refuse_old
from ray_dmml.config.messages import explain
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.errors import CheckpointError, UserError
from ray_dmml.ray_backend.placement import (
    Node,
    bundle,
    cluster_nodes,
    have_places,
    lowered,
    require_labels,
    shown,
    with_labels,
)
from ray_dmml.ray_backend.session import only_at, ray_session
from ray_dmml.training.run_dir import RunDir, replace_file
from ray_dmml.training.trainer import Reporter, Silent, read_images, train
from ray_dmml.tune.report import write_page
from ray_dmml.tune.search_space import Params, Search, SearchConfig

STEP, OBJECTIVE, COST = "step", "objective", "cost"
FEW_NUMBERS = 16
"""Of so many, population based training tries the neighbours."""

POLL_S = 1.0
"""Seconds between two looks at the trials' folders."""


@dataclass
class Trial:
    """What is known of one trial."""

    name: str
    params: dict[str, Any]
    reports: list[dict[str, Any]] = field(default_factory=list)
    """``step``, ``objective``, ``cost`` and ``figures`` of each evaluation."""

    starts: list[int] = field(default_factory=list)
    """The step at which each attempt at training it began: 0, then where an interrupted one stood."""

    error: str | None = None
    """Why it failed."""

    finished: bool = False
    """It has reported its last step."""

    seconds: float = 0.0
    """Of training, all of its attempts together."""

    began: float = 0.0
    """When it first began, in seconds since 1970."""

    is_default: bool = False
    """It is the config as it is."""

    over: bool = False
    """The scheduler has ended it, or the search has ended: nothing more comes of this trial."""

    number: int = 0
    """0 is the config as it is, the others follow in the order in which they began."""

    @property
    def status(self) -> str:
        if self.finished:
            return "finished"
        if self.error is not None:
            return "failed"
        return "ended early" if self.over else "training"

    @property
    def step(self) -> int:
        return int(self.reports[-1][STEP]) if self.reports else 0

    @property
    def objective(self) -> float | None:
        """At its last report."""
        return float(self.reports[-1][OBJECTIVE]) if self.reports else None


class SearchFolder:
    """The files of a search."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.trials_folder = self.path / "trials"
        self.asked_file = self.path / "search.yaml"
        self.best_file = self.path / "best.yaml"
        self.results_file = self.path / "results.csv"
        self.final_file = self.path / "final.json"
        self.page_file = self.path / "report.html"

    def create(self, search: Search) -> None:
        """Raises UserError where the folder is taken or cannot be made."""
        RunDir(self.path).ensure_empty("--storage")
        # It goes on with what it was begun with, also where Optuna has come or gone since.
        config = search.config.model_copy(update={"search": search.config.proposer})
        asked = {"settings": search.raw, "search": config.model_dump(mode="json")}
        try:
            self.trials_folder.mkdir(parents=True)
            replace_file(self.asked_file, yamlio.dump(asked))
        except OSError as error:
            raise UserError(f"the search's folder {self.path} cannot be made: {error}") from None

    def search(self) -> Search:
        """The search that was begun here.

        Raises:
            UserError: none was.
        """
        if not self.asked_file.is_file():
            raise UserError(f"{self.path} is not the folder of a search: it has no search.yaml")
        asked = read_yaml(self.asked_file, "search")
        if asked.keys() != {"settings", "search"}:
            raise UserError(f"{self.asked_file} is not what a search was asked for in this folder")
        refuse_old(asked["settings"], self.asked_file)
        try:
            config = SearchConfig.model_validate(asked["search"])
        except ValidationError as error:
            raise UserError(explain(error, str(self.asked_file), SearchConfig)) from None
        return Search(asked["settings"], config)

    def trials(self, *, over: bool = False) -> list[Trial]:
        """All that have begun, the config as it is first.

        Args:
            over: the search has ended.
        """
        files = self.trials_folder.glob("*/trial.json")
        found = [Trial(**json.loads(file.read_text())) for file in files]
        found.sort(key=lambda trial: (not trial.is_default, trial.began, trial.name))
        for number, trial in enumerate(found):
            trial.number, trial.over = number, trial.over or over
        return found


def run_search(
    folder: Path,
    search: Search | None = None,
    *,
    gpus_per_trial: float | None = None,
    watch: Callable[[Sequence[Trial]], None] = lambda trials: None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Searches, then trains the best setting and the config as it is with several seeds.

    Args:
        folder: of a new search, or, without ``search``, of one to go on with.
        search: what to search; None: what was asked for in the folder.
        gpus_per_trial: shared by its peers; None: one where the cluster has any.
        watch: is given the trials whenever one of them has something new.
        reporter: is told how the final runs go.

    Returns:
        what ``final.json`` holds: ``best`` and ``default``, each with ``params``, ``validation`` (the
        objective of its trial) and ``test`` (figures of each seed).

    Raises:
        UserError: the folder is taken or is not one of a search, or no trial finished.
    """
    files = SearchFolder(folder)
    resumed = search is None
    if search is None:
        search = files.search()
    else:
        RunDir(files.path).ensure_empty("--storage")
    reporter = reporter or Silent()
    # Here too, as each trial does: what is wrong with the images would be so in all of them.
    read_images(search.trial_config({}), reporter)
    with ray_session():
        nodes = _nodes()
        for config in _configs_of_each_size(search):
            if not os.environ.get("RAY_ADDRESS"):  # a cluster may grow by what is not known here
                require_labels(config, nodes)
            _require_room(_resources(config, nodes, gpus_per_trial), nodes)
        if not resumed:
            files.create(search)
        with RunDir(files.path).lock():
            _run_trials(files, search, resumed, gpus_per_trial, watch)
            trials = files.trials(over=True)
            write_results(files, search, trials)
            best = best_trial(trials)
            if told := tie(trials, best):
                reporter.note(told)
            replace_file(files.best_file, search.config_of(best.params).to_yaml())
            kept = pareto(trials) if search.config.cost else []
            write_page(files.page_file, search, trials, best, None, kept)
            final = _final_runs(files, search, best, trials, reporter)
    replace_file(files.final_file, json.dumps(final, indent=1) + "\n")
    write_page(files.page_file, search, trials, best, final, kept)
    return final


def best_trial(trials: Sequence[Trial]) -> Trial:
    """Of those that trained to their end the one with the highest objective; the first of equals.

    Raises:
        UserError: none did; with the first failure.
    """
    finished = [trial for trial in trials if trial.finished and trial.objective is not None]
    if not finished:
        reasons = [trial.error for trial in trials if trial.error]
        why = f": {reasons[0]}" if reasons else ""
        raise UserError(f"no trial of {len(trials)} finished{why}")
    return max(finished, key=lambda trial: (trial.objective, -trial.number))


def tie(trials: Sequence[Trial], best: Trial) -> str | None:
    """What to know where the best is one of several."""
    equal = [
        trial.number for trial in trials if trial.finished and trial.objective == best.objective
    ]
    if len(equal) < 2:
        return None
    return (
        f"trials {', '.join(map(str, equal))} are equally good on the validation classes and the first of "
        "them was taken: more or harder validation classes (data.validation_fraction, folds) would tell "
        "them apart"
    )


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials that no other beats in objective and cost, cheapest first."""
    finished = [trial for trial in trials if trial.finished]

    def beaten(trial: Trial) -> bool:
        mine = trial.reports[-1]
        return any(
            other[OBJECTIVE] >= mine[OBJECTIVE]
            and other[COST] <= mine[COST]
            and (other[OBJECTIVE] > mine[OBJECTIVE] or other[COST] < mine[COST])
            for other in (each.reports[-1] for each in finished)
        )

    kept = [trial for trial in finished if not beaten(trial)]
    return sorted(kept, key=lambda trial: (trial.reports[-1][COST], trial.number))


def write_results(files: SearchFolder, search: Search, trials: Sequence[Trial]) -> None:
    """``results.csv``: a line a trial, its draw and its last figures."""
    figures = [f"{who}_{metric}" for who in ("ensemble", "mean_peer") for metric in search.metrics]
    head = ["trial", "status", STEP, OBJECTIVE, COST, "seconds", *search.config.space, *figures]
    table = io.StringIO()
    writer = csv.DictWriter(table, [*head, "error"])
    writer.writeheader()
    for trial in trials:
        row: dict[str, Any] = {"trial": trial.number, "status": trial.status, **trial.params}
        row |= {"seconds": round(trial.seconds, 1), "error": trial.error, STEP: trial.step}
        if trial.reports:
            last = trial.reports[-1]
            row |= {OBJECTIVE: last[OBJECTIVE], COST: last[COST]}
            for metric in search.metrics:
                peers = [found[metric] for found in last["figures"]["peers"].values()]
                row[f"ensemble_{metric}"] = last["figures"]["ensemble"][metric]
                row[f"mean_peer_{metric}"] = float(np.mean(peers))
        writer.writerow(row)
    replace_file(files.results_file, table.getvalue())


# --- trials -------------------------------------------------------------------------------------


def _run_trials(
    files: SearchFolder,
    search: Search,
    resumed: bool,
    gpus_per_trial: float | None,
    watch: Callable[[Sequence[Trial]], None],
) -> None:
    # A failed trial's reason is in its own file and in results.csv; Tune would print tracebacks.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Of a trial that goes on after a kill, Tune counts the reports from 1 again, of which Optuna would warn.
    warnings.filterwarnings("ignore", "The reported value is ignored", UserWarning)
    # Its own state is saved whenever a trial has news: a killed search forgets no proposal.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Tune's own handler would take Ctrl-C for the end of the search, and go on to the final runs.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    nodes = _nodes()

    def resources(params: dict[str, Any]) -> tune.PlacementGroupFactory:
        try:
            config = search.trial_config(params)
        except UserError:  # settings that do not go together: the trial itself fails, and says so
            config = search.trial_config({})
        return _resources(config, nodes, gpus_per_trial)

    trainable = tune.with_resources(
        tune.with_parameters(_trial, search=search, folder=str(files.path)), resources
    )
    state = str(files.path / "ray")
    if resumed and _can_restore(files, search.config.proposer):
        tuner = tune.Tuner.restore(state, trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={key: _domain(search, key) for key in search.config.space},
            tune_config=tune.TuneConfig(
                num_samples=search.config.num_samples,
                search_alg=_proposer(search),
                scheduler=_scheduler(search),
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name="ray",
                storage_path=str(files.path),
                verbose=0,
                callbacks=[_NameTheEnded(search.default)],
                # Of a cohort each, of pbt alone; a copied trial's must last until it was copied.
                checkpoint_config=tune.CheckpointConfig(num_to_keep=4),
            ),
        )
    ended, over = Event(), Event()
    watcher = Thread(target=_watch, args=(files, search, watch, ended, over))
    watcher.start()
    try:
        _name_the_lost(files, tuner.fit())
        over.set()
    finally:
        ended.set()
        watcher.join()


def _can_restore(files: SearchFolder, proposer: str) -> bool:
    """Whether Ray Tune's state of a search is there; where a search was killed before there was any, what it
    left is removed.

    Raises:
        UserError: trials have trained, and the state is gone or damaged.
    """
    state = files.path / "ray"
    # The newest is what Ray Tune reads.
    newest = max(state.glob("experiment_state-*.json"), default=None, key=lambda file: file.name)
    with suppress(OSError, ValueError):
        is_whole = newest and json.loads(newest.read_text()) and tune.Tuner.can_restore(str(state))
        if is_whole and _is_whole(state, proposer):
            return True
    # A trial of several folds reports only after the last.
    if any(files.trials_folder.glob("*/fold*/checkpoints/*")):
        raise UserError(
            f"{state}, which is Ray Tune's, is {'damaged' if newest else 'gone'}: this search cannot go on. "
            f"What its trials reported is in {files.results_file}; begin another with --storage"
        )
    for folder in (state, files.trials_folder):
        shutil.rmtree(folder, ignore_errors=True)
    files.trials_folder.mkdir(parents=True)
    return False


def _is_whole(state: Path, proposer: str) -> bool:
    """Whether what has been proposed is there; without, Ray Tune would break off, or end with trials undone."""
    patterns = ["basic-variant-state-*"]
    if proposer == "optuna":
        patterns = ["search_gen_state-*", "searcher-state-*"]
    for pattern in patterns:
        newest = max(state.glob(pattern), default=None, key=lambda file: file.name)
        try:
            if newest is not None:
                cloudpickle.loads(newest.read_bytes())  # whatever Ray Tune calls it
            elif proposer == "optuna":  # random draws are all in the experiment's state, too
                return False
        except Exception:  # a pickle that is cut off, or of another version, raises anything
            return False
    return True


class _Halving(ASHAScheduler):
    """ASHA that knows what trials of a resumed search have reported before: Ray's own would hold the figure
    of a later step against those that others have at an earlier one."""

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        super().on_trial_add(tune_controller, trial)
        file = _journal_of(trial)
        if file.exists():
            for report in json.loads(file.read_text())["reports"]:
                self._trial_info[trial.trial_id].on_result(trial, report[STEP], report[OBJECTIVE])


class _Population(PopulationBasedTraining):
    """Population based training that compares its trials at equal steps, also where one has failed or a search
    is resumed: Ray's own waits for a failed trial without end, and keeps nothing over a restore."""

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        super().on_trial_add(tune_controller, trial)
        if STEP in trial.last_result and not trial.is_finished():  # restored
            state, step = self._trial_state[trial], trial.last_result[STEP]
            self._save_trial_state(state, step, trial.last_result, trial)
            state.last_perturbation_time = step
            if trial.checkpoint is not None:
                trial.set_status(TuneTrial.PAUSED)  # a pending one would not wait for the others
        # Those behind catch up; where all stand alike, they have been compared there.
        steps = [
            state.last_train_time
            for each, state in self._trial_state.items()
            if not each.is_finished()
        ]
        if steps:
            ahead = 0 if min(steps) < max(steps) else self._perturbation_interval
            self._next_perturbation_sync = max(steps) + ahead

    def on_trial_result(
        self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        if result[STEP] < self._next_perturbation_sync:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        super().on_trial_error(tune_controller, trial)
        tune_controller.get_live_trials().discard(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        chosen = super().choose_trial_to_run(tune_controller)
        trials = tune_controller.get_trials()
        waiting = [trial for trial in trials if trial.status == TuneTrial.PAUSED]
        going = any(trial.status in (TuneTrial.PENDING, TuneTrial.RUNNING) for trial in trials)
        if chosen is not None or going or not waiting:
            return chosen
        # They waited for one that has failed: as if the last of them reported now.
        state = self._trial_state[waiting[-1]]
        state.last_perturbation_time = state.last_train_time - self._perturbation_interval
        super().on_trial_result(tune_controller, waiting[-1], state.last_result)
        return super().choose_trial_to_run(tune_controller)


class _NameTheEnded(tune.Callback):
    """A trial that the scheduler ends is stopped inside of its last report, and cannot write it down."""

    def __init__(self, default: Params) -> None:
        self.default = dict(default)

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        file = _journal_of(trial)
        # A full disk, say; all is said once more when the search has ended.
        with suppress(OSError, CheckpointError):
            told = Trial(**json.loads(file.read_text()))
            if not told.finished:
                told.over = True
                replace_file(file, json.dumps(vars(told)))

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """One whose process is lost at its start has no file yet, in which _name_the_lost would say why."""
        file = _journal_of(trial)
        with suppress(OSError, CheckpointError):
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                params = dict(trial.config)
                told = Trial(trial.trial_id, params, began=time.time())
                told.is_default = params == self.default
                replace_file(file, json.dumps(vars(told)))


def _journal_of(trial: TuneTrial) -> Path:
    """Where the folder is now: it may have been moved since the search began."""
    folder = Path(trial.remote_experiment_path).parent
    return SearchFolder(folder).trials_folder / trial.trial_id / "trial.json"


def _name_the_lost(files: SearchFolder, results: Iterable[tune.Result]) -> None:
    """A trial whose process was killed could not write down why."""
    lost = {Path(each.path).name: each.error for each in results if each.error and each.path}
    for trial in files.trials():
        # Tune's folders have the trial's name in theirs. Two trials may have drawn the same.
        error = next((lost[folder] for folder in lost if f"_{trial.name}_" in folder), None)
        if error is not None and trial.error is None and not trial.finished:
            trial.error = str(error).strip().splitlines()[-1]
            file = files.trials_folder / trial.name / "trial.json"
            replace_file(file, json.dumps(vars(trial)))


def _watch(
    files: SearchFolder,
    search: Search,
    watch: Callable[[Sequence[Trial]], None],
    ended: Event,
    over: Event,
) -> None:
    """Tells of the trials' news, and writes them down, until the search has ended, and once more then; it is
    over if nothing interrupted it."""
    told: list[Trial] = []
    is_last = False
    while not is_last:
        is_last = ended.wait(POLL_S)
        trials = files.trials(over=over.is_set())
        if trials != told:
            watch(trials)
            told = trials
            # A full disk, say; it is written once more at the end.
            with suppress(OSError, CheckpointError):
                write_results(files, search, trials)


def _domain(search: Search, key: str) -> Any:
    distribution = search.config.space[key]
    if distribution.choice is not None:
        return tune.choice(distribution.labels)
    if distribution.integer is not None:
        low, high = distribution.integer
        return tune.randint(low, high + 1)
    ends = distribution.ends or (0.0, 0.0)
    return (tune.loguniform if distribution.loguniform is not None else tune.uniform)(*ends)


def _proposer(search: Search) -> Searcher | SearchAlgorithm:
    config = search.config
    if config.proposer == "random":
        return BasicVariantGenerator(
            points_to_evaluate=[dict(search.default)], random_state=config.seed
        )
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        multivariate=True, seed=config.seed, n_startup_trials=max(3, config.num_samples // 4)
    )
    return OptunaSearch(
        metric=[OBJECTIVE, COST] if config.cost else OBJECTIVE,
        mode=["max", "min"] if config.cost else "max",
        points_to_evaluate=[dict(search.default)],
        sampler=sampler,
    )


def _scheduler(search: Search) -> TrialScheduler:
    train_config = search.trial_config({}).train
    every = train_config.evaluate_every or train_config.steps
    if search.config.scheduler == "asha":
        return _Halving(
            time_attr=STEP,
            metric=OBJECTIVE,
            mode="max",
            max_t=max(config.train.steps for config in _configs_of_each_size(search)),
            grace_period=min(every, train_config.steps),
            reduction_factor=search.config.reduction_factor,
        )
    if search.config.scheduler == "pbt":
        # It draws from the global generators.
        random.seed(search.config.seed)
        np.random.seed(search.config.seed % 2**32)
        return _Population(
            time_attr=STEP,
            metric=OBJECTIVE,
            mode="max",
            perturbation_interval=every,
            # A trial that started first would be through before another could be compared with it.
            synch=True,
            hyperparam_mutations={
                key: _mutations(search, key) for key in search.changed_in_mid_run
            },
            custom_explore_fn=partial(_inside_the_space, search),
        )
    return FIFOScheduler()


def _mutations(search: Search, key: str) -> Any:
    """A list is changed to a neighbour, as a few whole numbers must be, too: 1.2 times 2 is 2, rounded."""
    distribution = search.config.space[key]
    if distribution.integer is not None:
        low, high = distribution.integer
        if high - low < FEW_NUMBERS:
            return [*range(low, high + 1)]
    return distribution.labels if distribution.choice is not None else _domain(search, key)


def _inside_the_space(search: Search, params: dict[str, Any]) -> dict[str, Any]:
    """PBT multiplies numbers by 0.8 or 1.2, wherever that leads."""
    ends = {key: distribution.ends for key, distribution in search.config.space.items()}
    return {
        key: value if (found := ends.get(key)) is None else min(max(value, found[0]), found[1])
        for key, value in params.items()
    }


def _nodes() -> list[Node]:
    """Those of the cluster, and those that it may start besides."""
    alive, growth = cluster_nodes(ray.nodes(), ray.get_runtime_context().get_node_id())
    return [*alive, *growth]


def _resources(
    config: Config, nodes: Sequence[Node], gpus_per_trial: float | None
) -> tune.PlacementGroupFactory:
    """A bundle a peer; before them that of the trial's own process, which computes next to nothing, on
    this node: the search's folder is here.

    Raises:
        UserError: nothing is known of any CPU or GPU.
    """
    peers = config.cohort.peers
    known = sum(node.get("GPU", 0.0) for node in nodes)
    gpus = min(1.0, known) if gpus_per_trial is None else gpus_per_trial
    # Whole GPUs, or parts of which several make up one: no peer gets a GPU and a half, or two parts.
    share = gpus / len(peers)
    share = float(int(share)) if share >= 1 else 1 / -(-len(peers) // gpus) if gpus > 1 else share
    own = only_at(ray.get_runtime_context().get_node_id())
    gpus_of = [_gpus_of_a_peer(peer, share) for peer in peers]

    def bundles(cpu: float) -> list[dict[str, float]]:
        asked = zip(peers, gpus_of, strict=True)
        return [own, *(bundle(peer, peer.num_cpus or cpu, gpu) for peer, gpu in asked)]

    def fits(cpu: float) -> bool:
        mine, *others = bundles(cpu)
        return have_places([mine, *map(with_labels, others, peers)], nodes)

    # What fits nowhere, as far as is known here, may yet on nodes that are not known.
    cpus = 0.0 if all(peer.num_cpus for peer in peers) else _cpus_of_a_peer(nodes, gpus, len(peers))
    placed = filter(fits, lowered(cpus))
    labels = [{}, *(dict(peer.labels) for peer in peers)]
    return tune.PlacementGroupFactory(bundles(next(placed, cpus)), bundle_label_selector=labels)


def _gpus_of_a_peer(peer: PeerConfig, share: float) -> float:
    """A GPU for each of several replicas, however few a trial has: NCCL takes no two of one."""
    if peer.num_gpus is not None:
        return peer.num_gpus
    if peer.num_replicas > 1:
        return float(peer.num_replicas) if share else 0.0
    return min(share, 1.0)


def _cpus_of_a_peer(nodes: Sequence[Node], gpus: float, num_peers: int) -> float:
    """An even share of one CPU, or of the cores that go with a trial's GPUs.

    Raises:
        UserError: there is no CPU, and no GPU was asked for.
    """
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    if not cpus and not gpus:
        raise UserError(
            "the cluster has no CPUs and no GPUs, and what it may start is not known here: say what a "
            "trial needs (--gpus-per-trial, or cohort.base.num_gpus and num_cpus)"
        )
    cpu = min(1.0, cpus / num_peers) if cpus else 1.0
    # On every node with GPUs: what other nodes have is of no use to those who are here.
    beside = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU")]
    return max(cpu, min(beside) * gpus // num_peers) if beside and gpus else cpu


def _configs_of_each_size(search: Search) -> list[Config]:
    """The trials' config, and those with the extremes of every setting, which may be of more peers."""
    space = search.config.space.items()
    draws = [{key: drawn} for key, distribution in space for drawn in distribution.extremes()]
    return [search.trial_config(draw) for draw in ({}, *draws)]


def _require_room(trial: tune.PlacementGroupFactory, nodes: Sequence[Node]) -> None:
    """A private Ray never grows: what it has not, a trial would wait for without end.

    Raises:
        UserError: one trial asks for more than there is.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    for kind, needed in trial.required_resources.items():
        there = sum(node.get(kind, 0.0) for node in nodes)
        if needed > there + 1e-6:
            raise UserError(
                f"a trial needs {needed:g} {kind}s (--gpus-per-trial, cohort.peers.*.num_cpus and "
                f"num_gpus) and this machine has {there:g}"
            )
    if not have_places(trial.bundles, nodes):
        raise UserError(
            f"the peers of a trial find no place on this machine, which has {shown(nodes)}: each of them needs "
            f"{', '.join(sorted({_told(bundle) for bundle in trial.bundles[1:]}))}, and a part of a GPU is "
            "one of a single one (--gpus-per-trial, cohort.peers.*.num_cpus and num_gpus)"
        )


def _told(asked: Node) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in asked.items())


def _trial(params: dict[str, Any], search: Search, folder: str) -> None:
    """One trial, in a process of its own; its peers are actors beside it."""
    name = tune.get_context().get_trial_id()
    file = SearchFolder(Path(folder)).trials_folder / name / "trial.json"
    if search.config.scheduler != "pbt" and file.exists():
        told = Trial(**json.loads(file.read_text()))
        if told.finished:  # and killed before Tune knew
            tune.report({key: told.reports[-1][key] for key in (STEP, OBJECTIVE, COST)})
            return
    journal = _Journal(SearchFolder(Path(folder)).trials_folder / name, name, params, search)
    try:
        journal.last_step = search.trial_config(params).train.steps
        folds = [_train_fold(params, search, journal, fold) for fold in range(search.config.folds)]
        if len(folds) > 1:
            journal.report(_mean(folds))
        elif not journal.trial.finished:  # killed after its last checkpoint, before it told of it
            journal.report(folds[0])
    except Exception as error:
        journal.trial.error = _reason(error)
        journal.write()
        raise


def _reason(error: Exception) -> str:
    """In a line, as in results.csv: what Ray tells of a node without memory are fifty. All of it is in
    the trial's error.txt, which Tune writes."""
    if isinstance(error, UserError):
        return str(error)
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _train_fold(
    params: dict[str, Any], search: Search, journal: _Journal, fold: int
) -> dict[str, Any]:
    """Trains, from where an earlier attempt or the trial that this one copies stood; the last report."""
    config = search.trial_config(params, fold)
    run = RunDir(journal.folder / f"fold{fold}")
    pbt = search.config.scheduler == "pbt"
    copied = tune.get_checkpoint() if pbt else None
    # Of a trial that failed long ago it may be gone: then from where the trial's own run stood.
    if copied is not None and Path(copied.path).exists():
        with copied.as_directory() as donor:
            run.checkpoints.adopt(Path(donor))
        run.make()
        run.write_config(config)
    begun = run.checkpoints.index()
    journal.starts(run.checkpoints.load("last").step if begun else 0)
    reporter = _TrialReporter(search, journal, run, alone=search.config.folds == 1)
    if run.config_file.exists():
        train(config, resume=run.path, reporter=reporter, changed=pbt)
    else:
        train(config, run.path, reporter=reporter)
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    last = next(row for row in reversed(rows) if "validation" in row)
    return reporter.row(last["step"], last["validation"])


def _mean(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of several folds as one."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        return float(np.mean(values))

    return {**mean(folds), STEP: folds[0][STEP]}


class _Journal:
    """What a trial writes down of itself."""

    def __init__(self, folder: Path, name: str, params: dict[str, Any], search: Search) -> None:
        self.folder, self._file = folder, folder / "trial.json"
        self._params, self.last_step = params, 0
        folder.mkdir(parents=True, exist_ok=True)
        is_default = params == search.default
        self.trial = Trial(name, params, began=time.time(), is_default=is_default)
        if self._file.exists():  # an earlier attempt
            self.trial = Trial(**json.loads(self._file.read_text()))
            self.trial.error, self.trial.over = None, False
            self.trial.is_default |= is_default  # the file may be of one that was lost at its start
        self._began, self._before = time.monotonic(), self.trial.seconds
        self.write()

    def starts(self, step: int) -> None:
        self.trial.starts.append(step)
        if step < self.last_step:
            # With what it trains from now on. One that is copied when all is over trains no more,
            # and stays what its last report says.
            self.trial.params, self.trial.finished = self._params, False
        self.write()

    def report(self, row: dict[str, Any], checkpoint: Path | None = None) -> None:
        """To the journal and to the scheduler, which may end the trial here."""
        self.trial.reports = [each for each in self.trial.reports if each[STEP] < row[STEP]]
        # With its draw, which population based training may change later.
        self.trial.reports.append({**row, "params": self.trial.params})
        # Told before Tune is: a scheduler may end the trial's process inside of its last report.
        self.trial.finished = row[STEP] >= self.last_step
        self.write()
        told = {STEP: row[STEP], OBJECTIVE: row[OBJECTIVE], COST: row[COST]}
        kept = None if checkpoint is None else tune.Checkpoint.from_directory(str(checkpoint))
        tune.report(told, checkpoint=kept)

    def write(self) -> None:
        self.trial.seconds = self._before + time.monotonic() - self._began
        replace_file(self._file, json.dumps(vars(self.trial)))


class _TrialReporter(Silent):
    """Hands a run's validation figures on, once their checkpoint is on disk."""

    def __init__(self, search: Search, journal: _Journal, run: RunDir, alone: bool) -> None:
        self._search, self._journal, self._run, self._alone = search, journal, run, alone
        self._figures: dict[int, Mapping[str, Any]] = {}  # of the step that is not yet saved

    def evaluated(self, step: int, split: str, figures: Mapping[str, Any]) -> None:
        if split == "validation":
            self._figures = {step: figures}

    def saved(self, step: int, *, best: bool) -> None:
        # A run that has lost a peer in between goes back, and saves another step.
        if step not in self._figures or not self._alone:
            return
        row = self.row(step, self._figures.pop(step))
        pbt = self._search.config.scheduler == "pbt"
        self._journal.report(row, self._run.checkpoints.path("last") if pbt else None)

    def row(self, step: int, figures: Mapping[str, Any]) -> dict[str, Any]:
        return {
            STEP: step,
            OBJECTIVE: self._search.objective(figures),
            COST: self._cost(figures),
            "figures": dict(figures),
        }

    def _cost(self, figures: Mapping[str, Any]) -> float:
        """Millions of parameters of the nets that the objective is of."""
        folder, objective = self._run.checkpoints.path("last"), self._search.config.objective
        metric = self._search.config.metric
        sizes = {
            peer: (folder / peer / "weights.safetensors").stat().st_size / 4e6
            for peer in figures["peers"]
        }
        if objective == "ensemble":
            return sum(sizes.values())
        if objective == "mean_peer":
            return sum(sizes.values()) / len(sizes)
        return sizes[max(sizes, key=lambda peer: figures["peers"][peer][metric])]


# --- final runs ---------------------------------------------------------------------------------


def _final_runs(
    files: SearchFolder, search: Search, best: Trial, trials: Sequence[Trial], reporter: Reporter
) -> dict[str, Any]:
    """The best setting and the config as it is, on all training classes; the test classes' figures."""
    # Population based training may have given the first trial another draw since.
    own = (trial for trial in trials if trial.is_default and trial.params == search.default)
    default = next(own, None)
    chosen: dict[str, Params] = {"best": best.params, "default": search.default}
    # A figure of an earlier step, where the scheduler ended it, does not stand beside the best's.
    known = default.objective if default is not None and default.finished else None
    validation = {"best": best.objective, "default": known}
    final: dict[str, Any] = {}
    failed: list[UserError] = []
    for name, params in chosen.items():
        if name == "default" and params == best.params:
            final[name] = final["best"]
            continue
        values = {key: search.config.space[key].value(drawn) for key, drawn in params.items()}
        config = search.config_of(params)
        # The best of a search that went on may be another one: its runs have its trial's name.
        run_name = "default" if params == search.default else best.name
        runs = []
        for seed in range(config.seed, config.seed + search.config.final_seeds):
            reporter.note(f"final run: {name}, seed {seed}")
            folder = files.path / "final" / f"{run_name}-seed{seed}"
            try:
                runs.append(_final_run(folder, config, seed, reporter))
            except UserError as error:  # that costs no other run, and none of the finished ones
                reporter.note(f"final run: {name}, seed {seed} failed: {error}")
                runs.append({"seed": seed, "error": str(error)})
                failed.append(error)
        final[name] = {"params": values, "validation": validation[name], "test": runs}
    if failed and all("error" in run for each in final.values() for run in each["test"]):
        raise failed[0]
    return final


def _final_run(folder: Path, config: Config, seed: int, reporter: Reporter) -> dict[str, Any]:
    data = config.data.model_copy(update={"validation_fraction": 0.0})
    weights = "ema" if config.evaluation.weights == "ema" else None
    evaluation = config.evaluation.model_copy(
        update={"split": "test", "untrained": False, "weights": weights}
    )
    # A run each in the search's folder; one storage has room for one run.
    checkpoint = config.checkpoint.model_copy(update={"storage_path": None})
    config = config.model_copy(
        update={"seed": seed, "data": data, "evaluation": evaluation, "checkpoint": checkpoint}
    )
    run = RunDir(folder)
    if run.results_file.exists():
        results = json.loads(run.results_file.read_text())
    elif run.config_file.exists():
        results = train(resume=folder, reporter=reporter)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        results = train(config, folder, reporter=reporter)
    return {"seed": seed, "peers": results["peers"], "ensemble": results["ensemble"]}
