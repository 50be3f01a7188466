"""Memory of processes, from Linux's /proc."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

MIB = 1024


def resident(pid: int) -> dict[str, float]:
    """MiB of a process: ``rss``, ``pss`` (shared pages in equal parts), ``uss`` (its own pages)."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        fields[name.rstrip(":")] = float(value) / MIB
    own = fields["Private_Clean"] + fields["Private_Dirty"]
    return {"rss": fields["Rss"], "pss": fields["Pss"], "uss": own}


def peak_beyond(work: Callable[[], object]) -> float:
    """MiB by which this process's resident memory rises at most while ``work`` runs."""
    # What was freed before goes back to the system. Else the work uses it again, and its memory is not counted.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak()
    work()
    return peak() - before


def peak() -> float:
    """MiB of resident memory that this process had at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / MIB
    raise RuntimeError("/proc/self/status has no VmHWM")
