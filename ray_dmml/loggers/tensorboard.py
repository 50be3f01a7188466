"""TensorBoard events of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events:
    """Scalars over the steps, in a file of their own since this run began or went on.

    They are written by the caller's thread. A ``SummaryWriter`` has one of its own, which dies where
    the disk is full, and then blocks whoever adds to its queue. Here that is told once, and what
    could not be written is missing in the plots.

    Args:
        folder: RUN/tensorboard.
        first_step: what earlier files have from this step on is not shown any more.
        note: is told what cannot be written.
    """

    def __init__(self, folder: Path, first_step: int, note: Callable[[str], None]) -> None:
        self._folder, self._note = folder, note
        self._first_step: int | None = first_step
        self._writer: EventsWriter | None = None
        self._num_files = 0
        self._is_told = False

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """So many scalars of a step, by tag."""
        is_new, first_step = self._writer is None, self._first_step
        try:
            writer = self._writer or self._open()
            for tag, value in values.items():
                writer.write_event(_event(step, summary=scalar(tag, value)))
            writer.flush()
        except OSError as error:
            if not self._is_told:
                self._note(f"{self._folder} cannot be written: {error}; training goes on")
            self._is_told = True
            # A record may be cut short, after which nothing of the file can be read: the next one
            # goes to another file.
            self.close()
            if is_new:  # one that would be made at every try
                with suppress(OSError):
                    for path in self._folder.glob(f"*.{self._num_files}"):
                        path.unlink()
                self._first_step = first_step

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()

    def _open(self) -> EventsWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._num_files += 1
        # Named by the second, which two may share.
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
