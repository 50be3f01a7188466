"""The arms of an ablation: the same images, batches and steps, with and without each ingredient.

The folder of a data set holds two files. `config.yaml` has the settings of equal peers, and
`arms.yaml` says what each ingredient is::

    independent: {...}   # settings (as in --set) of arms whose peers learn from labels alone
    mutual: {...}        # settings of arms whose peers learn from each other as well
    model: [{...}, ...]  # what each diversity gives to peers 0 to 3
    view: [...]
    temporal: [...]
    ema: {...}           # settings of arms that are evaluated with averaged weights
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_dmml.config.loading import read_settings, read_yaml, set_setting
from ray_dmml.config.schema import Config, TrainConfig
from ray_dmml.errors import UserError

DIVERSITIES = ("model", "view", "temporal")
NUM_SNAPSHOTS = 2
ALLOWED = ("cohort.base.", "loss.")
"""Prefixes of the settings that `arms.yaml` may give to all peers. Others would change the budget."""

NO_EFFECT: Any = {
    "checkpoint": True,
    "failure": True,
    "data": {"root", "source", "manifest", "cache_dir", "cache_gib", "check_images"},
}
"""Settings that no figure depends on. The images have a digest of their own: `Splits.digests`."""


@dataclass(frozen=True)
class Arm:
    """The ingredients of one arm."""

    mutual: bool = False
    """Peers learn from each other. Without it each learns from labels alone."""

    diversities: tuple[str, ...] = ()
    num_peers: int = 2
    ema: bool = False
    """All peers average their weights and are evaluated with the average."""

    normalize: bool = False
    """Relations are of embeddings of unit length, whatever `arms.yaml` sets."""

    snapshots: int = 1
    """Above 1, one net is trained with so many cycles of its learning rate, and its weights at the
    end of each cycle are a member (Huang et al., *Snapshot Ensembles*, ICLR 2017,
    https://arxiv.org/abs/1704.00109)."""

    teacher: bool = False
    """The only peer learns from a frozen copy of its net, which was trained alone beforehand."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that define this arm. They override those of `arms.yaml`."""
        settings: dict[str, Any] = {}
        if not self.mutual:
            settings |= {"loss.relational.distance_weight": 0, "loss.relational.angle_weight": 0}
        if self.normalize:
            settings["loss.relational.normalize"] = True
        if self.snapshots > 1:
            settings["cohort.base.schedule.name"] = "cosine"
            settings["cohort.base.schedule.cycles"] = self.snapshots
        return settings


def _arms() -> dict[str, Arm]:
    arms = {}
    for kind, mutual in (("independent", False), ("mutual", True)):
        arms[kind] = Arm(mutual)
        for diversity in DIVERSITIES:
            arms[f"{kind} + {diversity}"] = Arm(mutual, (diversity,))
        arms[f"{kind} + all"] = Arm(mutual, DIVERSITIES)
        arms[f"{kind} + all + ema"] = Arm(mutual, DIVERSITIES, ema=True)
    arms["mutual + all, unit length"] = Arm(True, DIVERSITIES, normalize=True)
    arms["single net"] = Arm(num_peers=1)
    arms["snapshots"] = Arm(num_peers=1, snapshots=NUM_SNAPSHOTS)
    arms["self-distillation"] = Arm(True, num_peers=1, teacher=True)
    for num_peers in (3, 4):
        arms[f"independent + all, M = {num_peers}"] = Arm(False, DIVERSITIES, num_peers)
        arms[f"mutual + all, M = {num_peers}"] = Arm(True, DIVERSITIES, num_peers)
    return arms


ARMS = _arms()
MAX_PEERS = max(arm.num_peers for arm in ARMS.values())

TEACHER = Arm(num_peers=1)
"""How the frozen net of self-distillation is trained."""


class Plan:
    """The experiment of one data set.

    Args:
        folder: with `config.yaml` and `arms.yaml`.
        overrides: `KEY=VALUE` for all arms, such as the folder of the images.

    Raises:
        UserError: a file or a setting is invalid.
    """

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        file = folder / "arms.yaml"
        self._raw = read_settings(folder / "config.yaml", overrides)
        _require_comparable(self._raw)
        self._parts = read_yaml(file, "arms file")
        try:
            _require_parts(self._parts)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        for name, arm in ARMS.items():
            try:
                config = self.config(arm, 0)
                if arm.ema and any(peer.ema is None for peer in config.cohort.peers):
                    raise UserError("ema must give all peers cohort.base.ema")
            except UserError as error:
                raise UserError(f"{file}: {name}: {error}") from None
        steps, every = config.train.steps, config.train.evaluate_every
        if not every or steps % (every * NUM_SNAPSHOTS):  # measure() evaluates every `every` steps
            raise UserError(
                f"train.steps {steps} must be a multiple of {NUM_SNAPSHOTS} x train.evaluate_every "
                f"{every}, so that snapshots are taken at the ends of cycles"
            )
        if not config.data.validation_fraction:
            raise UserError("data.validation_fraction must be above 0: the best step is chosen on those classes")

    def config(self, arm: Arm, seed: int, teacher: Path | None = None) -> Config:
        """The config of an arm and seed. With a teacher's weights, its frozen peer comes last."""
        raw = copy.deepcopy(self._raw)
        raw["seed"] = seed
        peers = [dict[str, Any]() for _ in range(arm.num_peers)]
        if teacher is not None:
            peers.append({"name": "teacher", "frozen": True, "weights": str(teacher)})
        raw.setdefault("cohort", {})["peers"] = peers
        steps = raw.get("train", {}).get("steps", TrainConfig().steps)
        # Arms run side by side, so each has one thread, which also makes figures repeat to the bit.
        settings = {"cohort.threads_per_peer": 1, "cohort.base.schedule.steps": steps}
        settings |= self._parts["mutual" if arm.mutual else "independent"]
        if arm.ema:
            settings |= self._parts["ema"]
        for key, value in (settings | arm.settings).items():
            set_setting(raw, key, value, key)
        # The peers' own settings come last: set_setting refuses a base that all peers override.
        for diversity in arm.diversities:
            for peer, own in zip(peers, self._parts[diversity], strict=False):
                peer.update(own)
        return Config.parse(raw, source="the arm's settings")

    def digest(self, arm: Arm) -> str:
        """Digest of everything that an arm's figures depend on, except seed, images and code.

        Settings that have their default are left out, so that rows stay valid when the package
        gains or loses a setting that they do not use. A default that changes is therefore not noticed.
        """
        teacher = arm.teacher and self._settings(TEACHER)
        content = [self._settings(arm), arm.snapshots, arm.ema, teacher]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def _settings(self, arm: Arm) -> dict[str, Any]:
        config = self.config(arm, 0)
        return config.model_dump(mode="json", exclude_defaults=True, exclude=NO_EFFECT)


def _require_comparable(raw: dict[str, Any]) -> None:
    """Raises UserError for a setting of config.yaml that an ablation would ignore."""
    config = Config.parse(raw)
    if any(raw.get("cohort", {}).get("peers", [])):
        raise UserError("cohort.peers must be equal ({}): arms.yaml says how peers differ")
    fixed = {
        "train.init_from": (config.train.init_from, None),
        "train.monitor": (config.train.monitor, "ensemble"),
        "failure.on_nonfinite": (config.failure.on_nonfinite, "fail"),
    }
    for key, (value, only) in fixed.items():
        if value != only:
            raise UserError(f"{key} must be {json.dumps(only)} in an ablation, not {value}")


def _require_parts(parts: dict[str, Any]) -> None:
    """Raises UserError where arms.yaml lacks a part, or a part has another form or no effect."""
    known = {"independent", "mutual", "ema", *DIVERSITIES}
    if set(parts) != known:
        raise UserError(f"the file must have {', '.join(sorted(known))}, and nothing else")
    for name, part in parts.items():
        if name in DIVERSITIES:
            if not isinstance(part, list) or len(part) < MAX_PEERS:
                raise UserError(f"{name} must be a list of settings, one entry for each of {MAX_PEERS} peers")
            if not all(isinstance(own, dict) for own in part):
                raise UserError(f"{name} must have settings (key: value) for each peer")
            continue
        if not isinstance(part, dict):
            raise UserError(f"{name} must be settings (key: value)")
        if others := [str(key) for key in part if not str(key).startswith(ALLOWED)]:
            raise UserError(
                f"{name} may set {' and '.join(f'{each}*' for each in ALLOWED)}, not "
                f"{', '.join(others)}: all other settings are the same in all arms, in config.yaml"
            )
        mutual_only = [key for key in part if f"{key}.".startswith("loss.relational.")]
        if name != "mutual" and mutual_only:
            raise UserError(f"{name} may not set {', '.join(mutual_only)}: it applies to arms whose peers learn alone")
