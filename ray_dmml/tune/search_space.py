"""What a search varies, how, and what it is judged by; all of it is checked before a trial runs.

A search file names settings as ``--set`` does and says what each may be::

    space:
      loss.relational.distance_weight: {loguniform: [0.1, 10]}
      cohort.peers.1.update_interval: {choice: [1, 2, 4]}
    trial: {train.steps: 100}      # of the trials only
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from ray_dmml.config.loading import read_yaml, set_setting
from ray_dmml.config.messages import explain
from ray_dmml.config.schema import (
    Config,
    Count,
    Section,
    Whole,
)
from ray_dmml.errors import UserError

DEFAULT_SEARCH = Path(__file__).parent / "search.yaml"

_OF_TRIALS = {
    "trials and final runs are of the same images": (
        *("data.name", "data.root", "data.source", "data.manifest"),
    ),
    "trials would learn from classes that the final runs are tested on": (
        *("data.train_fraction", "data.split_seed"),
    ),
    "trials and final runs are judged alike": ("evaluation.recall_at", "evaluation.weights"),
    "a search sets it itself": (
        *("data.validation_fold", "evaluation.split", "evaluation.untrained"),
        *("train.tensorboard", "checkpoint.every_steps", "checkpoint.storage_path"),
    ),
}
"""Why the trials' settings may not change these."""

_OF_DRAWS = {
    **_OF_TRIALS,
    "all trials are judged on the same classes at the same steps": (
        *("data.validation_fraction", "data.validation_seed", "train.evaluate_every"),
    ),
}
"""Why draws may not change these."""

_OF_THE_START = (
    *("cohort", "base", "peers", "seed", "init_seed", "backbone", "weights", "embedding_size"),
    *("pooling", "input_size", "frozen", "ema", "replicas", "amp", "optimizer"),
    *("optimizer.name", "loss", "loss.metric", "loss.metric.name", "loss.metric.args"),
    *("centers_per_class", "train", "train.steps", "train.init_from"),
)
"""Endings of settings whose change a cohort with trained weights cannot take, or would not notice."""

Params = Mapping[str, Any]
"""A trial's draw: setting to value, choices by their label."""


class Distribution(Section):
    """The values of one setting; exactly one kind."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """One of these, whatever they are: numbers, names, whole lists of transforms or peers."""

    uniform: tuple[float, float] | None = None
    """A number from the first to the second."""

    loguniform: tuple[float, float] | None = None
    """Likewise, its logarithm being uniform."""

    integer: tuple[int, int] | None = None
    """A whole number from the first to the second, both included."""

    @model_validator(mode="after")
    def _is_one(self) -> Distribution:
        given = [kind for kind in type(self).model_fields if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}, not {len(given)}")
        ends = self.ends
        if ends is not None and not ends[0] < ends[1]:
            raise ValueError(f"{given[0]} needs two numbers, the lower one first, not {list(ends)}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs numbers above 0")
        return self

    @property
    def ends(self) -> tuple[float, float] | None:
        """Lowest and highest; None of a choice."""
        return self.uniform or self.loguniform or self.integer

    @property
    def labels(self) -> list[str]:
        """Of the choices: numbers and names as they are, the rest as JSON."""
        return [
            value if isinstance(value, str) else json.dumps(value) for value in self.choice or ()
        ]

    def value(self, drawn: Any) -> Any:
        """What a draw stands for."""
        return self.choice[self.labels.index(drawn)] if self.choice is not None else drawn

    def extremes(self) -> list[Any]:
        """Draws that, if they are all allowed, leave little that is not."""
        if self.ends is None:
            return self.labels
        low, high = self.ends
        # Between them, where a whole number is needed and any may be drawn.
        return (
            [low, high] if self.integer is not None else [low, high, low + (high - low) / math.pi]
        )


class SearchConfig(Section):
    """A search."""

    space: Annotated[dict[str, Distribution], Field(min_length=1)]
    """Setting (as in `--set`) to what it may be."""

    trial: dict[str, Any] = Field(default_factory=dict)
    """Settings of the trials only, such as fewer train.steps; the final runs have the config's."""

    objective: Literal["ensemble", "mean_peer", "best_peer"] = "ensemble"
    """Whose figure on the validation classes is searched for."""

    metric: str = "recall@1"
    """Which figure: recall@K of evaluation.recall_at, map@r, r_precision."""

    cost: bool = False
    """Search for a low cost of inference, too: parameters of all nets that the objective takes.
    Gives the trials that no other beats in both."""

    num_samples: Count = 8
    """Trials; the first is the config as it is."""

    search: Literal["optuna", "random"] | None = None
    """How settings are proposed; null: optuna (TPE, multivariate) where it is installed (extra
    `search`), else random."""

    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """`asha` ends the worse trials early; `pbt` copies better trials and changes their settings in
    mid-run; `none` runs all to their end."""

    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """`asha`: one in so many trials goes on at each rung."""

    folds: Count = 1
    """Validation folds that a trial is judged on, one after the other; more than 1 needs
    scheduler none."""

    final_seeds: Whole = 3
    """Runs on all training classes, judged on the test classes, of the best setting and of the
    config as it is; 0: none, and the test classes are never read."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the proposals."""

    @model_validator(mode="after")
    def _fits(self) -> SearchConfig:
        if self.folds > 1 and self.scheduler != "none":
            raise ValueError(
                f"folds {self.folds} needs scheduler: none, as a trial's figure is known only after "
                "its last fold"
            )
        if self.cost and self.scheduler == "pbt":
            raise ValueError("scheduler pbt has one objective: set cost: false")
        if self.scheduler == "pbt" and self.search == "optuna":
            raise ValueError("scheduler pbt proposes settings itself: set search: random")
        return self

    @property
    def proposer(self) -> str:
        """``optuna`` or ``random``."""
        if self.scheduler == "pbt":
            return "random"
        if self.search is not None:
            return self.search
        return "optuna" if importlib.util.find_spec("optuna") else "random"


