"""The arms of the ablation: images, batches and steps alike, with and without each ingredient.

A data set's folder has a `config.yaml` of equal peers, and an `arms.yaml` that says what each
ingredient is::

    independent: {...}   # settings, as in --set, of the arms that learn alone: found by their own search
    mutual: {...}        # of those that learn from each other: found by theirs
    model: [{...}, ...]  # what each diversity gives to peers 0 to 3
    view: [...]
    temporal: [...]
    ema: {...}     # settings
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_dmml.config.loading import read_settings, read_yaml, set_setting
from ray_dmml.config.schema import Config, TrainConfig
from ray_dmml.errors import UserError

DIVERSITIES = ("model", "view", "temporal")
NUM_SNAPSHOTS = 2
OF_AN_INGREDIENT = ("cohort.base.", "loss.")
"""What arms.yaml may set of all peers: nothing that would change the budget."""


@dataclass(frozen=True)
class Arm:
    """What one arm is made of."""

    mutual: bool = False
    """The peers learn from each other; else each from labels alone."""

    diversities: tuple[str, ...] = ()
    num_peers: int = 2
    ema: bool = False
    """All peers average their weights, and are judged with the averages."""

    unit: bool = False
    """Relations are of embeddings of unit length, whatever the search chose."""

    snapshots: int = 1
    """Above 1: one net, its learning rate falling so many times (Huang et al., *Snapshot Ensembles*,
    ICLR 2017, https://arxiv.org/abs/1704.00109); what it was at each end is a member."""

    teacher: bool = False
    """The only peer learns from a frozen one: the same net, trained alone to the end before."""

    @property
    def settings(self) -> dict[str, Any]:
        """What makes it this arm, whatever arms.yaml and a candidate say."""
        found: dict[str, Any] = {}
        if not self.mutual:
            found |= {"loss.relational.distance_weight": 0, "loss.relational.angle_weight": 0}
        if self.unit:
            found["loss.relational.normalize"] = "unit"
        if self.snapshots > 1:
            found["cohort.base.schedule.name"] = "cosine"
            found["cohort.base.schedule.cycles"] = self.snapshots
        return found


def _arms() -> dict[str, Arm]:
    found = {}
    for name, mutual in (("independent", False), ("mutual", True)):
        found[name] = Arm(mutual)
        for diversity in DIVERSITIES:
            found[f"{name} + {diversity}"] = Arm(mutual, (diversity,))
        found[f"{name} + all"] = Arm(mutual, DIVERSITIES)
        found[f"{name} + all + ema"] = Arm(mutual, DIVERSITIES, ema=True)
    found["mutual + all, unit length"] = Arm(True, DIVERSITIES, unit=True)
    found["single net"] = Arm(num_peers=1)
    found["snapshots"] = Arm(num_peers=1, snapshots=NUM_SNAPSHOTS)
    found["self-distillation"] = Arm(True, num_peers=1, teacher=True)
    for num_peers in (3, 4):
        found[f"independent + all, M = {num_peers}"] = Arm(False, DIVERSITIES, num_peers)
        found[f"mutual + all, M = {num_peers}"] = Arm(True, DIVERSITIES, num_peers)
    return found


ARMS = _arms()

TEACHER = Arm(num_peers=1)
"""What the frozen net of self-distillation was."""


class Plan:
    """The experiment of one data set.

    Args:
        folder: with `config.yaml` and `arms.yaml`.
        overrides: `KEY=VALUE` of all arms, such as where the images are.
        candidate: what is other than in `arms.yaml`: settings of both `independent` and `mutual`, and
            any other of its parts whole.

    Raises:
        UserError: a file or setting is not as it must be.
    """

    def __init__(
        self, folder: Path, overrides: list[str], candidate: Mapping[str, Any] | None = None
    ) -> None:
        self._raw = read_settings(folder / "config.yaml", overrides)
        _require_heeded(self._raw)
        self._parts = _changed(_read_arms(folder / "arms.yaml"), candidate or {})
        for name, arm in ARMS.items():
            try:
                config = self.config(arm, 0)
                if arm.ema and any(peer.ema is None for peer in config.cohort.peers):
                    raise UserError("ema must give all peers cohort.base.ema")
            except UserError as error:
                of = f"arm {name}" if candidate else f"{folder / 'arms.yaml'}: {name}"
                raise UserError(f"{of}: {error}") from None
        steps, every = config.train.steps, config.train.evaluate_every
        if not every or steps % (every * NUM_SNAPSHOTS):  # measure() counts in whole `every`, too
            raise UserError(
                f"train.steps {steps} must be a multiple of {NUM_SNAPSHOTS} x train.evaluate_every "
                f"{every}, so that snapshots are taken at the ends of cycles"
            )
        if not config.data.validation_fraction:
            raise UserError(
                "data.validation_fraction must be above 0: steps are chosen on those classes"
            )

    def config(self, arm: Arm, seed: int, teacher: Path | None = None) -> Config:
        """Of an arm and seed; with a teacher's weights, its frozen peer comes last."""
        raw = copy.deepcopy(self._raw)
        raw["seed"] = seed
        peers = [dict[str, Any]() for _ in range(arm.num_peers)]
        if teacher is not None:
            peers.append({"name": "teacher", "frozen": True, "weights": str(teacher)})
        raw.setdefault("cohort", {})["peers"] = peers
        steps = raw.get("train", {}).get("steps", TrainConfig().steps)
        # One thread an arm: arms run side by side, and the bits of all are of the same threads.
        settings = {"cohort.threads_per_peer": 1, "cohort.base.schedule.steps": steps}
        settings |= self._parts["mutual" if arm.mutual else "independent"]
        if arm.ema:
            settings |= self._parts["ema"]
        for key, value in (settings | arm.settings).items():
            set_setting(raw, key, value, key)
        # After the base's settings: what all peers state, such as a view each, is no mistake here.
        for diversity in arm.diversities:
            for peer, own in zip(peers, self._parts[diversity], strict=False):
                peer.update(own)
        return Config.parse(raw, source="the arm's settings")

    def digest(self, arm: Arm) -> str:
        """Of all settings that an arm's figures depend on, the seed apart."""
        teacher = arm.teacher and self._figures_of(TEACHER)
        told = [self._figures_of(arm), arm.snapshots, teacher]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    def _figures_of(self, arm: Arm) -> dict[str, Any]:
        """The settings that figures depend on; of the images see `Splits.digests`."""
        settings = self.config(arm, 0).model_dump(mode="json")
        for place in ("root", "manifest", "cache_dir", "cache_gib", "check_images"):
            del settings["data"][place]
        for part in ("checkpoint", "run"):
            del settings[part]
        return settings


def _changed(parts: dict[str, Any], candidate: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of an arms.yaml with a candidate's in their place."""
    if both := sorted({"independent", "mutual"} & candidate.keys()):
        raise UserError(f"{both[0]} is no setting: a candidate's settings are of its arm already")
    whole = {key: part for key, part in candidate.items() if key in parts}
    settings = {key: value for key, value in candidate.items() if key not in parts}
    kinds = {kind: {**parts[kind], **settings} for kind in ("independent", "mutual")}
    changed = {**parts, **whole, **kinds}
    _require_parts(changed, "what it gives")
    return changed


def mutual_only(settings: Mapping[str, Any]) -> list[str]:
    """Those that change nothing for peers that learn alone."""
    return [key for key in settings if f"{key}.".startswith("loss.relational.")]


def _require_heeded(raw: dict[str, Any]) -> None:
    """Raises UserError where a setting of the experiment's would change nothing here."""
    config = Config.parse(raw)
    if any(raw.get("cohort", {}).get("peers", [])):
        raise UserError("cohort.peers must be equal ({}): arms.yaml says how peers differ")
    heeded = {
        "train.init_from": (config.train.init_from, None),
        "train.monitor": (config.train.monitor, "ensemble"),
        "failure.on_nonfinite": (config.failure.on_nonfinite, "fail"),
    }
    for key, (value, only) in heeded.items():
        if value != only:
            raise UserError(f"{key} must be {json.dumps(only)} in an ablation, not {value}")


def _read_arms(file: Path) -> dict[str, Any]:
    """Raises UserError where something is missing or of another form."""
    parts = read_yaml(file, "arms file")
    _require_parts(parts, str(file))
    if unheeded := mutual_only(parts["independent"]):
        raise UserError(
            f"{file}: independent: {', '.join(unheeded)} would change nothing: these peers learn alone"
        )
    return parts


def _require_parts(parts: dict[str, Any], file: str) -> None:
    """Raises UserError where something is missing or of another form."""
    known = {"independent", "mutual", "ema", *DIVERSITIES}
    if set(parts) != known:
        raise UserError(f"{file} must say {', '.join(sorted(known))}, and nothing else")
    most = max(arm.num_peers for arm in ARMS.values())
    for name, part in parts.items():
        if name in DIVERSITIES:
            if not isinstance(part, list) or len(part) < most:
                raise UserError(
                    f"{file}: {name} must be a list of settings, one of each of {most} peers"
                )
            if not all(isinstance(own, dict) for own in part):
                raise UserError(f"{file}: {name} must have settings (key: value) for each peer")
        elif not isinstance(part, dict):
            raise UserError(f"{file}: {name} must be settings")
        elif others := [key for key in part if not str(key).startswith(OF_AN_INGREDIENT)]:
            raise UserError(
                f"{file}: {name} may say {' and '.join(f'{each}*' for each in OF_AN_INGREDIENT)}, not "
                f"{', '.join(map(str, others))}: all else is alike in all arms, and in config.yaml"
            )
    if unheeded := mutual_only(parts["ema"]):
        raise UserError(
            f"{file}: ema may not say {', '.join(unheeded)}: it is of independent arms, too"
        )
