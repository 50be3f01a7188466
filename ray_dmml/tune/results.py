"""The files of a search, and what its trials and final runs amount to.

FOLDER/
    search.yaml           the experiment's settings and those of the search
    ray/                  Ray Tune's own state
    trials/NAME/          trial.json (the record of the trial) and its runs, foldF-seedS
    results.csv           one line for each trial
    best.yaml             the config with the best parameters: ray-dmml train --config best.yaml
    final/NAME-seedN/     the final runs of the best trial; baseline-seedN: of the baseline
    final.json            the test metrics of the final runs
    report.html
"""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ray_dmml.atomic_files import replace_file
from ray_dmml.config import yamlio
from ray_dmml.config.loading import read_yaml, refuse_old
from ray_dmml.config.messages import explain
from ray_dmml.errors import UserError
from ray_dmml.training.run_dir import RunDir
from ray_dmml.tune.search_space import Search, SearchConfig
from ray_dmml.tune.trial import COST, OBJECTIVE, STEP, Trial

WHO = ("ensemble", "mean_peer")
"""Whose metrics the tables have."""


class SearchDir:
    """The files of a search."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.search_file = self.path / "search.yaml"
        self.trials_folder = self.path / "trials"
        self.tune_state = self.path / "ray"
        self.results_file = self.path / "results.csv"
        self.best_file = self.path / "best.yaml"
        self.final_folder = self.path / "final"
        self.final_file = self.path / "final.json"
        self.report_file = self.path / "report.html"

    def create(self, search: Search) -> None:
        """Makes the folder of a new search. Raises UserError if it has files or cannot be made."""
        RunDir(self.path).ensure_empty()
        # A resumed search needs the same sampler, even if Optuna was installed or removed meanwhile.
        config = search.config.model_copy(update={"sampler": search.config.sampler_name})
        content = {"settings": search.raw, "search": config.model_dump(mode="json")}
        try:
            self.trials_folder.mkdir(parents=True)
            replace_file(self.search_file, yamlio.dump(content))
        except OSError as error:
            raise UserError(f"the folder {self.path} cannot be made: {error}") from None

    def search(self) -> Search:
        """The search that was started in this folder.

        Raises:
            UserError: the folder has no search, or one of another version of ray-dmml.
        """
        if not os.path.isfile(self.search_file):
            raise UserError(f"{self.path} is not the folder of a search: it has no search.yaml")
        content = read_yaml(self.search_file, "search")
        refuse_old(content.get("settings"), self.search_file)
        if content.keys() != {"settings", "search"}:
            raise UserError(f"{self.search_file} was not written by ray-dmml tune")
        try:
            config = SearchConfig.model_validate(content["search"])
        except ValidationError as error:
            reason = explain(error, str(self.search_file), SearchConfig)
            raise UserError(f"{reason}. A search of another version of ray-dmml cannot be resumed") from None
        return Search(content["settings"], config)

    def trial_folder(self, name: str) -> Path:
        return self.trials_folder / name

    def trial_file(self, name: str) -> Path:
        return self.trials_folder / name / "trial.json"

    def trials(self, *, ended: bool = False) -> list[Trial]:
        """All trials that have begun, the baseline first.

        Args:
            ended: the search has ended, so an unfinished trial will not continue.
        """
        trials = [Trial.load(file) for file in self.trials_folder.glob("*/trial.json")]
        trials.sort(key=lambda trial: (not trial.is_baseline, trial.start_time, trial.name))
        for number, trial in enumerate(trials):
            trial.number, trial.ended = number, trial.ended or ended
        return trials


def write_results(files: SearchDir, search: Search, trials: Sequence[Trial]) -> None:
    """Writes ``results.csv``: one line for each trial, with its parameters and its last metrics.

    Raises:
        CheckpointError: the file cannot be written.
    """
    columns = ["trial", "status", STEP, OBJECTIVE, "objective_std", COST, "seconds", *search.config.space]
    columns += [f"{who}_{metric}" for who in WHO for metric in search.metrics]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "error"])
    writer.writeheader()
    for trial in trials:
        row: dict[str, Any] = {"trial": trial.number, "status": trial.status, **trial.params}
        row |= {"seconds": round(trial.seconds, 1), "error": trial.error, STEP: trial.step}
        if trial.reports:
            report = trial.reports[-1]
            row |= {OBJECTIVE: report[OBJECTIVE], COST: report[COST]}
            if objectives := report.get("objectives"):
                row["objective_std"] = float(np.std(objectives, ddof=1))
            for who, metric in itertools.product(WHO, search.metrics):
                row[f"{who}_{metric}"] = _metric(report["figures"], who, metric)
        writer.writerow(row)
    replace_file(files.results_file, text.getvalue())


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The finished trial with the highest objective, and the first one of equals.

    Raises:
        UserError: no trial finished. The message has the error of the first failed one.
    """
    finished = [trial for trial in trials if trial.finished and trial.objective is not None]
    if not finished:
        errors = [trial.error for trial in trials if trial.error]
        why = f": {errors[0]}" if errors else ""
        raise UserError(f"no trial of {len(trials)} finished{why}")
    return max(finished, key=lambda trial: (trial.objective, -trial.number))


