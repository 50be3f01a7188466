"""The search space and the other settings of a search. All of them are checked before a trial runs.

A search file names settings as ``--set`` does, and gives the values that each of them may take::

    space:
      loss.relational.distance_weight: {loguniform: [0.1, 10]}
      cohort.peers.1.update_interval: {choice: [1, 2, 4]}
    trial: {train.steps: 100}      # applies to the trials only
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ray_dmml.config.loading import dotted, read_yaml, set_setting
from ray_dmml.config.messages import explain
from ray_dmml.config.schema import Config, Count, Section, Whole
from ray_dmml.errors import UserError

_FIXED_IN_TRIALS = {
    "trials and final runs use the same images": (
        "data.name",
        "data.args",
        "data.root",
        "data.source",
        "data.manifest",
    ),
    "trials would train on classes that the final runs are tested on": (
        "data.split_by",
        "data.train_fraction",
        "data.split_seed",
    ),
    "trials and final runs are evaluated alike": ("evaluation.recall_at", "evaluation.weights"),
    "the search sets it": (
        "data.validation_fold",
        "evaluation.split",
        "evaluation.untrained",
        "train.tensorboard",
        "train.report",
        "train.pictures",
        "train.early_stopping",
    ),
    "the search sets what a trial saves": ("checkpoint.every_steps", "checkpoint.storage_path"),
}
"""Settings that ``trial`` and ``space`` may not change, by the reason."""

_FIXED_IN_SPACE = {
    **_FIXED_IN_TRIALS,
    "all trials are evaluated on the same classes": ("data.validation_fraction", "data.validation_seed"),
    "all trials are evaluated at the same steps": ("train.evaluate_every",),
}
"""Settings that ``space`` may not change, by the reason."""

Params = Mapping[str, Any]
"""The sampled parameters of a trial: setting to value. A choice is given by its label."""


class Distribution(Section):
    """The values that one setting may take. Exactly one field is given."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None  # numbers, names, whole lists of peers
    uniform: tuple[float, float] | None = None  # a number between two limits
    loguniform: tuple[float, float] | None = None  # a number between two limits, whose logarithm is uniform
    integer: tuple[int, int] | None = None  # both limits included

    @model_validator(mode="after")
    def _check(self) -> Distribution:
        kinds = list(type(self).model_fields)
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(kinds)}, not {len(given)}")
        if self.limits is not None and not self.limits[0] < self.limits[1]:
            raise ValueError(f"{given[0]} needs two numbers, the lower one first, not {list(self.limits)}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs numbers above 0")
        return self

    @property
    def limits(self) -> tuple[float, float] | None:
        """The lowest and the highest value, or None for a choice."""
        return self.uniform or self.loguniform or self.integer

    @property
    def labels(self) -> list[str]:
        """Names of the choices: a string stands for itself, every other value is written as JSON."""
        return [value if isinstance(value, str) else json.dumps(value) for value in self.choice or ()]

    def value(self, sample: Any) -> Any:
        """The setting's value for a sampled parameter."""
        return self.choice[self.labels.index(sample)] if self.choice is not None else sample

    def extremes(self) -> list[Any]:
        """Samples to validate. If the config accepts all of them, it accepts nearly every sample."""
        if self.limits is None:
            return self.labels
        low, high = self.limits
        # A fraction as well, because a setting that needs an integer may accept both limits.
        return [low, high] if self.integer is not None else [low, high, low + (high - low) / math.pi]


