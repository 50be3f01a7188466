"""How many cores there are, and how many of them faiss takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss


def num_cores() -> int:
    """Cores that this process may use: those it is pinned to, and no more than its container's share."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such container, or "max": no limit
        return cores


@contextmanager
def faiss_on_all_cores() -> Iterator[None]:
    """Inside the block faiss takes every core, whatever a training beside it has set.

    The last bit of its similarities varies with the number of threads, so a result is the same
    again only on the same number.
    """
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_cores())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
