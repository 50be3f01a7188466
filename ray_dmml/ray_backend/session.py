"""The Ray session of a run: the one this process is in, a cluster's, or a private one."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from ray_dmml.cores import num_cores
from ray_dmml.errors import UserError

TOKEN_HINT = (
    "set RAY_AUTH_MODE=token, and the cluster's own token in RAY_AUTH_TOKEN, in the file that "
    "RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
)

CONNECT_S = 10.0
"""Seconds until a cluster that does not answer is reported."""


@contextmanager
def ray_session() -> Iterator[None]:
    """Ray for the length of the block: the session this process is in, or the cluster that
    RAY_ADDRESS names, or else a private one on this machine.

    Raises:
        UserError: the cluster cannot be joined.
    """
    if ray.is_initialized():
        yield
        return
    _start_ray()
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray() -> None:
    # Ray reports usage to its makers unless told otherwise; a user who wants that says so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # What a peer raises because another was lost is told once, by us.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    address = os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    _require_token_file()
    if address:
        _require_reachable(address)
        _require_accepted(address)
        try:
            ray.init(address=address, **settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            # A client is told nothing of a token that it lacks: it waits until it gives up.
            hint = f"; if the cluster has a token: {TOKEN_HINT}" if "ray://" in address else ""
            raise UserError(f"RAY_ADDRESS {address} cannot be joined: {error}{hint}") from None
    else:
        # "local": without it Ray would join any cluster that was left in the temp folder.
        ray.init("local", num_cpus=num_cores(), include_dashboard=False, **settings)


def _require_token_file() -> None:
    """Ray itself ends the process, with a list of addresses in memory."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE") == "token" and path and not os.path.isfile(path):
        raise UserError(
            f"RAY_AUTH_TOKEN_PATH {path} is not a file: it must hold the cluster's token"
        )


def _require_accepted(address: str) -> None:
    """Ray itself tries for 20 seconds and does not say why."""
    _, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        return
    try:
        GcsClient(address=address)
    except AuthenticationError:
        raise UserError(f"RAY_ADDRESS {address} does not accept this token: {TOKEN_HINT}") from None


def _require_reachable(address: str) -> None:
    """Ray itself tries for minutes, in silence."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto", "local": Ray knows at once
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS {address} does not answer ({error}); unset it to run on this machine"
        ) from None


def only_at(node_id: str) -> dict[str, float]:
    """A resource that the node has for nobody but those who are to be at its address."""
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id)
    own = [kind for kind in resources if kind.startswith("node:") and "__" not in kind]
    return {own[0]: 0.001} if own else {}
