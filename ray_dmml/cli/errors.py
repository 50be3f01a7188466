"""Exit codes, and how a command reports a mistake of its user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from ray_dmml.cli.output import print_line
from ray_dmml.errors import UserError

FINDINGS = 1
"""`data check` has found something to mend."""

USER_ERROR = 2
"""A setting, a file or the cluster is not as it has to be."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Prints a UserError as one message on standard error, without a traceback, and exits with code 2."""
    try:
        yield
    except UserError as error:
        print_line(Console(stderr=True), f"error: {error}")
        raise typer.Exit(USER_ERROR) from None
