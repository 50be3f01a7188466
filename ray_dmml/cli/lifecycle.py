"""How a command starts, how Ctrl-C and SIGTERM stop it, and which command resumes what it did."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from threading import Thread

import typer
from rich.console import Console

from ray_dmml.cli.output import print_line
from ray_dmml.errors import Interrupted


@contextmanager
def ray_and_torch() -> Iterator[None]:
    """A Ray session for the length of the block, with torch imported meanwhile. Each of them takes seconds.

    Raises:
        UserError: the cluster cannot be joined.
    """
    from ray_dmml.ray_backend.session import ray_session

    loading = Thread(target=import_module, args=("ray_dmml.training.run",))
    loading.start()
    try:
        with ray_session():
            loading.join()
            yield
    finally:
        loading.join()  # Python cannot exit during an import of torch.


class Interruptible:
    """A block that ends, when it is interrupted, with the command that resumes it and the exit code of the signal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._received = 0
        self._resume = ("", Path())

    def resume_with(self, command: str, file: Path) -> None:
        """The command resumes what the block has done, once the file exists."""
        self._resume = command, file

    def listen(self) -> None:
        """From now on the first signal lets the run stop after its step, and the second one ends the process. Before
        that, every signal ends the process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def should_stop(self) -> bool:
        return self._received != 0

    def _handle(self, number: int, frame: object) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = number
        with suppress(RuntimeError):  # the signal interrupted another print
            print_line(self._console, "stopping after this step, with a checkpoint; a second signal stops at once")

    def __enter__(self) -> Interruptible:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, Interrupted):
            print_line(self._console, str(error))
        if isinstance(error, (KeyboardInterrupt, Interrupted)):
            command, file = self._resume
            hint = f"; resume with: {command}" if command and file.exists() else ""
            print_line(self._console, f"interrupted{hint}")
            raise typer.Exit(128 + (self._received or signal.SIGINT)) from None  # as in a shell
