"""How a command starts, how Ctrl-C and SIGTERM stop it, and which command resumes what it did."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import typer

from ray_dmml import interruption
from ray_dmml.cli.output import print_line
from ray_dmml.errors import Interrupted
from ray_dmml.loggers.logger import Logger
from ray_dmml.loggers.output import Console


@contextmanager
def ray_and_torch(console: Console) -> Iterator[None]:
    """A Ray session for the length of the block, with torch imported meanwhile. Each of them takes seconds.

    Raises:
        UserError: the cluster cannot be joined.
    """
    print_line(console, "connecting to the Ray cluster ..." if "RAY_ADDRESS" in os.environ else "starting Ray ...")
    from ray_dmml.ray_backend.session import ray_session

    loading = Thread(target=import_module, args=("ray_dmml.training.run",))
    loading.start()
    try:
        with ray_session():
            loading.join()
            yield
    finally:
        loading.join()  # Python cannot exit during an import of torch.


class Interruptible(Logger):
    """A block that a signal ends with the command that resumes it, and with the signal's exit code. As a logger of a
    run it follows how far the run is.

    While steps are made, the first signal lets the run stop after its step, with a checkpoint. Before the first step,
    after the last one and while lost peers are recovered there is nothing to save, and a signal ends the process at
    once.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stack = ExitStack()
        self._resume = ("", Path())
        self._discard: Callable[[], None] | None = None
        self._is_written = False  # the run's folder is this process's

    def resume_with(self, command: str, file: Path, discard: Callable[[], None] | None = None) -> None:
        """The command resumes what the block has done, once the file exists. ``discard`` removes what a run has
        written before that."""
        self._resume, self._discard = (command, file), discard

    def should_stop(self) -> bool:
        """For the run, which asks before each of its calls of the peers."""
        interruption.outlive_first(self._announce)
        return interruption.received() != 0

    def rewind(self, step: int) -> None:
        self._is_written = True

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if metrics.get("is_last"):
            self._end_at_once(f"stopped at step {step}, before the last evaluation")
        if "lost" in metrics:
            self._end_at_once("stopped because peers were lost; the checkpoint is older")

    def _end_at_once(self, message: str) -> None:
        """From now on, until the next step, signals do not wait; nor does one that has come before."""
        interruption.outlive_first(None)
        if interruption.received():
            raise Interrupted(message)

    def _announce(self) -> None:
        with suppress(RuntimeError):  # the signal interrupted another print
            print_line(self._console, "stopping after this step, with a checkpoint; a second signal stops at once")

    def _last_line(self) -> str:
        command, file = self._resume
        return f"interrupted; resume with: {command}" if command and file.exists() else "interrupted"

    def _end(self) -> None:
        """The process ends in mid-run: no console can be used any more."""
        with suppress(OSError):  # a reader of a pipe that is gone
            os.write(self._console.file.fileno(), f"{self._last_line()}\n".encode())
        if self._discard and self._is_written and not self._resume[1].exists():
            self._discard()

    @contextmanager
    def end_early(self) -> Iterator[None]:
        """A run that has stopped within the block ends the process there. Ray and torch take seconds to close."""
        try:
            yield
        except Interrupted as error:
            if not interruption.is_watching():
                raise
            print_line(self._console, str(error))
            interruption.end(interruption.received() or signal.SIGINT)

    def __enter__(self) -> Interruptible:
        self._stack.enter_context(interruption.at_end(self._end))
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._stack.close()
        if isinstance(error, Interrupted):
            print_line(self._console, str(error))
        if isinstance(error, (KeyboardInterrupt, Interrupted)):
            print_line(self._console, self._last_line())
            raise typer.Exit(128 + (interruption.received() or signal.SIGINT)) from None  # as in a shell
