"""What a command prints: lines, JSON, Python's logging, and the mistakes of its user."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from ray_dmml.errors import UserError


def print_line(console: Console, line: str) -> None:
    """Prints a line unchanged, however long."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_json(results: Any) -> None:
    """Prints JSON to standard output."""
    print(json.dumps(results, indent=1))


@contextmanager
def user_errors() -> Iterator[None]:
    """Prints a UserError as one message on standard error, without a traceback, and exits with code 2."""
    try:
        yield
    except UserError as error:
        print_line(Console(stderr=True), f"error: {error}")
        raise typer.Exit(2) from None


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        # Inside the block of show_run, its display shows these lines.
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
