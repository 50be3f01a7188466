"""Loggers of one's own, which a config names."""

from __future__ import annotations

import inspect
from pathlib import Path

from ray_dmml.config.parts import call_part, find_part, required
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.loggers.logger import Logger


def build_loggers(config: Config, folder: Path) -> list[Logger]:
    """The loggers of ``train.loggers``.

    Args:
        folder: that of the run. It may not exist yet.

    Raises:
        UserError: one cannot be found or built, or is no :class:`~ray_dmml.loggers.logger.Logger`.
    """
    loggers: list[Logger] = []
    for n, entry in enumerate(config.train.loggers):
        setting = f"train.loggers.{n}.name"
        part = find_part(setting, entry.name)
        if not (inspect.isclass(part) and issubclass(part, Logger)):
            raise UserError(f"{setting}: {entry.name} must be a subclass of ray_dmml.Logger")
        args = {**required(part, {"config": config, "folder": folder}), **entry.args}
        loggers.append(call_part(setting, entry.name, part, args))
    return loggers
