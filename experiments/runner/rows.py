"""The files of rows. A finished run becomes a row and is never run again."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_dmml.errors import UserError

Row = dict[str, Any]
Add = Callable[[Row], None]

_ADVICE = "undo the change, remove those rows, or use a copy of the folder without them"


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
def open_rows(file: Path) -> Iterator[tuple[list[Row], Add]]:
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


def require_settings(rows: Sequence[Row], digests: Collection[str], file: Path) -> None:
    """Raises UserError if a row is of settings that are not among those of today."""
    if changed := sorted({row["arm"] for row in rows if row["settings"] not in digests}):
        raise UserError(f"{file} has rows of other settings than those of now ({'; '.join(changed)}): {_ADVICE}")


def require_images(rows: Sequence[Row], digest: str, file: Path) -> None:
    """Raises UserError if a row is of other images than those with this digest."""
    if any(row["images"] != digest for row in rows):
        raise UserError(f"{file} has rows of other images, classes or splits than data.* gives now: {_ADVICE}")
