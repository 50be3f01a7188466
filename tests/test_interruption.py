"""A signal ends the process and those that it has started, whatever the main thread does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

PROGRAM = """
import ctypes, subprocess, sys, time
from ray_dmml import interruption
interruption.watch()
{first}
pipes = {{"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}}
child = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], text=True, **pipes)
with interruption.at_end(lambda: print("cleaned up", flush=True)):
    print(child.pid, child.stdout.readline().strip(), flush=True)
    {body}
print("went on", flush=True)
"""

DEADLOCK = "mutex = (ctypes.c_char * 64)(); [ctypes.CDLL(None).pthread_mutex_lock(mutex) for _ in range(2)]"
"""A call of another language that no signal ends."""

IMPORT = "exec('try:\\n  time.sleep(60)\\nexcept BaseException:\\n  raise ImportError')"

SLOW = "with interruption.at_end(lambda: time.sleep(0.8)): time.sleep(60)"

FORK = (
    "import os; r, w = os.pipe(); child = os.fork() or (os.write(w, b'.'), time.sleep(60)); os.read(r, 1); "
    "os.kill(child, 15); print('child', os.waitpid(child, 0)[1], flush=True); time.sleep(0.7)"
)


def run(body: str, *numbers: signal.Signals, first: str = "") -> tuple[int, str, list[int]]:
    """Exit code, output, and the children that are left."""
    command = [sys.executable, "-c", PROGRAM.format(body=body, first=first)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    for number in numbers:
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.3)
    output, _ = process.communicate(timeout=60)
    left = [pid for pid in pids if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return process.returncode, output, left


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("body", [DEADLOCK, IMPORT])
def test_a_signal_ends_everything(number: signal.Signals, body: str) -> None:
    """With its exit code, no traceback, the clean-up done, and no child left."""
    assert run(body, number) == (128 + number, "cleaned up\n", [])


def test_the_first_signal_can_be_outlived_and_the_second_one_not() -> None:
    """The clean-up has its time, and a signal to a forked child is none to this process."""
    patient = "interruption.outlive_first(lambda: print('first', flush=True))"
    code, output, left = run("time.sleep(60)", signal.SIGINT, signal.SIGTERM, first=patient)
    assert (code, output, left) == (128 + signal.SIGTERM, "first\ncleaned up\n", [])
    code, output, left = run(DEADLOCK, signal.SIGINT, signal.SIGINT, first=patient)
    # The first one may come before the call that no signal ends.
    assert (code, output.removeprefix("first\n"), left) == (128 + signal.SIGINT, "cleaned up\n", [])
    code, output, _ = run("time.sleep(2)", signal.SIGINT, first=patient)
    assert (code, output) == (0, "first\nwent on\n")
    assert run(SLOW, signal.SIGINT) == (128 + signal.SIGINT, "cleaned up\n", [])
    code, output, _ = run(FORK)
    assert (code, output) == (0, f"child {signal.SIGTERM:d}\nwent on\n")
