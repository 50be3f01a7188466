"""metrics.jsonl: one line a step and one line an evaluation, the same bytes whatever interrupts the run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_dmml.errors import CheckpointError
from ray_dmml.loggers.logger import Logger

logger = logging.getLogger(__name__)

REPRODUCIBLE = ("peers", "validation")
"""Metrics that are functions of config and step. Others, such as the speed, are not in the file."""


class JsonlLogger(Logger):
    """Appends rows such as ``{"step": 3, "peers": {...}}`` to a file.

    What a full disk refuses is kept in memory until it can be written.

    Args:
        path: RUN/metrics.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: list[dict[str, Any]] = []
        self._truncate_at: int | None = None
        self._has_warned = False

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        row = {key: metrics[key] for key in REPRODUCIBLE if key in metrics}
        if row:
            self._unwritten.append({"step": step, **row})

    def rewind(self, step: int) -> None:
        """Drops the rows after ``step``, and a last line that was cut short."""
        self._unwritten = [row for row in self._unwritten if row["step"] <= step]
        self._truncate_at = step
        self.flush()

    def flush(self) -> None:
        try:
            self.write()
            self._has_warned = False
        except CheckpointError as error:
            if not self._has_warned:
                logger.warning("%s; the rows are kept until they can be written", error)
            self._has_warned = True

    def write(self, *, sync: bool = False) -> None:
        """Writes all rows.

        Args:
            sync: return when the rows are on the disk.

        Raises:
            CheckpointError: the file cannot be written; the rows are kept.
        """
        try:
            if self._truncate_at is not None:
                self._truncate(self._truncate_at)
                self._truncate_at = None
            if self._unwritten:
                self._append("".join(json.dumps(row) + "\n" for row in self._unwritten).encode())
                self._unwritten = []
            if sync and self._path.exists():
                with self._path.open("rb") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be written: {error}") from None

    def _append(self, rest: bytes) -> None:
        """Appends all of it or nothing."""
        # Unbuffered: a buffer would write what it holds once more when the file is closed.
        with self._path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(before)
                raise

    def _truncate(self, step: int) -> None:
        """Cuts the file in its place, which needs no room on a full disk. Rows are in the order of steps."""
        if not self._path.exists():
            return
        end = position = 0
        with self._path.open("rb+") as file:
            for line in file:
                position += len(line)
                try:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                        break
                    end = position
                except (ValueError, KeyError, TypeError):
                    continue
            file.truncate(end)
