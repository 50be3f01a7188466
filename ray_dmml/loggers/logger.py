"""Where the numbers of a run go: one interface, one class a sink, and a container that fans out.

Sentences for people go through Python's :mod:`logging` instead: INFO is a sentence worth knowing, WARNING says
that something is not as asked and what happens instead, and DEBUG says what takes the time right now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any


class Logger:
    """A sink of metrics. Subclasses override what they need."""

    takes_pictures: bool = False
    """Whether the run makes pictures and a sample of the last embeddings for it, see :meth:`log`."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Takes metrics of a step (1 for the first).

        Args:
            metrics: one of these:

                - ``{}``: every peer has finished ``step`` steps; nothing else is known yet.
                - ``{"peers": {name: {"loss": ..., "metric": ...}}}``: the loss terms of one step.
                - ``{"images_per_second": ..., "step_s": ..., "waited_s": {name: ...}}``: the speed of the latest steps,
                  the seconds of one, and those that each peer has waited for others since this process began.
                - ``{"validation": figures}`` or ``{"untrained": figures}``: an evaluation. ``figures`` are
                  ``{"peers": {name: {"recall@1": ...}}, "ensemble": {"recall@1": ...}}``, as fractions.
                - ``{"checkpoint": "last", "is_last": False}``: a checkpoint was written. ``best`` instead of ``last``:
                  its weights are the best so far. ``is_last``: no step follows.
                - ``{"lost": sentence}``: peers were lost. The run recovers, and :meth:`rewind` says where it goes on.
                - ``{"final": results}``: the end of the run, with what results.json holds. ``peers`` and ``ensemble``
                  are empty if there is nothing to evaluate.
                - ``{"pictures": {"views": array}}``: uint8 (H, W, 3), for loggers that take pictures. ``views`` comes
                  once, at step 0; ``worst_queries`` after an evaluation, perhaps some steps later.
                - ``{"embeddings": sample}``: a :class:`~ray_dmml.loggers.embeddings.EmbeddingSample` of the final
                  evaluation, for loggers that take pictures.
        """

    def rewind(self, step: int) -> None:
        """The run goes on from the end of this step: later metrics are void and come again."""

    def flush(self) -> None:
        """Writes what is held back. Sinks that cannot write keep it and warn."""

    def close(self) -> None:
        """Ends the sink. A second call does nothing."""


class Loggers(Logger):
    """Hands everything on to several loggers, in their order."""

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self._loggers = tuple(loggers)
        self.takes_pictures = any(logger.takes_pictures for logger in self._loggers)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for logger in self._loggers:
            logger.log(metrics, step)

    def rewind(self, step: int) -> None:
        for logger in self._loggers:
            logger.rewind(step)

    def flush(self) -> None:
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        with ExitStack() as stack:  # one that raises keeps no other open
            for logger in reversed(self._loggers):
                stack.callback(logger.close)


def learned_terms(row: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The peers of a step that learned from it. A peer in ``skip`` mode has no terms at most steps."""
    return {name: terms for name, terms in row.items() if "loss" in terms}
