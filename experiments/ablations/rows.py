"""The file of finished rows, and the images that they were measured on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_dmml.data.dataset import Splits
from ray_dmml.errors import UserError

Row = dict[str, Any]


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
        repaired = False

        def add(row: Row) -> None:
            nonlocal repaired
            if not repaired:
                opened.truncate(len(intact))
                opened.write(b"" if intact.endswith(b"\n") or not intact else b"\n")
                repaired = True
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


def images_digest(splits: Splits) -> str:
    """Digest of the images' names, classes and splits, and of queries and gallery."""
    return hashlib.sha256(json.dumps(splits.digests()).encode()).hexdigest()[:12]


def require_same_images(rows: Sequence[Row], splits: Splits, file: Path) -> None:
    """Raises UserError where rows were measured on other images or another split of them."""
    if any(row["images"] != images_digest(splits) for row in rows):
        raise UserError(
            f"{file} has rows of other images, classes or splits than data.* gives now: undo the change, or "
            "remove those rows to run them again"
        )
