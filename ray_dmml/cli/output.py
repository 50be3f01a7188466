"""What a command prints: lines, JSON, Python's logging, and the mistakes of its user."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import typer

from ray_dmml.errors import UserError
from ray_dmml.loggers.output import Console
from ray_dmml.loggers.sentences import as_lines, show_sentences


def print_line(console: Console, line: str) -> None:
    """Prints a line unchanged, however long."""
    with suppress(OSError):  # a full disk under a log fails no command
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_json(results: Any) -> None:
    """Prints JSON to standard output."""
    print(json.dumps(results, indent=1))


_NOT_OURS = {
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE),
}
"""Errors of a path that a user can mend. Others, such as a missing file, may be a fault of the package."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Prints a UserError, or that a path cannot be used, as one message on standard error, without a traceback, and
    exits with code 2."""
    try:
        yield
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if error.filename is None or error.errno not in _NOT_OURS:
                raise
            message = f"{error.filename}: {error.strerror}"
        else:
            message = str(error)
        print_line(Console(stderr=True), f"error: {message}")
        raise typer.Exit(2) from None


def show_log(console: Console) -> AbstractContextManager[None]:
    """Prints what the package logs to the console, and what takes the time right now, once each. Inside the block of
    show_run, its display does."""
    show = partial(print_line, console)
    return show_sentences(show, as_lines(show))


def elapsed(since: float) -> str:
    """Minutes and seconds since a ``time.monotonic()``."""
    minutes, seconds = divmod(round(time.monotonic() - since), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
