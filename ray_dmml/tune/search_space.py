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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ray_dmml.config.loading import read_yaml, set_setting
from ray_dmml.config.messages import explain
from ray_dmml.config.schema import Config, Count, Section, Whole
from ray_dmml.errors import UserError

DEFAULT_SEARCH = Path(__file__).parent / "search.yaml"

_FIXED_IN_TRIALS = {
    "trials and final runs use the same images": (*("data.name", "data.root", "data.source", "data.manifest"),),
    "trials would train on classes that the final runs are tested on": (*("data.train_fraction", "data.split_seed"),),
    "trials and final runs are evaluated alike": ("evaluation.recall_at", "evaluation.weights"),
    "the search sets it": (
        *("data.validation_fold", "evaluation.split", "evaluation.untrained"),
        *("train.tensorboard", "checkpoint.every_steps", "checkpoint.storage_path"),
    ),
}
"""Settings that ``trial`` and ``space`` may not change, by the reason."""

_FIXED_IN_SPACE = {
    **_FIXED_IN_TRIALS,
    "all trials are evaluated on the same classes at the same steps": (
        *("data.validation_fraction", "data.validation_seed", "train.evaluate_every"),
    ),
}
"""Settings that ``space`` may not change, by the reason."""

Params = Mapping[str, Any]
"""The sampled parameters of a trial: setting to value. A choice is given by its label."""


