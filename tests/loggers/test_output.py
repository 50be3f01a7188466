"""Output whose reader is gone."""

from __future__ import annotations

import os

from ray_dmml import Config
from ray_dmml.cli.output import print_line
from ray_dmml.loggers.console import LinesLogger
from ray_dmml.loggers.output import Console


def test_a_reader_of_a_pipe_that_is_gone_ends_nothing() -> None:
    """Neither a run nor a command; the pipe can be closed without an error."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as file:
        console = Console(file=file)
        os.close(reading)
        LinesLogger(console, Config()).log({"checkpoint": "last"}, 1)
        print_line(console, "the end")
        assert console.quiet
