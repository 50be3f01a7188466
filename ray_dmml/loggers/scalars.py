"""The numbers of a run by name, for what draws curves: TensorBoard and the services."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_dmml.loggers.logger import learned_terms


class Scalars:
    """Turns what a logger gets into names and numbers, such as ``loss/peer0`` and ``validation_recall_at_1/ensemble``.

    Losses come with the speed, at every ``train.log_every`` steps.
    """

    def __init__(self) -> None:
        self._latest: dict[str, Mapping[str, float]] = {}

    def of(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The numbers to draw of what :meth:`~ray_dmml.loggers.logger.Logger.log` gets; often none."""
        if "peers" in metrics:
            rows = metrics["peers"]  # a dropped peer has none
            latest = {name: terms for name, terms in self._latest.items() if name in rows}
            self._latest = latest | learned_terms(rows)
        if "images_per_second" in metrics:
            terms = {f"{term}/{peer}": value for peer, row in self._latest.items() for term, value in row.items()}
            return {**terms, "images_per_second": metrics["images_per_second"]}
        for key in ("validation", "final"):
            if key in metrics:
                return _figures(key, metrics[key])
        return {}

    def rewind(self) -> None:
        """The steps that come next come again."""
        self._latest = {}


def _figures(prefix: str, figures: Mapping[str, Any]) -> dict[str, float]:
    rows = {**figures["peers"], "ensemble": figures["ensemble"]}
    return {
        f"{prefix}_{metric.replace('@', '_at_')}/{name}": value
        for name, row in rows.items()
        for metric, value in row.items()
    }
