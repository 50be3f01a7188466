"""The loggers that a config names: services, and classes of one's own."""

from __future__ import annotations

import inspect
from pathlib import Path

from ray_dmml.config.parts import SERVICES, call_part, check_arguments, find_part, required
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.loggers.logger import Logger
from ray_dmml.loggers.service import require_service


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


def check_services(config: Config) -> None:
    """Checks the services among ``train.loggers``, without calling one.

    Raises:
        UserError: the package of one is not installed, it does not take these args, or it is named twice.
    """
    names: list[str] = []
    for n, entry in enumerate(config.train.loggers):
        setting = f"train.loggers.{n}.name"
        if entry.name in SERVICES:
            if entry.name in names:
                raise UserError(f"{setting}: {entry.name} is named twice, and a run has one run in each service")
            names.append(entry.name)
            part = find_part(setting, entry.name)
            check_arguments(setting, entry.name, part, {"config": config, "folder": Path(), **entry.args})
            require_service(entry.name, setting)