class Search:
    """A search over an experiment's settings.

    Args:
        raw: the experiment's settings as :func:`~ray_dmml.config.loading.read_settings` gives them.
        config: the search.

    Raises:
        UserError: a setting or value of the space is not allowed, the experiment's own value is
            not in the space, or there are no validation classes to search on.
    """

    def __init__(self, raw: Mapping[str, Any], config: SearchConfig) -> None:
        self.raw, self.config = copy.deepcopy(dict(raw)), config
        self.base = Config.parse(self.raw)
        self._require_no_draw_undone()
        try:
            self._require_same_question(self._trial_settings({}), _OF_TRIALS)
        except UserError as error:
            raise UserError(f"trial: {error}") from None
        fraction = self.trial_config({}).data.validation_fraction
        if not fraction:
            raise UserError(
                "a search is judged on held-out training classes: set data.validation_fraction above 0"
            )
        possible = round(1 / fraction)
        if config.folds > possible:
            raise UserError(
                f"folds {config.folds}: data.validation_fraction {fraction} gives at most {possible}"
            )
        if config.search == "optuna" and importlib.util.find_spec("optuna") is None:
            raise UserError("search: optuna needs the extra: pip install 'ray-dmml[search]'")
        self.metrics = [f"recall@{k}" for k in sorted({1, *self.base.evaluation.recall_at})]
        self.metrics += ["map@r", "r_precision"]
        if config.metric not in self.metrics:
            raise UserError(
                f"metric {config.metric!r} is not taken; there are {', '.join(self.metrics)}"
            )
        for key, distribution in config.space.items():
            for drawn in distribution.extremes():
                try:
                    self.trial_config({key: drawn})
                    self._require_same_question(self._settings({key: drawn}), _OF_DRAWS)
                except UserError as error:
                    raise UserError(f"space.{key}: {drawn}: {error}") from None
        if config.folds > 1 and self.base.data.validation_fold:
            raise UserError(
                f"folds {config.folds} are counted from 0: leave out data.validation_fold"
            )
        if config.scheduler == "pbt" and len(set(self._numbers_of_peers())) > 1:
            raise UserError(
                "scheduler pbt copies a trial's peers to another trial, so all need as many: search the "
                "number of peers with scheduler asha or none"
            )
        if config.scheduler == "pbt" and not self.changed_in_mid_run:
            raise UserError(
                f"scheduler pbt changes settings in mid-run, and {', '.join(config.space)} count only at "
                "the start: search others, or with scheduler asha or none"
            )
        self.default = {key: self._own_value(key) for key in config.space}
        """The draw that is the experiment as it is."""
        if self.config_of(self.default) != self.base:
            raise UserError(
                "space: its settings undo each other, so that the first trial cannot be the config as it "
                f"is: {', '.join(config.space)}"
            )

    def _numbers_of_peers(self) -> Iterator[int]:
        """Of the default trial, and of what each setting's extremes make of it."""
        yield len(self.trial_config({}).cohort.peers)
        for key, distribution in self.config.space.items():
            for drawn in distribution.extremes():
                yield len(self.trial_config({key: drawn}).cohort.peers)

    def config_of(self, params: Params) -> Config:
        """The experiment with a draw's settings."""
        return Config.parse(self._settings(params), source="the trial's settings")

    def trial_config(self, params: Params, fold: int = 0) -> Config:
        """The same for a trial: with the trials' settings, and without the test classes."""
        config = Config.parse(self._trial_settings(params), source="the trial's settings")
        train = config.train.model_copy(update={"tensorboard": False})  # nobody looks at it
        # A checkpoint at each report, to go on from there, and between them where the config has more.
        reports, own = config.train.evaluate_every, config.checkpoint.every_steps
        checkpoint = config.checkpoint.model_copy(
            update={
                "every_steps": reports if not own or reports % own else own,
                "storage_path": None,
            }
        )
        fold += config.data.validation_fold
        data = config.data.model_copy(update={"validation_fold": fold})
        # Not the best: the final runs, which hold out no classes to choose by, will have none.
        weights = "ema" if config.evaluation.weights == "ema" else "last"
        evaluation = config.evaluation.model_copy(
            update={"split": "validation", "weights": weights}
        )
        update = {
            "train": train,
            "data": data,
            "evaluation": evaluation,
            "checkpoint": checkpoint,
        }
        return config.model_copy(update=update)

    def objective(self, figures: Mapping[str, Any]) -> float:
        """Of an evaluation's ``{"peers": ..., "ensemble": ...}``."""
        metric = self.config.metric
        if self.config.objective == "ensemble":
            return float(figures["ensemble"][metric])
        values = [float(found[metric]) for found in figures["peers"].values()]
        return max(values) if self.config.objective == "best_peer" else sum(values) / len(values)

    @property
    def changed_in_mid_run(self) -> list[str]:
        """The settings of the space that a cohort in training takes; what made its nets is not among them."""
        return [key for key in self.config.space if not _counts_at_the_start(key)]

    def _settings(self, params: Params) -> dict[str, Any]:
        raw = copy.deepcopy(self.raw)

        # A whole, such as cohort.peers, before a part of it; the base last, which is refused where all
        # peers have drawn their own.
        def place(key: str) -> tuple[bool, int]:
            return key.startswith("cohort.base."), key.count(".")

        for key in sorted(params, key=place):
            value = copy.deepcopy(
                self.config.space[key].value(params[key])
            )  # parts of it may be set
            set_setting(raw, key, value, f"space.{key}")
        return raw

    def _trial_settings(self, params: Params) -> dict[str, Any]:
        raw = self._settings(params)
        for key, value in self.config.trial.items():
            set_setting(raw, key, copy.deepcopy(value), f"trial.{key}")
        return raw

    def _require_same_question(
        self, raw: dict[str, Any], fixed: Mapping[str, Sequence[str]]
    ) -> None:
        """Raises UserError where settings change what all are judged on, or would change nothing."""
        own, now = (
            config.model_dump(mode="json")
            for config in (self.base, Config.parse(raw, source="the trial's settings"))
        )
        for why, keys in fixed.items():
            for key in keys:
                if _at(own, key) != _at(now, key):
                    raise UserError(f"{key} must stay as the config has it: {why}")

    def _require_no_draw_undone(self) -> None:
        """Raises UserError where the trials' settings replace what is drawn."""
        for key in self.config.trial:
            for drawn in self.config.space:
                if f"{drawn}.".startswith(f"{key}.") or f"{key}.".startswith(f"{drawn}."):
                    raise UserError(
                        f"trial.{key} replaces what is drawn for space.{drawn}: drop one"
                    )

    def _own_value(self, key: str) -> Any:
        """The draw of a setting that changes nothing."""
        distribution = self.config.space[key]
        if distribution.choice is not None:
            for label in distribution.labels:
                if self.config_of({key: label}) == self.base:
                    return label
            allowed = f"is none of {', '.join(distribution.labels)}"
        else:
            own = _at(self.base.model_dump(mode="json"), key)
            low, high = distribution.ends or (-math.inf, math.inf)
            allowed_here = (v for v in own if isinstance(v, (int, float)) and low <= v <= high)
            for value in allowed_here:
                if self.config_of({key: value}) == self.base:
                    return value
            shown = " and ".join(dict.fromkeys(map(str, own)))
            allowed = f"{shown} is not from {low:g} to {high:g}"
        raise UserError(
            f"space.{key}: the config's own value {allowed}; the first trial is the config as it is, "
            "so widen the space"
        )