def tie_message(trials: Sequence[Trial], best: Trial) -> str | None:
    """A sentence about other trials that are as good as the best one; None if there are none."""
    equal = [trial.number for trial in trials if trial.finished and trial.objective == best.objective]
    if len(equal) < 2:
        return None
    return (
        f"trials {', '.join(map(str, equal))} are equally good on the validation classes; the first one "
        "is used. More or harder validation classes (data.validation_fraction, folds) would separate them"
    )


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials that no other one dominates in objective and cost, the cheapest first."""
    finished = [trial for trial in trials if trial.finished]

    def values(trial: Trial) -> tuple[float, float]:
        report = trial.reports[-1]
        return report[OBJECTIVE], -report[COST]

    def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] >= other[0] and one[1] >= other[1]

    front = [trial for trial in finished if not any(dominates(values(other), values(trial)) for other in finished)]
    return sorted(front, key=lambda trial: (trial.reports[-1][COST], trial.number))


def baseline_is_best(final: Mapping[str, Any]) -> bool:
    """No trial was better than the baseline."""
    return bool(final["best"]["params"] == final["baseline"]["params"])


def final_columns(search: Search) -> list[str]:
    """The headings of :func:`final_rows`."""
    return ["", "validation", *(f"{who.replace('_', ' ')} {metric}" for who, metric in _final_metrics(search))]


def final_rows(final: Mapping[str, Any], search: Search) -> list[list[str]]:
    """The table of the final runs in percent: a row for the best trial and one for the baseline.

    Each row has the validation metric, and mean ± standard deviation over seeds of the test metrics.
    """
    rows = []
    for name in ("baseline",) if baseline_is_best(final) else ("best", "baseline"):
        runs, validation = final[name]["test"], final[name]["validation"]
        finished = [run for run in runs if "error" not in run]
        if len(finished) < len(runs):
            name += f" ({len(finished)} of {len(runs)} seeds; the others failed)"
        row = [name, "-" if validation is None else f"{100 * validation:.1f}"]
        for who, metric in _final_metrics(search):
            values = [_metric(run, who, metric) for run in finished]
            deviation = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            row.append(f"{100 * np.mean(values):.1f}{deviation}" if values else "-")
        rows.append(row)
    return rows


def short_name(key: str) -> str:
    """The last part of a setting's name, with the number of its peer."""
    parts = key.split(".")
    peer = f"peer {parts[2]}: " if parts[:2] == ["cohort", "peers"] and len(parts) > 2 else ""
    return peer + parts[-1]


def short_value(search: Search, key: str, sample: Any) -> str:
    """A sampled parameter in a few characters: one of several long choices is given by its number."""
    labels = search.config.space[key].labels
    if sample in labels and max(map(len, labels)) > 12:
        return f"no. {labels.index(sample) + 1}"
    return f"{sample:.3g}" if isinstance(sample, float) else str(sample)


def _final_metrics(search: Search) -> list[tuple[str, str]]:
    metrics = dict.fromkeys(("recall@1", "map@r", search.config.metric))
    return [*itertools.product(WHO, metrics)]


def _metric(figures: Mapping[str, Any], who: str, metric: str) -> float:
    if who == "ensemble":
        return float(figures["ensemble"][metric])
    return float(np.mean([peer[metric] for peer in figures["peers"].values()]))
