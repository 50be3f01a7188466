"""A private Ray on this machine: where its files are, its token, and what its workers import.

Ray keeps sockets and logs in ``$RAY_TMPDIR``, ``$TMPDIR`` or ``/tmp``, and a token in the home folder. Clusters and
containers often have such folders with names too long for a socket, or without the right to write.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.job_config import JobConfig

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


@contextmanager
def own_token() -> Iterator[None]:
    """Gives the Ray that starts in the block a token that only this process and its children know, unless the user has
    set one. Ray would write one into the home folder."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or os.environ.keys() & {
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
    }:
        yield
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_TOKEN"]
        loader.reset_cache()


class SafeJobConfig(JobConfig):
    """Workers import from the folders that this process imports from. Ray adds the working folder, which may be a
    folder of somebody's images: a ``profile.py`` in it would run in the place of Python's."""

    _py_driver_sys_path: list[str]  # Ray's own

    def _get_proto_job_config(self) -> Any:
        own = {os.path.abspath(folder) for folder in sys.path}
        self._py_driver_sys_path = [folder for folder in self._py_driver_sys_path if folder in own]
        return super()._get_proto_job_config()
