"""A run in MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ray_dmml.config.loading import dotted
from ray_dmml.config.schema import Config
from ray_dmml.loggers.service import ServiceLogger

_MOST_PARAMS, _LONGEST_PARAM = 100, 500  # of a call, and in characters


class MlflowLogger(ServiceLogger):
    """Sends a run to MLflow. The parameters of a run are the settings with which it began.

    Args:
        config, folder: those of the run.
        experiment: of MLflow.
        tracking_uri: a server, or a file such as ``sqlite:///mlflow.db``; None: MLFLOW_TRACKING_URI, or the default.
        name: of the run; None: that of the folder.
        tags: of the run.
    """

    service = "mlflow"

    def __init__(
        self,
        config: Config,
        folder: Path,
        experiment: str = "ray-dmml",
        tracking_uri: str | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(config, folder, name)
        self._experiment, self._uri, self._tags = experiment, tracking_uri, dict(tags or {})
        self._client: Any = None
        self._id = ""

    def open(self, run_id: str | None) -> str:
        # MLflow reports usage to its developers by default. A user may set this variable to false.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(self._uri)
        if run_id is not None:
            client.update_run(run_id, status="RUNNING")
        else:
            experiment = client.get_experiment_by_name(self._experiment)
            place = experiment.experiment_id if experiment else client.create_experiment(self._experiment)
            run_id = str(client.create_run(place, run_name=self.name, tags=self._tags).info.run_id)
            settings = dotted(self.settings()).items()
            params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in settings]
            for start in range(0, len(params), _MOST_PARAMS):
                client.log_batch(run_id, params=params[start : start + _MOST_PARAMS])
        self._client, self._id = client, run_id
        return run_id

    def send(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in values.items()])

    def send_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        self._client.log_image(self._id, picture, key=name, step=step)

    def finish(self) -> None:
        if self._client is not None:
            self._client.set_terminated(self._id, "FINISHED" if self.is_finished else "KILLED")
