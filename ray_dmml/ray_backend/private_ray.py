"""A private Ray on this machine: its token, and what its workers import."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.job_config import JobConfig


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
