"""Checks of cores, memory, disks and limits of this machine or container."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ray_dmml.doctor.check import GIB, Check, counted, size

CGROUP = Path("/sys/fs/cgroup")

MIN_MEMORY = 4 * GIB
"""The two peers of the quickstart take about 2 GiB each."""

RAY_KILLS_AT = 0.95
"""Share of the memory in use at which Ray kills processes."""

OBJECT_STORE_SHARE, MAX_CAP = 0.3, 10 * 10**9
"""Ray's object store: the share of the memory that it takes, and the size up to which it falls back to the disk."""

MIN_OPEN_FILES = 4096  # Ray warns below
MIN_THREADS = 1000
MIN_DISK = 2 * GIB


def cores(usable: int, present: int) -> Check:
    """Cores of this process, and those of the machine."""
    facts = {"usable": usable, "present": present}
    message = counted(usable, "core") if usable == present else f"{usable} of {counted(present, 'core')}"
    if usable == 1:
        advice = "A run needs the core for all of its peers. Give the container or job more (docker run --cpus)."
        return Check(name="cores", state="note", message=message, advice=advice, facts=facts)
    if usable < present:
        message += ": the container's quota, or the cores that this process is pinned to"
    return Check(name="cores", state="ok", message=message, facts=facts)


def threads(torch_threads: int, omp_num_threads: str | None, cores: int) -> Check:
    """torch's own number of threads, which does not follow the quota of a container, and that of other libraries."""
    facts = {"torch": torch_threads, "OMP_NUM_THREADS": omp_num_threads}
    source = f"OMP_NUM_THREADS={omp_num_threads}" if omp_num_threads else "OMP_NUM_THREADS is not set"
    words = (omp_num_threads or "").split(",")  # one number a level of nesting
    started = max(torch_threads, int(words[0]) if words[0].isdecimal() else 0)
    message = f"a process starts {counted(started, 'thread')} ({source})"
    if started > cores:
        message += f" on {counted(cores, 'core')}, where they wait for each other"
        advice = f"Set OMP_NUM_THREADS={cores} for programs of your own. Peers that train set their threads themselves."
        return Check(name="threads", state="note", message=message, advice=advice, facts=facts)
    if torch_threads < cores and omp_num_threads:
        message += f": index and search use no more of the {counted(cores, 'core')}"
    return Check(name="threads", state="ok", message=message, facts=facts)


def memory(total: int, available: int, is_limited: bool) -> Check:
    """Bytes of the machine, or of the container where that has a limit."""
    of = "the container's limit" if is_limited else "the machine"
    message = f"{size(available)} of {size(total)} are free ({of})"
    facts = {"total": total, "available": available, "is_limited": is_limited}
    if available < (1 - RAY_KILLS_AT) * total:
        message += f"; Ray kills peers where more than {RAY_KILLS_AT:.0%} is in use"
        advice = "End other processes, or give the container more (docker run --memory)."
        return Check(name="memory", state="problem", message=message, advice=advice, facts=facts)
    if available < MIN_MEMORY:
        advice = "Each peer of the quickstart takes about 2 GiB. Train fewer peers, or free some memory."
        return Check(name="memory", state="note", message=message, advice=advice, facts=facts)
    return Check(name="memory", state="ok", message=message, facts=facts)


def shared_memory(total: int, free: int, memory: int, folder: str = "/dev/shm") -> Check:
    """Bytes of shared memory, and the memory of which Ray's object store takes a share."""
    message, facts = f"{folder} has {size(total)}, of which {size(free)} are free", {"total": total, "free": free}
    wanted = min(OBJECT_STORE_SHARE * memory, max(MAX_CAP, 0.95 * free))
    if free >= wanted:
        return Check(name="shared memory", state="ok", message=message, facts=facts)
    message += "; Ray's object store then lies on the disk, and view workers may find no room"
    advice = f"Give the container {size(max(wanted, 8 * GIB))} or more (docker run --shm-size=8g)."
    return Check(name="shared memory", state="note", message=message, advice=advice, facts=facts)


def open_files(soft: int, hard: int) -> Check:
    """Limits of files that a process may have open. Ray raises the soft limit to at most 65536."""
    reached = max(soft, min(hard, 65536))
    message, facts = f"a process may open {reached:,} files", {"soft": soft, "hard": hard}
    if reached >= MIN_OPEN_FILES:
        return Check(name="open files", state="ok", message=message, facts=facts)
    advice = "Raise the limit: ulimit -n 65536, or docker run --ulimit nofile=65536. Connections of Ray may fail."
    return Check(name="open files", state="note", message=message, advice=advice, facts=facts)


