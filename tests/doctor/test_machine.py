"""Checks of cores, memory, disks and limits, of figures that the test makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ray_dmml.doctor import machine
from ray_dmml.doctor.check import GIB, size

MEMINFO = "MemTotal:       16000 kB\nMemFree:          1000 kB\nMemAvailable:    12000 kB\nHugePages_Total:       0\n"


def test_amounts_are_short() -> None:
    assert [size(n) for n in (0, 64 * 2**20, 1.5 * GIB, 139 * GIB, 2000 * GIB)] == [
        *("0 MiB", "64 MiB", "1.5 GiB", "139 GiB", "2,000 GiB")
    ]


@pytest.mark.parametrize(
    ("usable", "present", "state", "message"),
    [
        (8, 8, "ok", "8 cores"),
        (4, 64, "ok", "4 of 64 cores: the container's quota, or the cores that this process is pinned to"),
        (1, 64, "note", "1 of 64 cores"),
        (1, 1, "note", "1 core"),
    ],
)
def test_cores(usable: int, present: int, state: str, message: str) -> None:
    check = machine.cores(usable, present)
    assert (check.state, check.message) == (state, message)


def test_more_threads_than_cores_are_a_note() -> None:
    """torch counts the cores of the host, and not the quota of the container."""
    assert machine.threads(4, None, 4).state == "ok"
    many = machine.threads(64, None, 4)
    assert many.state == "note" and many.advice is not None and "OMP_NUM_THREADS=4" in many.advice
    assert machine.threads(4, "64", 4).state == machine.threads(4, "64,2", 4).state == "note"
    assert machine.threads(4, "dynamic", 4).state == "ok"
    few = machine.threads(1, "1", 4)
    assert few.state == "ok" and "no more of the 4 cores" in few.message


@pytest.mark.parametrize(
    ("total", "available", "state"), [(16, 12, "ok"), (16, 3, "note"), (16, 0.7, "problem"), (1000, 40, "problem")]
)
def test_memory(total: float, available: float, state: str) -> None:
    """A note where the quickstart's two peers have no room, a problem where Ray kills peers."""
    check = machine.memory(int(total * GIB), int(available * GIB), is_limited=False)
    assert check.state == state and bool(check.advice) == (state != "ok")


def test_shared_memory_is_compared_with_the_object_store() -> None:
    """Docker gives 64 MiB by default; a quarter of the memory is as little, and half of it is enough."""
    docker = machine.shared_memory(2**26, 2**26, 32 * GIB)
    assert docker.state == "note" and "64 MiB" in docker.message
    assert docker.advice is not None and "docker run --shm-size=" in docker.advice
    assert machine.shared_memory(8 * GIB, 8 * GIB, 32 * GIB).state == "note"
    assert machine.shared_memory(16 * GIB, 16 * GIB, 32 * GIB).state == "ok"
    assert machine.shared_memory(16 * GIB, 1 * GIB, 32 * GIB).state == "note"  # others have filled it
    assert machine.shared_memory(50 * GIB, 12 * GIB, 1000 * GIB).state == "ok"  # Ray takes what there is


def test_limits_of_files_and_processes() -> None:
    """Ray raises the soft limit of open files itself, up to the hard one."""
    assert machine.open_files(1024, 2**20).state == "ok"
    low = machine.open_files(256, 1024)
    assert low.state == "note" and "1,024 files" in low.message
    assert machine.tasks(None, 0).state == "ok"
    assert machine.tasks(5000, 100).state == "ok"
    assert machine.tasks(1100, 400).state == "note"


def test_amounts_of_the_machine_are_read() -> None:
    assert machine.machine_memory(MEMINFO) == (16000 * 1024, 12000 * 1024)


def test_limits_of_a_container_are_read(tmp_path: Path) -> None:
    """Of control groups of version 2, of version 1, and of none. Files in memory that can be dropped count as free."""
    assert machine.container_memory(tmp_path) is None and machine.container_tasks(tmp_path) == (None, 0)
    new, old = tmp_path / "new", tmp_path / "old"
    for folder in (new, old / "memory", old / "pids"):
        folder.mkdir(parents=True)
    (new / "memory.max").write_text("max\n")
    (new / "memory.current").write_text("700\n")
    (new / "memory.stat").write_text("anon 300\ninactive_file 150\n")
    (new / "pids.max").write_text("max\n")
    (new / "pids.current").write_text("7\n")
    assert machine.container_memory(new) is None and machine.container_tasks(new) == (None, 0)
    (new / "memory.max").write_text("1000\n")
    (new / "pids.max").write_text("100\n")
    assert machine.container_memory(new) == (1000, 450) and machine.container_tasks(new) == (100, 7)
    (old / "memory/memory.limit_in_bytes").write_text("2000\n")
    (old / "memory/memory.usage_in_bytes").write_text("1900\n")
    (old / "memory/memory.stat").write_text("inactive_file 1\ntotal_inactive_file 20\n")
    (old / "pids/pids.max").write_text("50\n")
    (old / "pids/pids.current").write_text("5\n")
    assert machine.container_memory(old) == (2000, 120) and machine.container_tasks(old) == (50, 5)


def test_the_size_of_folders(tmp_path: Path) -> None:
    """What the disk holds: a sparse file counts with what was written, a link and a missing folder do not count."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/one").write_bytes(np.random.default_rng(0).bytes(2**20))
    with (tmp_path / "a/sparse").open("wb") as file:
        file.truncate(2**30)
    (tmp_path / "a/link").symlink_to("/")
    num_bytes, is_whole = machine.folder_size(tmp_path / "a", tmp_path / "missing")
    assert is_whole and 2**20 <= num_bytes < 2**21
    assert machine.folder_size(tmp_path / "a", within_s=-1.0) == (0, False)


def test_caches_name_their_folders(tmp_path: Path) -> None:
    """A folder that is not there yet is left out."""
    (tmp_path / "hub").mkdir()
    kept = [machine.Kept("ray-dmml", tmp_path / "none"), machine.Kept("hub", tmp_path / "hub")]
    check = machine.caches(kept, limit_gib=8)
    assert check.message == f"hub 0 MiB in {tmp_path}/hub" and set(check.facts) == {"hub"}
    assert machine.caches(kept[:1], limit_gib=8).message == "nothing is kept yet"
    assert machine.runs_folder(tmp_path).message.startswith(f"{tmp_path} has ")
