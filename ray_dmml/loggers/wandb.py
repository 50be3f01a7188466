"""A run in Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_dmml.config.schema import Config
from ray_dmml.loggers.service import ServiceLogger


class WandbLogger(ServiceLogger):
    """Sends a run to Weights & Biases. It writes its own files to RUN/loggers/wandb.

    Steps are in the column ``step``, which is the x-axis of all charts: the service's own counter never goes back.

    Args:
        config, folder: those of the run.
        project: of the service.
        entity: user or team; None: the user's default.
        name: of the run; None: that of the folder.
        group: of runs that belong together.
        tags: of the run.
        mode: ``online``, ``offline`` or ``disabled``; None: WANDB_MODE, or online.
    """

    service = "wandb"

    def __init__(
        self,
        config: Config,
        folder: Path,
        project: str = "ray-dmml",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str | None = None,
    ) -> None:
        super().__init__(config, folder, name)
        self._options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "group": group,
            "tags": list(tags),
            "mode": mode,
        }
        self._run: Any = None

    def open(self, run_id: str | None) -> str:
        # It reports errors to its developers by default. A user may set this variable to true.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        files = self.folder / "loggers"
        files.mkdir(exist_ok=True)
        self._run = wandb.init(
            **self._options,
            id=run_id,
            name=self.name,
            resume="allow",
            dir=str(files),
            config=self.settings(),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
            allow_val_change=True,
        )
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def send(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def send_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(picture), "step": step})

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if self.is_finished else 1)
