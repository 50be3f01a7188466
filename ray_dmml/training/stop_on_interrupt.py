"""Ctrl-C and the stop button of a notebook, in a program that calls :func:`~ray_dmml.train`.

The run ends with a checkpoint, and the program goes on. A command ends its process instead, see
:mod:`~ray_dmml.interruption`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from ray_dmml.errors import Interrupted, Stopped
from ray_dmml.loggers.logger import Logger
from ray_dmml.training.run_dir import RunDir


class StopOnInterrupt(Logger):
    """A block in which SIGINT stops a run. It ends with :class:`~ray_dmml.errors.Stopped`, which says how to continue.

    While steps are made, the first SIGINT lets the run stop after its step, with a checkpoint. At other times there is
    nothing to save, and it raises at once, as a second SIGINT always does. As a logger of the run, the object follows
    how far the run is.

    Python calls handlers of signals in the main thread only. In another thread, or where the program has a handler of
    its own, nothing changes.

    Args:
        run_dir: the folder of the run.
        call: the Python code that resumes it.
        announce: shows a sentence.
        is_new: a run that stops before its first checkpoint leaves no folder.
    """

    def __init__(self, run_dir: RunDir, call: str, announce: Callable[[str], object], *, is_new: bool) -> None:
        self._run_dir, self._call, self._announce = run_dir, call, announce
        self._is_new, self._is_written = is_new, False  # the run's folder is this process's
        self._is_active = self._is_asked = False
        self._can_wait = False  # whether the run will ask should_stop

    def should_stop(self) -> bool:
        """For the run, which asks before each of its calls of the peers."""
        self._can_wait = True
        return self._is_asked

    def rewind(self, step: int) -> None:
        self._is_written = True

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if metrics.get("is_last") or "lost" in metrics:  # no step follows for long
            self._can_wait = False
            if self._is_asked:
                raise KeyboardInterrupt

    def __enter__(self) -> StopOnInterrupt:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._is_active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_active:
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, Interrupted) and self._is_asked):
            raise Stopped(self._explain(error)) from None

    def _handle(self, number: int, frame: object) -> None:
        if not self._can_wait or self._is_asked:
            raise KeyboardInterrupt
        self._is_asked = True
        with suppress(RuntimeError):  # the signal interrupted another print
            self._announce("stopping after this step, with a checkpoint; a second interrupt stops at once")

    def _explain(self, error: BaseException) -> str:
        if not self._run_dir.checkpoints.index():
            if self._is_new and self._is_written:
                self._run_dir.discard()
            return "stopped before the first step"
        if isinstance(error, Interrupted):
            return f"{error}; {self._call} continues the run"
        return f"stopped; {self._call} continues from the last checkpoint"