def is_unbeaten(final: Mapping[str, Any]) -> bool:
    """No trial beat the config as it is."""
    return bool(final["best"]["params"] == final["default"]["params"])


def final_rows(final: Mapping[str, Any], search: Search) -> list[list[str]]:
    """Of the best setting and the config as it is: validation, and mean and deviation over seeds of
    the test figures, in percent."""
    rows = []
    shown_as = {"best": "best setting", "default": "config as it is"}
    if is_unbeaten(final):
        shown_as = {"best": "config as it is"}
    for name, shown in shown_as.items():
        runs, validation = final[name]["test"], final[name]["validation"]
        finished = [run for run in runs if "error" not in run]
        if len(finished) < len(runs):
            shown += f" ({len(finished)} of {len(runs)} seeds; the others failed)"
        row = [shown, "-" if validation is None else f"{100 * validation:.1f}"]
        for who in ("ensemble", "mean peer"):
            for metric in dict.fromkeys(("recall@1", "map@r", search.config.metric)):
                values = [_figure(run, who, metric) for run in finished]
                deviation = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
                row.append(f"{100 * np.mean(values):.1f}{deviation}" if values else "-")
        rows.append(row)
    return rows


def final_head(search: Search) -> list[str]:
    metrics = dict.fromkeys(("recall@1", "map@r", search.config.metric))
    return ["", "validation"] + [f"{who} {m}" for who in ("ensemble", "mean peer") for m in metrics]


