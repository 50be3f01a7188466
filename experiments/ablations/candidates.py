"""Candidates for an ablation's settings, and the training classes that they are judged on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from ray_dmml.config.loading import dotted, read_yaml
from ray_dmml.config.messages import explain
from ray_dmml.data.dataset import ImageSet, Splits, hold_out_classes
from ray_dmml.data.datasets import load_splits
from ray_dmml.errors import UserError

from .arms import ARMS, DIVERSITIES, Plan, mutual_only

OVERRIDES = ("data.validation_fraction=0.2", "data.validation_seed=0", "data.validation_fold=0")
"""A plan must hold out validation classes; here `HeldOut` says which, whatever the config does."""

Name = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^|\n]+$")]
"""Stands in a table."""


class HeldOut(BaseModel):
    """Some of the training classes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prefix: str | None = Field(default=None, min_length=1)
    """Those whose names begin so."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """As `data.validation_fraction`: drawn."""

    fold: int = Field(default=0, ge=0)
    """As `data.validation_fold`."""

    @model_validator(mode="after")
    def _one_way(self) -> HeldOut:
        if (self.prefix is None) == (self.fraction is None):
            raise ValueError("must say prefix, or fraction (and fold)")
        if self.fraction is not None and self.fold >= max(1, round(1 / self.fraction)):
            raise ValueError(f"fold {self.fold} would hold out classes of fold 0 again")
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    held_out: dict[Name, HeldOut] = Field(min_length=1)
    candidates: dict[str, dict[Name, dict[str, Any] | None]] = Field(min_length=1)


class Task(NamedTuple):
    """One row."""

    arm: str
    candidate: str
    held_out: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, {self.candidate}, {self.held_out} held out, seed {self.seed}"


class Candidates:
    """What the candidates.yaml of an ablation's folder says.

    Raises:
        UserError: it is not as it must be, or a candidate is no setting of its arm.
    """

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.file = folder / "candidates.yaml"
        try:
            said = _File.model_validate(read_yaml(self.file, "candidates file"))
        except ValidationError as error:
            raise UserError(explain(error, str(self.file), _File)) from None
        self.held_out = said.held_out
        self.plans: dict[tuple[str, str], Plan] = {}
        for arm, candidates in said.candidates.items():
            if arm not in ARMS:
                raise UserError(f"{self.file}: no arm {arm!r}; there are: {'; '.join(ARMS)}")
            has = {*ARMS[arm].diversities, *(["ema"] if ARMS[arm].ema else [])}
            for name, settings in candidates.items():
                if lacking := {*DIVERSITIES, "ema"} & {*(settings or {})} - has:
                    raise UserError(
                        f"{self.file}: {arm}: {name}: {', '.join(sorted(lacking))} would change nothing: "
                        f"the arm has {', '.join(sorted(has)) or 'none of these'}"
                    )
                if not ARMS[arm].mutual and (unheeded := mutual_only(settings or {})):
                    raise UserError(
                        f"{self.file}: {arm}: {name}: {', '.join(unheeded)} would change nothing: these "
                        "peers learn alone"
                    )
                if fixed := sorted(ARMS[arm].settings.keys() & dotted(settings or {}).keys()):
                    raise UserError(
                        f"{self.file}: {arm}: {name}: {', '.join(fixed)} would change nothing: the arm "
                        "itself says it"
                    )
                try:
                    self.plans[arm, name] = Plan(folder, [*overrides, *OVERRIDES], settings)
                except UserError as error:
                    raise UserError(f"{self.file}: {arm}: {name}: {error}") from None

    def tasks(self, seeds: int) -> list[Task]:
        """All seeds of a candidate last, so that what is cut off has one of each."""
        return [
            Task(arm, name, held_out, seed)
            for seed in range(seeds)
            for arm, name in self.plans
            for held_out in self.held_out
        ]

    def data(self, skipped: tuple[str, ...] | None = None) -> Splits:
        """With all training classes in one; with ``skipped`` as another process found, unchecked."""
        (arm, _), plan = next(iter(self.plans.items()))
        config = plan.config(ARMS[arm], 0).data.model_copy(update={"validation_fraction": 0})
        return load_splits(config, skip=frozenset(skipped or ()), check=skipped is None)

    def splits(self, training: ImageSet, held_out: str) -> Splits:
        """Learn from some training classes and be judged on the others, as validation and as test classes.

        Raises:
            UserError: too few are held out, or left.
        """
        how = self.held_out[held_out]
        try:
            if how.prefix is None:
                train, judged = hold_out_classes(training, how.fraction or 0, 0, how.fold)
                assert judged is not None  # as fraction is above 0
            else:
                train, judged = _with_prefix(training, how.prefix)
        except UserError as error:
            raise UserError(f"{self.file}: held_out.{held_out}: {error}") from None
        return Splits(train, judged, judged)

    def settings(self, task: Task) -> str:
        """By which a row is known to be of what the files say now, its images apart."""
        how = self.held_out[task.held_out]
        as_written = {
            key: value for key, value in how.model_dump().items() if key in how.model_fields_set
        }
        told = [self.plans[task.arm, task.candidate].digest(ARMS[task.arm]), as_written]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _with_prefix(images: ImageSet, prefix: str) -> tuple[ImageSet, ImageSet]:
    """Classes of other names, and those whose names begin so."""
    chosen = [i for i, name in enumerate(images.class_names) if name.startswith(prefix)]
    is_held = np.isin(images.labels, chosen)
    if not 2 <= len(chosen) <= images.num_classes - 2:
        raise UserError(
            f"{len(chosen)} of {images.num_classes} classes begin with {prefix!r}; at least 2 must, "
            "and at least 2 must not"
        )
    judged = images.subset(np.flatnonzero(is_held))
    if not judged.can_be_evaluated():
        raise UserError(f"no image of the classes that begin with {prefix!r} has one to find")
    return images.subset(np.flatnonzero(~is_held)), judged
