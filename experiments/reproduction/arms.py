"""What is trained to repeat the published figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DIVERSITIES: Mapping[str, tuple[str, ...]] = {
    "model": ("init_seed",),
    "view": ("view",),
    "temporal": ("update_interval", "update_mode"),
}
"""The settings of a peer that each diversity is made of. From pretrained weights, `init_seed` changes the head only."""

FROZEN = "frozen"
"""Stands for a teacher that is no run."""


@dataclass(frozen=True)
class Arm:
    """One net, a cohort, or a student."""

    is_cohort: bool = False
    """As many peers as the config has, not one."""

    mutual: bool = False
    """The peers learn from each other, not from labels alone."""

    diversities: tuple[str, ...] = ()
    """In what the peers differ, as the config says. What is random in their views always differs."""

    teacher: str | None = None
    """The arm whose finished peers teach a student, or FROZEN. None: nobody is a student."""


SINGLE, INDEPENDENT, DM2, STUDENT_OF_FROZEN = "single net", "independent peers", "DM2", "student of a frozen net"

ARMS: Mapping[str, Arm] = {
    SINGLE: Arm(),
    INDEPENDENT: Arm(is_cohort=True),
    "mutual, initial weights differ": Arm(True, True, ("model",)),
    "mutual, views differ": Arm(True, True, ("view",)),
    "mutual, update intervals differ": Arm(True, True, ("temporal",)),
    DM2: Arm(True, True, tuple(DIVERSITIES)),
    "self-distillation": Arm(teacher=SINGLE),
    "student of DM2": Arm(teacher=DM2),
    STUDENT_OF_FROZEN: Arm(teacher=FROZEN),
}
"""By name, each after the one that it needs."""


def with_teachers(names: list[str]) -> list[str]:
    """The arms and those that teach them, in the order of ARMS."""
    wanted = {*names, *(ARMS[name].teacher for name in names)}
    return [name for name in ARMS if name in wanted]
