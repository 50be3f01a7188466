"""The experiment of one data set, as two files in its folder describe it.

`config.yaml` has the settings of equal peers, and `arms.yaml` says::

    mutual: {...}        # settings (as in --set) of the loss of arms whose peers learn from each other
    model: [{...}, ...]  # what each diversity gives to peers 0 to 3
    view: [...]
    temporal: [...]
    rate: 1.0            # factor on all learning rates of config.yaml; may be left out
    weights: {...}       # what the stage `weights` chose, if `mutual` is a form of the stage after it
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from runner.digests import NO_EFFECT, digest

from ray_dmml.config.loading import read_settings, read_yaml, set_setting
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.errors import UserError

from .arms import ALONE, Arm, final_arms
from .candidates import candidates

DIVERSITIES = ("model", "view", "temporal")
MAX_PEERS = 4


class Plan:
    """The arms of one data set and their configs.

    Args:
        folder: with `config.yaml` and `arms.yaml`.
        overrides: `KEY=VALUE` for all arms, such as the folder of the images.

    Raises:
        UserError: a file or a setting is invalid.
    """

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self._raw = read_settings(folder / "config.yaml", overrides)
        config = _require_comparable(self._raw)
        self._parts = read_yaml(folder / "arms.yaml", "arms file")
        try:
            _require_parts(self._parts)
            self.arms = final_arms(self._parts["mutual"])
            self.stages = candidates(self._parts.get("weights", self._parts["mutual"]), config.train.steps)
            for arms in (self.arms, *self.stages.values()):
                for arm in arms.values():
                    self.config(arm, 0)
        except UserError as error:
            raise UserError(f"{folder / 'arms.yaml'}: {error}") from None

    def config(self, arm: Arm, seed: int) -> Config:
        """The config of an arm and seed. Each seed holds out a fold of the training classes of its own."""
        raw = copy.deepcopy(self._raw)
        raw["seed"] = seed
        raw["data"] = {**raw.get("data", {}), "validation_fold": seed}
        peers = [dict[str, Any]() for _ in range(arm.num_peers)]
        raw.setdefault("cohort", {})["peers"] = peers
        # Arms run side by side, so each has one thread, which also makes figures repeat to the bit.
        for key, value in {"cohort.threads_per_peer": 1, **ALONE, **arm.mutual}.items():
            set_setting(raw, key, value, key)
        for diversity in DIVERSITIES if arm.diverse else ():
            for peer, own in zip(peers, self._parts[diversity], strict=False):
                peer.update(own)
        config = Config.parse(raw, source="the arm's settings")
        rate = self._parts.get("rate", 1) if arm.rate is None else arm.rate
        if rate == 1:
            return config
        scaled = tuple(_scaled(peer, rate) for peer in config.cohort.peers)
        return config.model_copy(update={"cohort": config.cohort.model_copy(update={"peers": scaled})})

    def digest(self, arm: Arm) -> str:
        """Digest of all that an arm's figures depend on, except seed, images and code.

        Settings that nobody states are left out, so that rows stay valid when the package gains a setting. A default
        that changes is therefore not noticed.
        """
        return digest(self.config(arm, 0).model_dump(mode="json", exclude_unset=True, exclude=NO_EFFECT))


def _scaled(peer: PeerConfig, factor: float) -> PeerConfig:
    """The peer with all its learning rates times ``factor``."""
    rates = {key: getattr(peer.optimizer, key) for key in ("lr", "head_lr", "loss_lr")}
    changed = {key: rate * factor for key, rate in rates.items() if rate is not None}
    return peer.model_copy(update={"optimizer": peer.optimizer.model_copy(update=changed)})


def _require_comparable(raw: dict[str, Any]) -> Config:
    """The config of equal peers. Raises UserError for a setting that an ablation would ignore."""
    config = Config.parse(raw)
    if any(raw.get("cohort", {}).get("peers", [])):
        raise UserError("cohort.peers must be equal ({}): arms.yaml says how peers differ")
    if config.train.init_from or config.train.early_stopping:
        raise UserError("train.init_from and train.early_stopping have no effect in an ablation: leave them out")
    if not config.data.validation_fraction:
        raise UserError("data.validation_fraction must be above 0: candidates are chosen on those classes")
    return config


def _require_parts(parts: dict[str, Any]) -> None:
    """Raises UserError where arms.yaml lacks a part, or a part has another form."""
    required = {"mutual", *DIVERSITIES}
    if set(parts) - {"rate", "weights"} != required:
        raise UserError(f"the file must have {', '.join(sorted(required))}, perhaps rate and weights, and nothing else")
    for name in DIVERSITIES:
        part = parts[name]
        if not isinstance(part, list) or len(part) < MAX_PEERS or not all(isinstance(own, dict) for own in part):
            raise UserError(f"{name} must be a list of settings (key: value), one entry for each of {MAX_PEERS} peers")
    rate = parts.get("rate", 1)
    for name in ("mutual", "weights"):
        part = parts.get(name, parts["mutual"])
        if not isinstance(part, dict) or not part or not all(str(key).startswith("loss.") for key in part):
            raise UserError(f"{name} must be settings of the loss (loss.KEY: value): all others are in config.yaml")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
        raise UserError(f"rate must be a number above 0, not {rate!r}")