class Distribution(Section):
    """The values that one setting may take. Exactly one field is given."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """One of these values: numbers, names, or whole lists of transforms or peers."""

    uniform: tuple[float, float] | None = None
    """A number between two limits."""

    loguniform: tuple[float, float] | None = None
    """A number between two limits. Its logarithm is uniform."""

    integer: tuple[int, int] | None = None
    """An integer between two limits, both included."""

    @model_validator(mode="after")
    def _check(self) -> Distribution:
        given = [kind for kind in type(self).model_fields if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}, not {len(given)}")
        limits = self.limits
        if limits is not None and not limits[0] < limits[1]:
            raise ValueError(f"{given[0]} needs two numbers, the lower one first, not {list(limits)}")
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
        if self.integer is not None:
            return [low, high]
        # A fraction as well, because a setting that needs an integer accepts both limits.
        return [low, high, low + (high - low) / math.pi]


class SearchConfig(Section):
    """The settings of a search."""

    space: Annotated[dict[str, Distribution], Field(min_length=1)]
    """The settings to search, named as in `--set`, and the values that each may take."""

    trial: dict[str, Any] = Field(default_factory=dict)
    """Settings that apply to the trials only, such as fewer `train.steps`. The final runs use the config's own."""

    objective: Literal["ensemble", "mean_peer", "best_peer"] = "ensemble"
    """The search maximises the validation metric of the ensemble, of the mean peer or of the best peer."""

    metric: str = "recall@1"
    """recall@K for a K of evaluation.recall_at, map@r or r_precision."""

    cost: bool = False
    """Also minimise the cost of inference: the parameters of all networks that the objective uses. The report then
    lists the Pareto front."""

    num_samples: Count = 8
    """Number of trials. The first one is the baseline: the config without changes."""

    sampler: Literal["optuna", "random"] | None = None
    """`optuna` (multivariate TPE, needs the extra `search`) or `random`; null: optuna if it is installed, else
    random."""

    scheduler: Literal["asha", "none"] = "asha"
    """`asha` stops the worse trials early; `none` trains every trial to its end."""

    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """`asha` continues one in this many trials at each rung."""

    folds: Count = 1
    """Train each trial on this many validation folds and take the mean. More than 1 needs `scheduler: none`."""

    seeds: Count = 1
    """Train each trial with this many seeds (the config's seed, seed + 1, ...) and take the mean. With `folds`, every
    fold is trained with every seed. More than 1 needs `scheduler: none`."""

    final_seeds: Whole = 3
    """Number of final runs of the best trial and of the baseline. A final run trains on all training classes and is
    evaluated on the test classes. 0: no final runs, the test classes are never read."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sampler."""

    @model_validator(mode="after")
    def _check(self) -> SearchConfig:
        for name, number in (("folds", self.folds), ("seeds", self.seeds)):
            if number > 1 and self.scheduler != "none":
                raise ValueError(
                    f"{name}: {number} needs scheduler: none, because the objective of a trial is the "
                    "mean over its runs and is known only after the last one"
                )
        return self

    @property
    def sampler_name(self) -> str:
        """``optuna`` or ``random``."""
        if self.sampler is not None:
            return self.sampler
        return "optuna" if importlib.util.find_spec("optuna") else "random"


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
        self.metrics = [f"recall@{k}" for k in sorted({1, *self.base.evaluation.recall_at})]
        self.metrics += ["map@r", "r_precision"]
        self._check_trial_settings()
        self._check_validation_classes()
        if config.sampler == "optuna" and importlib.util.find_spec("optuna") is None:
            raise UserError("sampler: optuna needs the extra: pip install 'ray-dmml[search]'")
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

    def config_of(self, params: Params) -> Config:
        """The experiment with sampled parameters."""
        return Config.parse(self._settings(params), source="the trial's settings")

    def trial_config(self, params: Params, fold: int = 0, seed: int = 0) -> Config:
        """The config of one run of a trial. It never reads the test classes.

        Args:
            fold: counts from the config's ``data.validation_fold``.
            seed: counts from the config's ``seed``.
        """
        config = Config.parse(self._trial_settings(params), source="the trial's settings")
        train = config.train.model_copy(update={"tensorboard": False})
        # A trial resumes at a checkpoint. It needs one at each report, and the config may have more.
        reports, own = config.train.evaluate_every, config.checkpoint.every_steps
        every_steps = reports if not own or reports % own else own
        checkpoint = config.checkpoint.model_copy(update={"every_steps": every_steps, "storage_path": None})
        fold += config.data.validation_fold
        data = config.data.model_copy(update={"validation_fold": fold})
        # Not the best weights: the final runs hold out no classes that could select them.
        weights = "ema" if config.evaluation.weights == "ema" else "last"
        evaluation = config.evaluation.model_copy(update={"split": "validation", "weights": weights})
        return config.model_copy(
            update={
                "seed": config.seed + seed,
                "train": train,
                "data": data,
                "evaluation": evaluation,
                "checkpoint": checkpoint,
            }
        )

    def config_variants(self) -> list[Config]:
        """The trials' config and one for each extreme of each setting. They may differ in the number of peers and of
        steps."""
        space = self.config.space.items()
        samples = [{key: sample} for key, values in space for sample in values.extremes()]
        return [self.trial_config(params) for params in ({}, *samples)]

    def objective(self, figures: Mapping[str, Any]) -> float:
        """The value to maximise, from the figures ``{"peers": ..., "ensemble": ...}`` of an evaluation."""
        metric = self.config.metric
        if self.config.objective == "ensemble":
            return float(figures["ensemble"][metric])
        values = [float(peer[metric]) for peer in figures["peers"].values()]
        return max(values) if self.config.objective == "best_peer" else sum(values) / len(values)

    def _settings(self, params: Params) -> dict[str, Any]:
        raw = copy.deepcopy(self.raw)

        # cohort.peers goes before one of its peers. The base goes last: set_setting refuses it if every
        # peer has a sampled value of its own.
        def order(key: str) -> tuple[bool, int]:
            return key.startswith("cohort.base."), key.count(".")

        for key in sorted(params, key=order):
            # A copy, because later keys may change parts of it.
            value = copy.deepcopy(self.config.space[key].value(params[key]))
            set_setting(raw, key, value, f"space.{key}")
        return raw

    def _trial_settings(self, params: Params) -> dict[str, Any]:
        raw = self._settings(params)
        for key, value in self.config.trial.items():
            set_setting(raw, key, copy.deepcopy(value), f"trial.{key}")
        return raw

    def _check_trial_settings(self) -> None:
        """Raises UserError if ``trial`` replaces a searched setting or changes a fixed one."""
        for key, searched in itertools.product(self.config.trial, self.config.space):
            if f"{searched}.".startswith(f"{key}.") or f"{key}.".startswith(f"{searched}."):
                raise UserError(f"trial.{key} replaces the samples of space.{searched}: remove one")
        try:
            self._require_fixed(self._trial_settings({}), _FIXED_IN_TRIALS)
        except UserError as error:
            raise UserError(f"trial: {error}") from None

    def _check_validation_classes(self) -> None:
        """Raises UserError if there are none, or too few for the folds."""
        folds, fraction = self.config.folds, self.trial_config({}).data.validation_fraction
        if not fraction:
            raise UserError("a search compares trials on validation classes: set data.validation_fraction above 0")
        if folds > (most := round(1 / fraction)):
            raise UserError(f"folds {folds}: data.validation_fraction {fraction} gives at most {most}")
        if folds > 1 and self.base.data.validation_fold:
            raise UserError(f"folds {folds} count from 0: leave out data.validation_fold")

    def _check_space(self) -> None:
        """Raises UserError for a value that the config refuses and for a fixed setting."""
        for key, distribution in self.config.space.items():
            for sample in distribution.extremes():
                try:
                    self.trial_config({key: sample})
                    self._require_fixed(self._settings({key: sample}), _FIXED_IN_SPACE)
                except UserError as error:
                    raise UserError(f"space.{key}: {sample}: {error}") from None

    def _require_fixed(self, raw: dict[str, Any], fixed: Mapping[str, Sequence[str]]) -> None:
        """Raises UserError if ``raw`` changes one of the fixed settings."""
        trial = Config.parse(raw, source="the trial's settings").model_dump(mode="json")
        own = self.base.model_dump(mode="json")
        for reason, keys in fixed.items():
            for key in keys:
                if _values_at(own, key) != _values_at(trial, key):
                    raise UserError(f"{key} must keep the config's value: {reason}")

    def _own_sample(self, key: str) -> Any:
        """The sample of a setting that leaves the config unchanged."""
        distribution = self.config.space[key]
        if distribution.limits is None:
            samples: Sequence[Any] = distribution.labels
            outside = f"is none of {', '.join(samples)}"
        else:
            own = _values_at(self.base.model_dump(mode="json"), key)
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
    path = path or DEFAULT_SEARCH
    raw = read_yaml(path, "search file")
    raw |= {key: value for key, value in changes.items() if value is not None}
    try:
        return SearchConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, str(path), SearchConfig)) from None


def _values_at(tree: Any, key: str) -> list[Any]:
    """The value at a dotted key of an effective config. A key of ``cohort.base`` gives the values of all peers,
    because each of them may have its own."""
    if key.startswith("cohort.base."):
        parts = key.removeprefix("cohort.base.").split(".")
        return [_value_at(peer, parts) for peer in tree["cohort"]["peers"]]
    return [_value_at(tree, key.split("."))]


def _value_at(tree: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        if isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, Mapping):
            tree = tree.get(part)
        else:
            return None
    return tree