def _figure(run: Mapping[str, Any], who: str, metric: str) -> float:
    if who == "ensemble":
        return float(run["ensemble"][metric])
    return float(np.mean([found[metric] for found in run["peers"].values()]))


def load_search(path: Path | None = None, **changes: Any) -> SearchConfig:
    """Reads a search file (None: the built-in one); what is in ``changes`` and not None replaces it.

    Raises:
        UserError: the file is missing or no YAML, or says what is not allowed.
    """
    path = path or DEFAULT_SEARCH
    raw = read_yaml(path, "search file")
    raw |= {key: value for key, value in changes.items() if value is not None}
    try:
        return SearchConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, str(path), SearchConfig)) from None


def _counts_at_the_start(key: str) -> bool:
    """Or is of a whole of which a part does."""
    above, _, last = key.rpartition(".")
    return (above == "cohort.peers" and last.isdigit()) or f".{key}".endswith(
        tuple(f".{ending}" for ending in _OF_THE_START)
    )


def _at(tree: Any, key: str) -> list[Any]:
    """The value at a dotted key of an effective config; of a base's setting those of all peers, as any
    of them may state it itself."""
    if key.startswith("cohort.base."):
        own = key.removeprefix("cohort.base.").split(".")
        return [_below(peer, own) for peer in tree["cohort"]["peers"]]
    return [_below(tree, key.split("."))]


def _below(tree: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        if isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, Mapping):
            tree = tree.get(part)
        else:
            return None
    return tree
