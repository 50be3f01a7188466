"""The progress of a run that Python code starts, in a script or a notebook: lines, as plain text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ray_dmml.config.schema import Config
from ray_dmml.loggers.console import LinesLogger
from ray_dmml.loggers.logger import Logger
from ray_dmml.loggers.output import Console
from ray_dmml.loggers.sentences import show_sentences


@contextmanager
def show_progress(config: Config) -> Iterator[Logger]:
    """Prints losses, evaluations and checkpoints, and the sentences that the package logs (INFO and above).

    Lines go to standard error, in a notebook to the cell. If the program has set up Python's logging, the sentences go
    only there.
    """
    in_notebook = Console().is_jupyter
    display = LinesLogger(Console(stderr=not in_notebook, force_jupyter=False), config)
    with nullcontext() if logging.getLogger("ray_dmml").hasHandlers() else show_sentences(display.print):
        yield display
