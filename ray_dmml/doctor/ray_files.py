"""Checks of what Ray needs: its folder, its sessions, and a cluster that the environment names."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_dmml.doctor.check import GIB, Check, State, counted, size
from ray_dmml.doctor.machine import folder_size
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.session_folder import session_folder

MIN_FREE = 1 * GIB
FULL = 0.95  # of a disk: Ray writes no objects to it any more
MAX_OLD = 1 * GIB
SOCKETS = Path("/proc/net/unix")


def temporary_folder(environment: Mapping[str, str]) -> tuple[Check, Path | None]:
    """The folder of Ray's sockets and logs, which a run would choose, too. None: there is none."""
    name = "temporary folder"
    try:
        folder = Path(session_folder())
    except UserError as error:
        return Check(name=name, state="problem", message=str(error)), None
    disk = shutil.disk_usage(folder)
    facts = {"folder": str(folder), "free": disk.free}
    message, notes, advice = f"{folder} has {size(disk.free)} free", [], []
    first = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp"
    if not folder.is_relative_to(first):
        notes.append(
            f"{first} cannot be used for Ray's sockets (its name is too long, it is full or cannot be written)"
        )
        advice.append("Set RAY_TMPDIR to a folder with a short name if the logs should be elsewhere.")
    if disk.free < MIN_FREE or disk.free < (1 - FULL) * disk.total:
        notes.append(f"{1 - disk.free / disk.total:.0%} of the disk is full")
        advice.append("Free some space, or set RAY_TMPDIR to a folder on another disk.")
    if hasattr(os, "ST_NOEXEC") and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        notes.append("no program can be run from it (noexec)")
        advice.append("For compile: true, set TORCHINDUCTOR_CACHE_DIR to a folder of another disk.")
    state: State = "note" if notes else "ok"
    return Check(
        name=name, state=state, message="; ".join([message, *notes]), advice=" ".join(advice) or None, facts=facts
    ), folder


@dataclass(frozen=True)
class Sessions:
    """What sessions of Ray have left in its folder."""

    folder: Path
    running: Sequence[str]
    """Names of those that run."""

    num_old: int
    old_bytes: int
    is_whole: bool = True
    """False: there was no time to add up everything."""


def sessions(found: Sessions) -> Check:
    """Old sessions are logs that nobody removes; one that runs takes cores."""
    facts = {"running": list(found.running), "old": found.num_old, "old_bytes": found.old_bytes}
    over = "" if found.is_whole else "over "
    message = f"{counted(found.num_old, 'old session')} in {found.folder} ({over}{size(found.old_bytes)})"
    advice = []
    if found.running:
        verb = "runs" if len(found.running) == 1 else "run"
        message = f"{counted(len(found.running), 'session')} {verb} here; {message}"
        advice.append(
            "Runs that start now share these cores. --address auto joins a cluster, but not the Ray of another run."
        )
    if found.old_bytes > MAX_OLD:
        advice.append(f"Remove the folders {found.folder}/session_2* of sessions that have ended.")
    state: State = "note" if advice else "ok"
    return Check(name="Ray's sessions", state=state, message=message, advice=" ".join(advice) or None, facts=facts)


def read_sessions(folder: Path, open_sockets: str, within_s: float = 1.0) -> Sessions:
    """Sessions in a folder of Ray.

    Args:
        open_sockets: text of /proc/net/unix. A session runs if one of its sockets is in it.
    """
    names = sorted(path.name for path in folder.glob("session_2*") if path.is_dir()) if folder.is_dir() else []
    paths = [line.split()[-1] for line in open_sockets.splitlines() if "/sockets/" in line]
    running = [name for name in names if any(f"/{name}/sockets/" in path for path in paths)]
    old = [folder / name for name in names if name not in running]
    num_bytes, is_whole = folder_size(*old, within_s=within_s)
    return Sessions(folder, running, len(old), num_bytes, is_whole)


def cluster(address: str, timeout_s: float = 2.0) -> Check:
    """The cluster that ``RAY_ADDRESS`` names. Runs join it, so that the other checks tell little about them."""
    name, facts = "RAY_ADDRESS", {"address": address}
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        message = f"{address}: runs join a Ray that runs on this machine"
        return Check(name=name, state="ok", message=message, facts=facts)
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except OSError as error:
        message, advice = f"{address} does not answer ({error})", "Unset RAY_ADDRESS to run on this machine."
        return Check(name=name, state="problem", message=message, advice=advice, facts=facts)
    message = f"{address} answers: runs join this cluster, and peers run on its nodes"
    return Check(name=name, state="ok", message=message, facts=facts)
