"""TensorBoard events of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import Summary, image, scalar

from ray_dmml.loggers.embeddings import write_projector
from ray_dmml.loggers.logger import Logger
from ray_dmml.loggers.scalars import Scalars

logger = logging.getLogger(__name__)


class TensorBoardLogger(Logger):
    """Writes scalars over the steps, pictures, and a sample of the last embeddings for the projector; each start and
    each recovery of a run begins a new file.

    The caller's thread writes them. A ``SummaryWriter`` has a thread of its own, which dies when the disk is
    full and then blocks the caller. Here a full disk costs a warning and the scalars of that time.

    Args:
        folder: RUN/tensorboard.
    """

    takes_pictures = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._first_step: int | None = 1
        self._writer: EventsWriter | None = None
        self._num_files = 0
        self._has_warned = False
        self._scalars = Scalars()

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if scalars := self._scalars.of(metrics):
            self._write(step, [scalar(tag, value) for tag, value in scalars.items()])
        if "pictures" in metrics:
            pictures: Mapping[str, np.ndarray] = metrics["pictures"]
            self._write(step, [image(tag, picture, dataformats="HWC") for tag, picture in pictures.items()])
        if "embeddings" in metrics:
            try:
                write_projector(metrics["embeddings"], self._folder)
            except OSError as error:
                self._warn(error)

    def rewind(self, step: int) -> None:
        """Begins a new file; TensorBoard shows nothing of earlier files after ``step``."""
        self.close()
        self._scalars.rewind()
        self._first_step = step + 1

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()

    def _write(self, step: int, summaries: Iterable[Summary]) -> None:
        is_new, first_step = self._writer is None, self._first_step
        before = set(self._folder.glob("*.tfevents.*")) if is_new else set()  # perhaps of an earlier start of the run
        try:
            writer = self._writer or self._open()
            for summary in summaries:
                writer.write_event(_event(step, summary=summary))
            writer.flush()
        except OSError as error:
            self._warn(error)
            # A record may be cut short, after which nothing in the file can be read. So the next record
            # goes to another file.
            self.close()
            if is_new:  # otherwise every attempt would leave a file
                with suppress(OSError):
                    for path in set(self._folder.glob("*.tfevents.*")) - before:
                        path.unlink()
                self._first_step = first_step

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            logger.warning("%s cannot be written: %s; training goes on", self._folder, error)
        self._has_warned = True

    def _open(self) -> EventsWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._num_files += 1
        # Files are named by the second, which two may share.
        suffix = f".{self._num_files}"
        writer = self._writer = EventsWriter(str(self._folder / "events"), suffix)
        if self._first_step is not None:
            start = SessionLog(status=SessionLog.START)
            writer.write_event(_event(self._first_step, session_log=start))
            writer.flush()
            self._first_step = None
        return writer


def _event(step: int, **content: object) -> Event:
    return Event(wall_time=time.time(), step=step, **content)
