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
    """The finished rows, none if there is no such file. Raises UserError where a line is not a row."""
    return _parse(file.read_bytes(), file)[0] if file.exists() else []


@contextmanager
def open_rows(file: Path) -> Iterator[tuple[list[Row], Callable[[Row], None]]]:
    """The finished rows, and a function that adds one to the list and to the file.

    Only one process can hold the file at a time.

    Raises:
        UserError: another process holds the file, or a line is not a row.
    """
    with file.open("a+b") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{file} is being written by another run of this command") from None
        opened.seek(0)
        rows, intact = _parse(opened.read(), file)
        opened.truncate(len(intact))
        if intact and not intact.endswith(b"\n"):
            opened.write(b"\n")

        def add(row: Row) -> None:
            opened.write(json.dumps(row).encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())
            rows.append(row)

        yield rows, add


def _parse(content: bytes, file: Path) -> tuple[list[Row], bytes]:
    """The rows, and the content without a last line that a killed process left incomplete."""
    rows, intact = [], b""
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError:
            if not line.endswith(b"\n"):
                break
            raise UserError(f"{file}, line {number} is not a row: {line[:60]!r}") from None
        intact += line
    return rows, intact
