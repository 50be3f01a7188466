"""Metrics of a run on Ray's Prometheus endpoint, which every node has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.client import ray as ray_client
from ray.util.metrics import Counter, Gauge, Metric

from ray_dmml.loggers.logger import Logger, learned_terms

GAUGES = {
    "dmml_step": "Last step that every peer has finished.",
    "dmml_steps": "Number of steps of the run (train.steps).",
    "dmml_step_seconds": "Seconds of a step, as a mean over the latest steps.",
    "dmml_images_per_second": "Training images per second, which every peer is trained on.",
    "dmml_loss": "Loss of the latest step that the peer has learned from.",
    "dmml_validation_recall_at_1": "Recall@1 of the latest evaluation on validation images.",
}
COUNTERS = {
    "dmml_exchange_wait_seconds": "Seconds that the peer has waited for embeddings of other peers.",
    "dmml_restarts": "Number of times that the run has recovered from the loss of peers.",
}
"""Ray exports each name with the prefix ``ray_``, a counter with the suffix ``_total``. Labels are ``run``, and
``peer`` where a metric is of a peer."""

OF_A_PEER = {"dmml_loss", "dmml_exchange_wait_seconds", "dmml_validation_recall_at_1"}


class RayMetricsLogger(Logger):
    """Gives the progress of a run to Ray, in the process that has started it. It does nothing in a Ray client, which
    has no endpoint.

    Args:
        run: label of the run.
        num_steps: of the run.
    """

    def __init__(self, run: str, num_steps: int) -> None:
        self._run, self._num_steps = run, num_steps
        self._metrics: dict[str, Metric] = {}
        self._losses: dict[str, float] = {}
        self._waited: dict[str, float] = {}

    def rewind(self, step: int) -> None:
        if not self._metrics and not ray_client.is_connected():  # from now on there is a session
            for kind, names in ((Gauge, GAUGES), (Counter, COUNTERS)):
                for name, meaning in names.items():
                    labels = ("run", "peer") if name in OF_A_PEER else ("run",)
                    self._metrics[name] = kind(name, meaning, labels)
        self._set("dmml_steps", self._num_steps)
        self._set("dmml_step", step)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if not metrics:
            self._set("dmml_step", step)
        if "peers" in metrics:
            self._losses |= {name: terms["loss"] for name, terms in learned_terms(metrics["peers"]).items()}
        if "images_per_second" in metrics:
            self._set("dmml_images_per_second", metrics["images_per_second"])
            self._set("dmml_step_seconds", metrics["step_s"])
            for name, loss in self._losses.items():
                self._set("dmml_loss", loss, name)
            for name, seconds in metrics["waited_s"].items():
                self._increase("dmml_exchange_wait_seconds", seconds - self._waited.get(name, 0.0), name)
            self._waited = dict(metrics["waited_s"])
        if "validation" in metrics:
            figures = metrics["validation"]
            for name, row in {**figures["peers"], "ensemble": figures["ensemble"]}.items():
                self._set("dmml_validation_recall_at_1", row["recall@1"], name)
        if "lost" in metrics:
            self._increase("dmml_restarts", 1)

    def _set(self, name: str, value: float, peer: str | None = None) -> None:
        if metric := self._metrics.get(name):
            metric.set(value, self._labels(peer))

    def _increase(self, name: str, value: float, peer: str | None = None) -> None:
        if value > 0 and (metric := self._metrics.get(name)):
            metric.inc(value, self._labels(peer))

    def _labels(self, peer: str | None) -> dict[str, str]:
        return {"run": self._run} | ({"peer": peer} if peer is not None else {})