class SearchConfig(Section):
    """The settings of a search."""

    space: Annotated[dict[str, Distribution], Field(min_length=1)]
    """The settings to search, named as in `--set`, and the values that each may take."""

    trial: dict[str, Any] = Field(default_factory=dict)
    """Settings of the trials only, such as fewer `train.steps`. The final runs use the config's own."""

    objective: Literal["ensemble", "mean_peer", "best_peer"] = "ensemble"
    """Whose validation metric the search maximises. The mean and the best are of the peers that are not frozen."""

    metric: str = "recall@1"
    """recall@K for a K of evaluation.recall_at, map@r or r_precision."""

    cost: bool = False
    """Also minimise the parameters of all networks that the objective uses. The report then lists the Pareto front."""

    num_samples: Count = 8
    """Number of trials. The first one is the baseline: the config without changes."""

    sampler: Literal["optuna", "random"] | None = None
    """`optuna` (multivariate TPE, needs the extra `tune`) or `random`; null: optuna if it is installed."""

    scheduler: Literal["asha", "none"] = "asha"
    """`asha` stops the worse trials early; `none` trains every trial to its end."""

    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """`asha` continues one in this many trials at each rung."""

    folds: Count = 1
    """Train each trial on this many validation folds and take the mean. More than 1 needs `scheduler: none`."""

    seeds: Count = 1
    """Train each trial (on each fold) with this many seeds from the config's on; more than 1 need `scheduler: none`."""

    final_seeds: Whole = 3
    """Final runs of the best trial and of the baseline, on all training classes. 0: the test classes are never read."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sampler."""

    @model_validator(mode="after")
    def _check(self) -> SearchConfig:
        for name in ("folds", "seeds"):
            if (number := getattr(self, name)) > 1 and self.scheduler != "none":
                raise ValueError(
                    f"{name}: {number} needs scheduler: none, because the objective of a trial is the "
                    "mean over its runs and is known only after the last one"
                )
        return self

    @property
    def sampler_name(self) -> str:
        """``optuna`` or ``random``."""
        return self.sampler or ("optuna" if importlib.util.find_spec("optuna") else "random")


