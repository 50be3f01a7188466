"""What a command prints: lines, JSON, Python's logging, and the mistakes of its user."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import typer
from rich.console import Console

from ray_dmml.errors import UserError
from ray_dmml.loggers.sentences import show_sentences


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


def show_log(console: Console) -> AbstractContextManager[None]:
    """Prints what the package logs (INFO and above) to the console. Inside the block of show_run, its display does."""
    return show_sentences(partial(print_line, console))


def elapsed(since: float) -> str:
    """Minutes and seconds since a ``time.monotonic()``."""
    minutes, seconds = divmod(round(time.monotonic() - since), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
