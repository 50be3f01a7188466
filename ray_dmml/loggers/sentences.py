"""Shows what the package says through Python's :mod:`logging`, its level named from WARNING up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str], object]


@contextmanager
def show_sentences(show: Show, show_activity: Show | None = None) -> Iterator[None]:
    """Gives each sentence (INFO and above) to ``show``. Of nested blocks, the innermost gets it.

    Args:
        show: prints a sentence.
        show_activity: gets what the package does right now (DEBUG), if it is wanted.
    """
    package, handler = logging.getLogger("ray_dmml"), _Handler(show, show_activity)
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.DEBUG if show_activity else logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def as_lines(print_line: Show) -> Show:
    """For ``show_activity`` where nothing can be replaced: each activity is a line, the first time."""
    shown: set[str] = set()

    def show_activity(text: str) -> None:
        if text not in shown:
            shown.add(text)
            print_line(f"{text} ...")

    return show_activity


class _Handler(logging.Handler):
    def __init__(self, show: Show, show_activity: Show | None) -> None:
        super().__init__()
        self._show, self._show_activity = show, show_activity

    def emit(self, record: logging.LogRecord) -> None:
        blocks = [each for each in logging.getLogger("ray_dmml").handlers if isinstance(each, _Handler)]
        if blocks[-1] is not self:
            return
        text = record.getMessage()
        if record.levelno >= logging.INFO:
            self._show(text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}")
        elif self._show_activity:
            self._show_activity(text)
