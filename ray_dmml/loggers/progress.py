"""The progress of a run that Python code starts: lines of a script, a live table in a notebook."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ray_dmml.config.schema import Config
from ray_dmml.loggers.console import LinesLogger, LiveLogger
from ray_dmml.loggers.notebook import CellDisplay
from ray_dmml.loggers.output import Console
from ray_dmml.loggers.sentences import show_sentences


@contextmanager
def show_progress(config: Config) -> Iterator[LinesLogger]:
    """Shows losses, evaluations and checkpoints, and the sentences that the package logs (INFO and above).

    A script prints lines to standard error. In a notebook, a table and a bar in the cell follow the run, and sentences
    and evaluations are lines below them. If the program has set up Python's logging, the sentences go only there.
    """
    display: LinesLogger
    if Console().is_jupyter:
        display = LiveLogger(Console(force_jupyter=False, force_terminal=False), config, CellDisplay())
    else:
        display = LinesLogger(Console(stderr=True), config)
    has_logging = logging.getLogger("ray_dmml").hasHandlers()
    with nullcontext() if has_logging else show_sentences(display.print, display.show_activity):
        yield display
