"""Where the time of a peer's steps goes."""

from __future__ import annotations

import time

WAITING = "waiting for other peers"
PHASES = ("images and view", "embedding", "metric loss", WAITING, "mutual loss and update")
"""A step, in order. A GPU works on while the next phase begins: its time counts where something waits for it, which is
mostly the last phase."""


class PhaseClock:
    """Adds up the seconds of each phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()

    def start(self) -> None:
        """What came before is of no phase."""
        self._since = time.perf_counter()

    def stop(self, phase: str) -> None:
        """The phase ends, and the next one begins."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._since
        self._since = now