class Search:
    """A search over the settings of an experiment.

    Args:
        raw: the experiment's settings as :func:`~ray_dmml.config.loading.read_settings` returns them.
        config: the settings of the search.

    Raises:
        UserError: a setting or value of the space is not allowed, the config's own value is not in the space, or
            there are no validation classes.
    """

    def __init__(self, raw: Mapping[str, Any], config: SearchConfig) -> None:
        self.raw, self.config = copy.deepcopy(dict(raw)), config
        self.base = Config.parse(self.raw)
        recalls = [f"recall@{k}" for k in sorted({1, *self.base.evaluation.recall_at})]
        self.metrics = [*recalls, "map@r", "r_precision"]
        self._check_trial_settings()
        self._check_validation_classes()
        if config.sampler == "optuna" and importlib.util.find_spec("optuna") is None:
            raise UserError("sampler: optuna needs the extra: pip install 'ray-dmml[tune]'")
        if config.metric not in self.metrics:
            raise UserError(f"metric {config.metric!r} is not available; choose one of {', '.join(self.metrics)}")
        self._check_space()
        self.baseline = {key: self._own_sample(key) for key in config.space}
        """The sampled parameters that leave the config unchanged."""
        if self.config_of(self.baseline) != self.base:
            raise UserError(
                "space: its settings overwrite each other, so no sample gives the unchanged config: "
                f"{', '.join(config.space)}"
            )

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The runs of a trial: (fold, number of the seed)."""
        return [*itertools.product(range(self.config.folds), range(self.config.seeds))]

    def config_of(self, params: Params, in_trial: bool = False) -> Config:
        """The experiment with sampled parameters. In a trial, the settings of ``trial`` apply as well."""

        # cohort.peers goes before one of its peers. The base goes last: set_setting refuses it if every
        # peer has a sampled value of its own.
        def order(key: str) -> tuple[bool, int]:
            return key.startswith("cohort.base."), key.count(".")

        changes = [(f"space.{key}", self.config.space[key].value(params[key])) for key in sorted(params, key=order)]
        if in_trial:
            changes += [(f"trial.{key}", value) for key, value in self.config.trial.items()]
        raw = copy.deepcopy(self.raw)
        for source, value in changes:
            # A copy, because later keys may change parts of it.
            set_setting(raw, source.partition(".")[2], copy.deepcopy(value), source)
        return Config.parse(raw, source="the trial's settings")

    def trial_config(self, params: Params, fold: int = 0, seed: int = 0) -> Config:
        """The config of one run of a trial. It never reads the test classes.

        Args:
            fold: counts from the config's ``data.validation_fold``.
            seed: counts from the config's ``seed``.
        """
        config = self.config_of(params, in_trial=True)
        # A trial resumes at a checkpoint. It needs one at each report, and the config may have more.
        reports, own = config.train.evaluate_every, config.checkpoint.every_steps
        every_steps = reports if not own or reports % own else own
        # Not the best weights: the final runs hold out no classes that could select them.
        weights = "ema" if config.evaluation.weights == "ema" else "last"
        return changed(
            config.model_copy(update={"seed": config.seed + seed}),
            # The scheduler ends trials.
            train={"tensorboard": False, "report": False, "pictures": 0, "early_stopping": None},
            data={"validation_fold": config.data.validation_fold + fold},
            evaluation={"split": "validation", "untrained": False, "weights": weights},
            checkpoint={"every_steps": every_steps, "storage_path": None},
        )

    def config_variants(self) -> list[Config]:
        """The trials' config and one for each extreme of each setting. They may differ in the number of peers and of
        steps."""
        space = self.config.space.items()
        samples = [{key: sample} for key, values in space for sample in values.extremes()]
        return [self.trial_config(params) for params in ({}, *samples)]

    def objective(self, figures: Mapping[str, Any], learners: Collection[str]) -> float:
        """The value to maximise, from the figures ``{"peers": ..., "ensemble": ...}`` of an evaluation. ``learners``
        are the peers that are not frozen: the figures of the others are those of their weights."""
        metric = self.config.metric
        if self.config.objective == "ensemble":
            return float(figures["ensemble"][metric])
        values = [float(row[metric]) for name, row in figures["peers"].items() if name in learners]
        return max(values) if self.config.objective == "best_peer" else sum(values) / len(values)

    def _check_trial_settings(self) -> None:
        for key, searched in itertools.product(self.config.trial, self.config.space):
            if f"{searched}.".startswith(f"{key}.") or f"{key}.".startswith(f"{searched}."):
                raise UserError(f"trial.{key} replaces the samples of space.{searched}: remove one")
        try:
            self._require_fixed(self.config_of({}, in_trial=True), _FIXED_IN_TRIALS)
        except UserError as error:
            raise UserError(f"trial: {error}") from None

    def _check_validation_classes(self) -> None:
        folds, fraction = self.config.folds, self.trial_config({}).data.validation_fraction
        if not fraction:
            raise UserError("a search compares trials on validation classes: set data.validation_fraction above 0")
        if folds > (most := round(1 / fraction)):
            raise UserError(f"folds {folds}: data.validation_fraction {fraction} gives at most {most}")
        if folds > 1 and self.base.data.validation_fold:
            raise UserError(f"folds {folds} count from 0: leave out data.validation_fold")

    def _check_space(self) -> None:
        for key, distribution in self.config.space.items():
            for sample in distribution.extremes():
                try:
                    self.trial_config({key: sample})
                    self._require_fixed(self.config_of({key: sample}), _FIXED_IN_SPACE)
                except UserError as error:
                    raise UserError(f"space.{key}: {sample}: {error}") from None

    def _require_fixed(self, config: Config, fixed: Mapping[str, Sequence[str]]) -> None:
        for reason, keys in fixed.items():
            for key in keys:
                if attrgetter(key)(config) != attrgetter(key)(self.base):
                    raise UserError(f"{key} must keep the config's value: {reason}")

    def _own_sample(self, key: str) -> Any:
        """The sample of a setting that leaves the config unchanged."""
        distribution = self.config.space[key]
        if distribution.limits is None:
            samples: Sequence[Any] = distribution.labels
            outside = f"is none of {', '.join(samples)}"
        else:
            settings, keys = dotted(self.base.model_dump(mode="json")), [key]
            if key.startswith("cohort.base."):  # Each peer may have a value of its own.
                peers = range(len(self.base.cohort.peers))
                keys = [key.replace("base", f"peers.{number}", 1) for number in peers]
            own = [settings.get(key) for key in keys]
            low, high = distribution.limits
            samples = [v for v in own if isinstance(v, (int, float)) and low <= v <= high]
            shown = " and ".join(dict.fromkeys(map(str, own)))
            outside = f"{shown} is not from {low:g} to {high:g}"
        for sample in samples:
            if self.config_of({key: sample}) == self.base:
                return sample
        raise UserError(
            f"space.{key}: the config's own value {outside}. The first trial is the baseline, the "
            "config without changes: add its value to the space"
        )


def load_search(path: Path | None = None, **changes: Any) -> SearchConfig:
    """Reads a search file.

    Args:
        path: the YAML file; None: the built-in search of the quickstart.
        changes: settings that replace those of the file, unless they are None.

    Raises:
        UserError: the file is missing, is not valid YAML, or has a setting that is not allowed.
    """
    path = path or Path(__file__).parent / "search.yaml"
    raw = read_yaml(path, "search file")
    raw |= {key: value for key, value in changes.items() if value is not None}
    try:
        return SearchConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, str(path), SearchConfig)) from None


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """A copy of a config with other values in some sections. The values are not validated."""
    update = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=update)
