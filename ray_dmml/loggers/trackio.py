"""A run in trackio."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from ray_dmml.config.schema import Config
from ray_dmml.loggers.service import ServiceLogger


class TrackioLogger(ServiceLogger):
    """Sends a run to trackio: to a folder (TRACKIO_DIR, or trackio's default), or to a Space of Hugging Face.

    Args:
        config, folder: those of the run.
        project: of trackio.
        name: of the run; None: that of the folder.
        space_id: ``OWNER/NAME`` of a Space; None: the folder.
        private: whether a new Space is private. The pictures of a run are images of the data set.
    """

    service = "trackio"

    def __init__(
        self,
        config: Config,
        folder: Path,
        project: str = "ray-dmml",
        name: str | None = None,
        space_id: str | None = None,
        private: bool = True,
    ) -> None:
        super().__init__(config, folder, name)
        self._project, self._space, self._private = project, space_id, private
        self._run: Any = None

    def open(self, run_id: str | None) -> str:
        import trackio

        # trackio knows a run by its name, and gives a new one another if the name is taken.
        with redirect_stdout(sys.stderr):  # of a command, standard output is the results
            self._run = trackio.init(
                self._project,
                name=run_id or self.name,
                space_id=self._space,
                private=self._private,
                config=self.settings(),
                resume="allow" if run_id else "never",
                embed=False,
            )
        return str(self._run.name)

    def send(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def send_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        import trackio

        self._run.log({name: trackio.Image(picture)}, step=step)

    def finish(self) -> None:
        if self._run is not None:
            with redirect_stdout(sys.stderr):
                self._run.finish()