def tasks(limit: int | None, used: int) -> Check:
    """Processes and threads that a container may have, and has."""
    facts = {"limit": limit, "used": used}
    if limit is None:
        return Check(name="processes", state="ok", message="no limit of the container", facts=facts)
    message = f"the container may have {limit:,} processes and threads, and has {used:,}"
    if limit - used >= MIN_THREADS:
        return Check(name="processes", state="ok", message=message, facts=facts)
    advice = "Raise the limit (docker run --pids-limit=-1). A private Ray starts many threads."
    return Check(name="processes", state="note", message=message, advice=advice, facts=facts)


def runs_folder(folder: Path) -> Check:
    """The folder below which a run is written by default."""
    free = shutil.disk_usage(folder).free
    message, facts = f"{folder} has {size(free)} free", {"folder": str(folder), "free": free}
    if not os.access(folder, os.W_OK):
        message, advice = f"{folder} cannot be written", "Give each run a folder with --out."
        return Check(name="runs", state="note", message=message, advice=advice, facts=facts)
    if free < MIN_DISK:
        advice = "Free some space, or write runs elsewhere with --out: each keeps two checkpoints or more."
        return Check(name="runs", state="note", message=message, advice=advice, facts=facts)
    return Check(name="runs", state="ok", message=message, facts=facts)


@dataclass(frozen=True)
class Kept:
    """A folder of files that are kept for later runs."""

    what: str
    folder: Path


def caches(folders: Sequence[Kept], limit_gib: float, within_s: float = 1.0) -> Check:
    """The size of caches, as far as it can be added up in time.

    Args:
        folders: the first one is ray-dmml's own.
        limit_gib: of the cache of decoded images.
        within_s: time for each of them.
    """
    parts, facts, short = [], {}, []
    for kept in folders:
        if not kept.folder.is_dir():
            continue
        num_bytes, is_whole = folder_size(kept.folder, within_s=within_s)
        parts.append(f"{kept.what} {'' if is_whole else 'over '}{size(num_bytes)} in {kept.folder}")
        facts[kept.what] = {"folder": str(kept.folder), "bytes": num_bytes, "is_whole": is_whole}
        free = shutil.disk_usage(kept.folder).free
        if free < MIN_DISK:
            short.append(f"{kept.folder} has {size(free)} free")
    message = "; ".join([*parts, *short]) or "nothing is kept yet"
    if not short:
        return Check(name="caches", state="ok", message=message, facts=facts)
    advice = (
        "Move them to another disk by XDG_CACHE_HOME, HF_HOME and TORCH_HOME, or delete them. A run keeps at most "
        f"{limit_gib:g} GiB of decoded images (data.cache_gib)."
    )
    return Check(name="caches", state="note", message=message, advice=advice, facts=facts)


def folder_size(*folders: Path, within_s: float = 1.0) -> tuple[int, bool]:
    """Bytes on the disk of all files below folders, and whether there was time for all of them. What cannot be read is
    left out."""
    until, total, waiting = time.monotonic() + within_s, 0, list(map(str, folders))
    while waiting:
        if time.monotonic() > until:
            return total, False
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    total += 512 * entry.stat(follow_symlinks=False).st_blocks
    return total, True


def machine_memory(meminfo: str) -> tuple[int, int]:
    """Total and available bytes, from the text of /proc/meminfo."""
    amounts = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.splitlines() if ":" in line}
    return amounts["MemTotal"], amounts["MemAvailable"]


def container_memory(root: Path = CGROUP) -> tuple[int, int] | None:
    """The container's limit and what is left of it, in bytes; None: it has no limit. Files that the system can drop
    from memory do not count. Control groups of both versions are read."""
    for limit_file, used_file, stat_file, key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        *[
            (
                "memory/memory.limit_in_bytes",
                "memory/memory.usage_in_bytes",
                "memory/memory.stat",
                "total_inactive_file",
            )
        ],
    ):
        with suppress(OSError, ValueError):  # "max": no limit
            limit, used = (int((root / file).read_text()) for file in (limit_file, used_file))
            stat = dict(line.split() for line in (root / stat_file).read_text().splitlines())
            return limit, max(0, limit - used + int(stat.get(key, 0)))
    return None


def container_tasks(root: Path = CGROUP) -> tuple[int | None, int]:
    """The container's limit of processes and threads, and how many it has. None: it has no limit."""
    for folder in (root, root / "pids"):
        with suppress(OSError, ValueError):
            return int((folder / "pids.max").read_text()), int((folder / "pids.current").read_text())
    return None, 0
