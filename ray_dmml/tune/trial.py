"""One trial of a search: its record, and the function that trains it.

A trial trains one cohort, or one for each fold and seed of the search. Its record is written to
``trials/NAME/trial.json`` at every step of the way, so a killed trial continues where it stood.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_dmml.atomic_files import replace_file
from ray_dmml.errors import UserError
from ray_dmml.loggers.logger import Logger
from ray_dmml.training.run import train
from ray_dmml.training.run_dir import RunDir
from ray_dmml.tune.search_space import Params, Search

STEP, OBJECTIVE, COST = "step", "objective", "cost"
"""What a trial reports to Ray Tune."""

Report = dict[str, Any]
"""``step``, ``objective``, ``cost`` (millions of parameters) and the ``figures`` of an evaluation: of the
peers that learn and of the ensemble. The report of a trial of several runs has means, and ``objectives`` of the
runs."""


@dataclass
class Trial:
    """The record of one trial."""

    name: str  # Ray Tune's name of the trial
    params: dict[str, Any]
    reports: list[Report] = field(default_factory=list)  # one for each evaluation; one in all if there are several runs
    starts: list[int] = field(default_factory=list)  # the step at which each training process began
    finished_runs: int = 0
    error: str | None = None
    finished: bool = False  # The trial has reported its last step.
    seconds: float = 0.0  # of training, summed over all attempts
    start_time: float = 0.0  # of the first attempt, in seconds since 1970
    is_baseline: bool = False
    ended: bool = False  # The scheduler has stopped the trial, or the search has ended.
    number: int = 0  # 0 is the baseline. The others are counted in the order in which they began.

    @classmethod
    def load(cls, file: Path) -> Trial:
        return cls(**json.loads(file.read_text()))

    def save(self, file: Path) -> None:
        """Raises CheckpointError if the file cannot be written."""
        replace_file(file, json.dumps(vars(self)))

    @property
    def status(self) -> str:
        if self.finished:
            return "finished"
        if self.error is not None:
            return "failed"
        return "stopped early" if self.ended else "training"

    @property
    def step(self) -> int:
        """The step of the last report."""
        return int(self.reports[-1][STEP]) if self.reports else 0

    @property
    def objective(self) -> float | None:
        """The objective of the last report."""
        return float(self.reports[-1][OBJECTIVE]) if self.reports else None


def run_trial(
    params: Params, search: Search, folder: Path, report: Callable[[Report], None], *, local: bool = False
) -> None:
    """Trains the runs of a trial one after the other and reports their figures.

    A trial of one run reports at each evaluation, so that a scheduler can stop it early. A trial of several runs
    reports the mean over them at its end. A trial that was killed continues: its finished runs are read, not trained
    again.

    Args:
        params: the sampled parameters.
        folder: the trial's folder; its name is the trial's name.
        report: receives ``step``, ``objective`` and ``cost``. It may end the process.
        local: train all peers in this process, without Ray.

    Raises:
        UserError: the parameters do not fit together, or the training failed. ``trial.json`` has the reason.
    """
    file = folder / "trial.json"
    if file.exists() and (trial := Trial.load(file)).finished:
        report(_summary(trial.reports[-1]))  # Ray Tune was killed before it received this one.
        return
    attempt = _Attempt(params, search, folder, report)
    try:
        config = search.trial_config(params)
        attempt.last_step, attempt.learners = config.train.steps, config.cohort.learners
        reports = []
        for fold, seed in search.runs:
            reports.append(attempt.train_run(fold, seed, local))
            attempt.trial.finished_runs = len(reports)
            attempt.write()
        if len(reports) > 1:
            objectives = [each[OBJECTIVE] for each in reports]
            attempt.report({**_mean(reports), STEP: reports[0][STEP], "objectives": objectives})
        elif not attempt.trial.finished:  # It was killed between its last checkpoint and its report.
            attempt.report(reports[0])
    except Exception as error:
        attempt.trial.error = first_line(error)
        attempt.write()
        raise


def first_line(error: Exception) -> str:
    """An error as one line of results.csv. Ray's message about a node without memory has fifty lines; Ray Tune writes
    all of them to the trial's error.txt."""
    if isinstance(error, UserError):
        return str(error)
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


