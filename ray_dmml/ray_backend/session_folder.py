"""The folder of Ray's sockets and logs on this machine. This module loads no Ray.

Ray keeps them in ``$RAY_TMPDIR``, ``$TMPDIR`` or ``/tmp``. Clusters and containers often have such folders with names
too long for a socket, or without the right to write.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from ray_dmml.errors import UserError

MAX_SOCKET_BYTES = 103  # of a path, on any system
SOCKET = "/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"  # Ray's longest one
MIN_FREE_BYTES = 2**25  # for the logs of a session

logger = logging.getLogger(__name__)


def session_folder() -> str:
    """The folder of Ray's sockets and logs: Ray's own choice, or else the first of the system's temporary folders that
    can be used.

    Raises:
        UserError: there is none, or the one that RAY_TMPDIR names cannot be used.
    """
    asked = os.environ.get("RAY_TMPDIR")
    bases = [asked] if asked else [os.environ.get("TMPDIR") or "/tmp", "/tmp", "/var/tmp", "/dev/shm"]
    faults: dict[str, str] = {}
    for base in dict.fromkeys(bases):
        # Another user's folder may be closed to us.
        for folder in (f"{base}/ray", f"{base}/ray-{os.getuid()}"):
            fault = _fault(folder)
            if fault is None:
                if faults:
                    logger.info("Ray's files are in %s (%s)", folder, _described(faults))
                return folder
            faults[folder] = fault
    what = "RAY_TMPDIR cannot be used" if asked else "there is no folder for Ray's sockets and logs"
    raise UserError(f"{what} ({_described(faults)}): set RAY_TMPDIR to a folder with a short name and some space")


def _described(faults: dict[str, str]) -> str:
    return "; ".join(f"{folder}: {fault}" for folder, fault in faults.items() if not folder.endswith(f"-{os.getuid()}"))


def _fault(folder: str) -> str | None:
    """Why Ray cannot use a folder; None: it can."""
    num_bytes = len(os.fsencode(folder + SOCKET))
    if num_bytes > MAX_SOCKET_BYTES:
        return f"its name is {num_bytes - MAX_SOCKET_BYTES} bytes too long for a socket in it"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))
        if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
            return "the disk is full"
    except OSError as error:
        return error.strerror or str(error)
    return None
