"""Lines on the console: plain sentences, Python's logging, and the time a command took."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console


def print_line(console: Console, line: str) -> None:
    """Prints a line as it is, however long."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_json(results: Any) -> None:
    """Prints JSON to standard output."""
    print(json.dumps(results, indent=1))


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        # A logger of a run inside the block shows these lines itself.
        if logging.getLogger("ray_dmml").handlers[-1] is self:
            kind = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            print_line(self._console, f"{kind}{record.getMessage()}")


@contextmanager
def show_log(console: Console) -> Iterator[None]:
    """Prints what the package logs (INFO and above) to the console."""
    package, handler = logging.getLogger("ray_dmml"), _ConsoleHandler(console)
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def elapsed(since: float) -> str:
    """Minutes and seconds since a ``time.monotonic()``."""
    minutes, seconds = divmod(round(time.monotonic() - since), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