class _Attempt(Logger):
    """One process that trains a trial, writes its record and reports to the scheduler."""

    def __init__(self, params: Params, search: Search, folder: Path, report: Callable[[Report], None]) -> None:
        self._params, self._search, self._folder, self._report = params, search, folder, report
        self._file = folder / "trial.json"
        self._run = RunDir(folder)
        self._figures: dict[int, Mapping[str, Any]] = {}  # of the step that has no checkpoint yet
        self.last_step = 0
        self.learners: tuple[str, ...] = ()
        folder.mkdir(parents=True, exist_ok=True)
        self.trial = Trial(folder.name, dict(params), start_time=time.time())
        if self._file.exists():  # An earlier attempt was killed.
            self.trial = replace(Trial.load(self._file), error=None, ended=False)
        self.trial.is_baseline = params == search.baseline
        self._began = time.monotonic() - self.trial.seconds
        self.write()

    def write(self) -> None:
        self.trial.seconds = time.monotonic() - self._began
        self.trial.save(self._file)

    def train_run(self, fold: int, seed: int, local: bool) -> Report:
        """Trains one run, or continues it, and returns its last report."""
        config = self._search.trial_config(self._params, fold, seed)
        self._run = run = RunDir(self._folder / f"fold{fold}-seed{seed}")
        if not run.results_file.exists():
            self.trial.starts.append(run.checkpoints.load("last", verify=False).step if run.checkpoints.index() else 0)
            self.write()
            if run.config_file.exists():
                train(config, resume=run.path, loggers=[self], local=local, progress=False)
            else:
                train(config, run.path, loggers=[self], local=local, progress=False)
        rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        last = next(row for row in reversed(rows) if "validation" in row)
        return self._report_of(last["step"], last["validation"])

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Reports the validation figures of a trial's only run, once their checkpoint is on disk."""
        if "validation" in metrics:
            self._figures = {step: metrics["validation"]}
        # A run that has lost a peer goes back, and saves other steps than the evaluated one.
        if "checkpoint" in metrics and step in self._figures and len(self._search.runs) == 1:
            self.report(self._report_of(step, self._figures.pop(step)))

    def report(self, row: Report) -> None:
        """Records a report and passes it to the scheduler, which may end the trial here."""
        self.trial.reports = [*(each for each in self.trial.reports if each[STEP] < row[STEP]), row]
        self.trial.finished = row[STEP] >= self.last_step
        # Recorded first: the scheduler may end the process within its last report.
        self.write()
        self._report(_summary(row))

    def _report_of(self, step: int, figures: Mapping[str, Any]) -> Report:
        objective = self._search.objective(figures, self.learners)
        peers = {name: row for name, row in figures["peers"].items() if name in self.learners}
        kept = {"peers": peers, "ensemble": figures["ensemble"]}
        return {STEP: step, OBJECTIVE: objective, COST: self._cost(figures), "figures": kept}

    def _cost(self, figures: Mapping[str, Any]) -> float:
        """Millions of parameters of the networks that the objective uses."""
        folder, config = self._run.checkpoints.path("last"), self._search.config
        peers = [name for name in figures["peers"] if config.objective == "ensemble" or name in self.learners]
        millions = {peer: (folder / peer / "weights.safetensors").stat().st_size / 4e6 for peer in peers}
        if config.objective == "best_peer":
            return millions[max(millions, key=lambda peer: figures["peers"][peer][config.metric])]
        return sum(millions.values()) / (len(millions) if config.objective == "mean_peer" else 1)


def _summary(report: Report) -> Report:
    return {key: report[key] for key in (STEP, OBJECTIVE, COST)}


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of mappings of equal keys."""
    if isinstance(values[0], Mapping):
        return {key: _mean([value[key] for value in values]) for key in values[0]}
    return float(np.mean(values))
