"""Rows `input` and `input-cached`: JPEG files to the normalised views of four peers, on one core."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.jpegs import write_classes
from benchmarks.row import Goal, Row, Settings, in_turn
from benchmarks.worker import Worker

NUM_PEERS, NUM_IMAGES, SIDE = 4, 64, 500


def _rates(settings: Settings, which: str) -> tuple[list[float], list[float]]:
    """Images a second, of ours and of the plain pipeline; an image is one file and four views."""
    with TemporaryDirectory(prefix="benchmark-") as name:
        photographs, cache = Path(name) / "photographs", Path(name) / "cache"
        write_classes(photographs, 1, NUM_IMAGES, SIDE, SIDE)
        with (
            Worker("our_input", str(photographs), str(cache), which) as ours,
            Worker("plain_input", str(photographs)) as plain,
        ):

            def rate(worker: Worker) -> float:
                worker.ask(NUM_PEERS)
                return float(worker.answer()["images_per_s"])

            for worker in (ours, plain):  # the first batch of a process is slower
                rate(worker)
            return in_turn(settings.rounds, lambda: rate(ours), lambda: rate(plain))


def input_row(settings: Settings) -> list[Row]:
    """Images that nobody has read before: who comes first decodes, and fills the cache."""
    a, b = _rates(settings, "fresh")
    what = "500 px JPEGs to 4 peers' views of 224 px / each with PIL and torchvision"
    return [Row("input", what, "images/s/core", a, b, Goal("A/B", ">=", 3))]


def input_cached(settings: Settings) -> list[Row]:
    """From the second epoch on."""
    a, b = _rates(settings, "kept")
    what = "the same from the cache"
    return [Row("input-cached", what, "images/s/core", a, b, Goal("A/B", ">=", 5))]
