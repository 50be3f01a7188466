"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def num_cores() -> int:
    """Cores that this process may use: those it is pinned to, within its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # there is no such container, or "max": no quota
        return cores


def num_view_workers(configured: int | None, cpus: float, *, on_gpu: bool) -> int:
    """Processes that make the views of a peer.

    Args:
        configured: ``num_workers`` of the peer.
        cpus: the CPUs of the peer's process.
        on_gpu: whether its net is on a GPU, so that its CPUs are free for the views.
    """
    if configured is not None:
        return configured
    return max(0, int(cpus) - 1) if on_gpu else 0


def num_threads(cpus: float, num_workers: float, *, on_gpu: bool) -> int:
    """torch threads of a peer's process: its CPUs. On a CPU, they leave those of the view workers alone."""
    return max(1, int(cpus if on_gpu else cpus - num_workers))
