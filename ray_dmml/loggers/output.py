"""The console of all output for people."""

from __future__ import annotations

import os
from contextlib import suppress

from rich.console import Console as RichConsole


class Console(RichConsole):
    """It falls silent when the reader of its pipe is gone, as in ``ray-dmml train | head``; rich ends the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError, ValueError):  # what the file still holds must not fail when Python closes it
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())
            os.close(nowhere)


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
