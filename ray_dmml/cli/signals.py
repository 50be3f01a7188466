"""Ctrl-C and SIGTERM: how a command stops, and which command resumes what it did."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer
from rich.console import Console

from ray_dmml.cli.output import print_line
from ray_dmml.errors import Interrupted
from ray_dmml.training.run_dir import RunDir


class Signals:
    """The signals of a run: the first one stops it after its step, the second one ends the process."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.run: Path | None = None
        """The folder of the run, once it is known."""

        self.received = 0
        """The first signal; 0: none."""

    def listen(self) -> None:
        """The run can stop from now on. Before that, every signal ends the process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def should_stop(self) -> bool:
        return self.received != 0

    def _handle(self, number: int, frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        with suppress(RuntimeError):  # the signal interrupted another print
            print_line(
                self._console,
                "stopping after this step, with a checkpoint; a second signal stops at once",
            )

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal, as in a shell."""
        return 128 + (self.received or signal.SIGINT)


@contextmanager
def interruptible_run(console: Console) -> Iterator[Signals]:
    """An interrupted run ends with the command that resumes it, and the exit code of its signal."""
    signals = Signals(console)
    try:
        yield signals
    except (KeyboardInterrupt, Interrupted) as end:
        if isinstance(end, Interrupted):
            print_line(console, str(end))
        if signals.run is not None and RunDir(signals.run).checkpoints.index():
            print_line(console, f"interrupted; resume with: ray-dmml train --resume {signals.run}")
        else:
            print_line(console, "interrupted")
        raise typer.Exit(signals.exit_code) from None


@contextmanager
def interruptible_search(console: Console, folder: Path) -> Iterator[None]:
    """An interrupted search ends with the command that resumes it, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        has_begun = (folder / "search.yaml").exists()
        hint = f"; resume with: ray-dmml tune --resume {folder}" if has_begun else ""
        print_line(console, f"interrupted{hint}")
        raise typer.Exit(128 + signal.SIGINT) from None
