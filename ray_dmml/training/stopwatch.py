"""Where the time of a run goes, in the process that drives it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Adds up the seconds of each phase of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """The time inside the block, however it ends, is of this phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - began)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def results(self, of_peers: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """What results.json says of the time: phases of the run, and of the steps of each peer."""
        return {
            "run": {phase: round(seconds, 2) for phase, seconds in self.seconds.items()},
            "peers": {
                name: {phase: round(seconds, 2) for phase, seconds in phases.items() if seconds}
                for name, phases in of_peers.items()
            },
        }
