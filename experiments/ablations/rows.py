"""The files of finished rows."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_dmml.errors import UserError

Row = dict[str, Any]


def read_rows(file: Path) -> list[Row]:
    """The finished rows, without a last line that a killed process left incomplete; none if there is no such file.

    Raises:
        UserError: a line is not a row.
    """
    rows = []
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{file}, line {number} is not a row: {line[:60]!r}") from None
    return rows


@contextmanager
def open_rows(file: Path) -> Iterator[tuple[list[Row], Callable[[Row], None]]]:
    """The finished rows, and a function that adds one to the file. Only one process can hold the file at a time.

    Raises:
        UserError: another process holds the file, or a line is not a row.
    """
    with file.open("a+b") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{file} is being written by another run of this command") from None
        rows = read_rows(file)
        opened.truncate(file.read_bytes().rfind(b"\n") + 1)

        def add(row: Row) -> None:
            opened.write(json.dumps(row).encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())

        yield rows, add
