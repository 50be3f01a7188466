"""The config of every run, from the published setting of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablations.arms import ALONE
from runner.digests import digest

from ray_dmml.config.differences import CHANGES_NO_TRAINING, settings_without
from ray_dmml.config.loading import BUILT_IN_WEIGHTS, override_settings, read_settings
from ray_dmml.config.schema import Config, PeerConfig
from ray_dmml.errors import UserError
from ray_dmml.training.distill import RELATIONAL, distillation_config

from .arms import ARMS, DIVERSITIES, FROZEN, SINGLE

CONFIGS = Path(__file__).parent.parent / "configs"

ALL_CLASSES: dict[str, Any] = {
    "data.validation_fraction": 0,
    "train.evaluate_every": 0,
    "train.tensorboard": False,
    "train.report": False,
    "train.pictures": 0,
    "checkpoint.num_to_keep": 1,
    "checkpoint.final": "weights",
    "evaluation.split": "test",
    "evaluation.weights": "last",
}
"""As published figures need it: trained on all training classes, and evaluated once, at the last step."""


@dataclass(frozen=True)
class Plan:
    """The runs of one data set. Each field but ``work`` changes their figures."""

    base: Config
    """Of DM2. The other arms have less."""

    teacher: str
    """The net that teaches frozen, a model of timm."""

    teacher_weights: str
    """Its weights, as `cohort.peers.*.weights`."""

    work: Path
    """Folder of the runs' folders."""

    @classmethod
    def of(
        cls,
        data: str,
        root: Path,
        overrides: list[str],
        teacher: str,
        teacher_weights: str,
        work: Path,
        download: bool = True,
    ) -> Plan:
        """The runs of a data set, whose setting ``overrides`` change. ``download``: a missing one may be downloaded.

        Raises:
            UserError: a setting is not allowed, or means that the arms are not what their names say.
        """
        raw = override_settings(read_settings(CONFIGS / f"{data}.yaml"), {**ALL_CLASSES, "data.root": root})
        raw = override_settings(raw, overrides)
        base = Config.parse(raw if download else override_settings(raw, {"data.download": False}))
        if teacher_weights not in BUILT_IN_WEIGHTS:
            teacher_weights = str(Path(teacher_weights).absolute())
        if base.evaluation.split != "test":
            raise UserError("evaluation.split must be test: published figures are of the test classes")
        in_diversities = {key for keys in DIVERSITIES.values() for key in keys}
        if len({peer.model_dump_json(exclude={"name", "seed", *in_diversities}) for peer in base.cohort.peers}) > 1:
            raise UserError(
                f"cohort.peers may differ in {', '.join(sorted(in_diversities))} only: no arm has other differences"
            )
        if len(base.cohort.peers) < 2 or base.cohort.frozen_peers:
            raise UserError("cohort.peers must be two or more that learn")
        return cls(base, teacher, teacher_weights, work)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the figures that a row keeps."""
        return (*(f"recall@{k}" for k in self.base.evaluation.recall_at), "map@r")

    def digest(self, name: str) -> str:
        """Of all that the figures of an arm depend on, except seed, images and code."""
        settings = self.base.model_dump(mode="json", exclude_defaults=True)
        content: list[Any] = [name, settings_without(settings, (*CHANGES_NO_TRAINING, "data.download"))]
        if ARMS[name].teacher:
            content.append(RELATIONAL)
        if ARMS[name].teacher == FROZEN:
            content += [self.teacher, self.teacher_weights]
        return digest(content)

    def folder(self, name: str, seed: int) -> Path:
        return self.work / f"{name.replace(', ', '-').replace(' ', '-').lower()}-{self.digest(name)}-seed{seed}"

    def config(self, name: str, seed: int) -> Config:
        """Of a run. That of its teacher must have finished."""
        arm = ARMS[name]
        untrained = {"evaluation.untrained": name == SINGLE}
        if arm.teacher is None:
            peers = tuple(self._peer(place, arm.diversities) for place in range(self.num_peers(name)))
            cohort = self.base.cohort.model_copy(update={"peers": peers})
            mutual = {} if arm.mutual else {**ALONE, "loss.mutual": []}
            return self.base.model_copy(update={"cohort": cohort}).with_overrides({"seed": seed, **untrained, **mutual})
        student = self.base.cohort.peers[0].backbone
        if arm.teacher != FROZEN:
            return distillation_config(self.folder(arm.teacher, seed), student, overrides=untrained)
        return distillation_config(
            None,
            student,
            teacher=self.teacher,
            teacher_weights=self.teacher_weights,
            config=self.config(SINGLE, seed),
            overrides={**untrained, "cohort.peers.1.input_size": self.base.cohort.peers[0].input_size},
        )

    def num_peers(self, name: str) -> int:
        """How many peers of an arm learn."""
        return len(self.base.cohort.peers) if ARMS[name].is_cohort else 1

    def num_teachers(self, name: str) -> int:
        """How many frozen peers an arm has."""
        teacher = ARMS[name].teacher
        return self.num_peers(teacher) if teacher in ARMS else int(teacher == FROZEN)

    def _peer(self, place: int, diversities: tuple[str, ...]) -> PeerConfig:
        first, own = self.base.cohort.peers[0], self.base.cohort.peers[place]
        keys = ("name", "seed", *(key for name in diversities for key in DIVERSITIES[name]))
        return first.model_copy(update={key: getattr(own, key) for key in keys})


def placed(config: Config, cores: int, *, on_gpu: bool) -> Config:
    """The config of a run that has so many of the machine's cores. On a CPU it has one thread, which also makes figures
    repeat to the bit."""
    share = max(1, cores // len(config.cohort.learners)) if on_gpu else 1
    peers = tuple(
        peer.model_copy(update={"num_workers": 0 if peer.frozen else share - 1}) for peer in config.cohort.peers
    )
    return config.model_copy(
        update={"cohort": config.cohort.model_copy(update={"peers": peers, "threads_per_peer": share})}
    )
