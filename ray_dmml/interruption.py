"""How Ctrl-C and SIGTERM end a command: at any moment, within seconds, and with nothing left behind.

No exception is raised for a signal. Imports and libraries would turn it into another exception, print it or wait for
it. The handler ends the process itself, with the processes that it has started. Python calls the handler in the main
thread, which may be in a long call of another language. Then a thread of this module ends the process instead.

Only commands watch for signals. A program that imports the package keeps its own handlers.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 0.5
"""Time after which the thread ends the process if the handler has not begun to."""
CLEAN_UP_S = 2.0
"""Time that the handler has for the callbacks once it has begun."""

_callbacks: list[Callable[[], None]] = []
_on_first: Callable[[], None] | None = None  # None: the first signal ends the process, too
_received = 0  # the number of the first signal; 0: there was none
_is_ending = False
_is_watching = False


def watch() -> None:
    """From now on, signals end this process. Its forked children have Python's own handlers."""
    global _is_watching
    _is_watching = True
    os.register_at_fork(after_in_child=_leave)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_make_sure, args=(reading,), daemon=True).start()
    for number in SIGNALS:
        signal.signal(number, _handle)


def is_watching() -> bool:
    """Whether :func:`watch` was called."""
    return _is_watching


def received() -> int:
    """The number of the first signal that the process has outlived; 0: there was none."""
    return _received


def outlive_first(on_first: Callable[[], None] | None) -> None:
    """From now on the first signal calls ``on_first`` and the second one ends the process. None: the first one ends it
    again."""
    global _on_first
    _on_first = on_first


@contextmanager
def at_end(callback: Callable[[], None]) -> Iterator[None]:
    """If a signal ends the process within the block, the callback is called first. It may use nothing that another
    thread could hold, such as a console."""
    _callbacks.append(callback)
    try:
        yield
    finally:
        _callbacks.remove(callback)


def end(number: int) -> None:
    """Ends the process as a signal does, with the exit code that a shell gives it."""
    global _is_ending
    is_first, _is_ending = not _is_ending, True
    _kill_descendants()
    if is_first:
        _restore_terminal()
        for callback in reversed(_callbacks):
            with suppress(Exception):
                callback()
    _kill_descendants()  # the other threads went on
    os._exit(128 + number)


def _handle(number: int, frame: object) -> None:
    global _received
    if _is_ending:
        return
    if _on_first is None or _received:
        end(number)
    _received = number
    if _on_first is not None:
        _on_first()


def _leave() -> None:
    """A signal to a forked child must not reach this process through the pipe that both have."""
    global _is_watching
    _is_watching = False
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _make_sure(reading: int) -> None:
    """The thread. Python writes the number of each signal to its pipe at once, whatever the main thread does."""
    num_signals = 0
    while True:
        number = os.read(reading, 1)[0]
        if number not in SIGNALS:
            continue
        num_signals += 1
        time.sleep(GRACE_S)
        if num_signals > 1 or not (_received or _on_first):
            if _is_ending:
                time.sleep(CLEAN_UP_S)
            end(number)


def _restore_terminal() -> None:
    """Shows the cursor, which a live display hides, and begins a line."""
    for file in (1, 2):
        with suppress(OSError):
            if os.isatty(file):
                os.write(file, b"\x1b[?25h\n")
                return


def _kill_descendants() -> None:
    """Kills all processes that this one has started, and those that they have started. They are stopped first, so that
    none starts another one meanwhile. Systems without /proc leave that to Ray."""
    stopped: set[int] = set()
    while new := _descendants() - stopped:
        for pid in new:
            with suppress(OSError):
                os.kill(pid, signal.SIGSTOP)
        stopped |= new
    for pid in stopped:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _descendants() -> set[int]:
    children: dict[int, list[int]] = {}
    with suppress(OSError):
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                pid = int(entry.name)
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    children.setdefault(int(parent), []).append(pid)
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        below = set(children.get(waiting.pop(), ())) - found
        found |= below
        waiting += below
    return found
