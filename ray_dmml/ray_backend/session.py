"""The Ray session of a run: that of this process, a cluster's, or a private one."""

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
    "set RAY_AUTH_MODE=token and give the cluster's token in RAY_AUTH_TOKEN, in a file named by "
    "RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
)

CONNECT_TIMEOUT_S = 10.0
"""A cluster that does not answer within this time is reported."""


@contextmanager
def ray_session() -> Iterator[None]:
    """Connects to Ray for the length of the block.

    This is the session of this process if there is one, or the cluster of RAY_ADDRESS, or else a private Ray
    on this machine, which ends with the block.

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
    # Ray reports usage to its developers by default. A user may set this variable to 1.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # When a peer is lost, Ray would print the errors of all others; we report the loss once.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    _require_token_file()
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # Without "local" Ray would join any cluster that was left in the temporary folder.
        ray.init("local", num_cpus=num_cores(), include_dashboard=False, **settings)
        return
    _require_reachable(address)
    _require_accepted(address)
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        # Ray's client does not say that a token is missing. It waits until it gives up.
        hint = f"; if the cluster has a token: {TOKEN_HINT}" if "ray://" in address else ""
        raise UserError(f"RAY_ADDRESS {address} cannot be joined: {error}{hint}") from None


def _require_token_file() -> None:
    """Without the file Ray would abort the process and print memory addresses."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE") == "token" and path and not os.path.isfile(path):
        raise UserError(f"RAY_AUTH_TOKEN_PATH {path} is not a file: it must contain the cluster's token")


def _require_reachable(address: str) -> None:
    """Ray would try for minutes and print nothing."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # Ray resolves "auto" and "local" at once.
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS {address} does not answer ({error}); unset it to run on this machine") from None


def _require_accepted(address: str) -> None:
    """Ray would try a wrong token for 20 seconds and not give the reason."""
    _, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        return
    try:
        GcsClient(address=address)
    except AuthenticationError:
        raise UserError(f"RAY_ADDRESS {address} does not accept this token: {TOKEN_HINT}") from None


def only_at(node_id: str) -> dict[str, float]:
    """A resource that only this node has. Whatever asks for it runs there."""
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id)
    own = [kind for kind in resources if kind.startswith("node:") and "__" not in kind]
    return {own[0]: 0.001} if own else {}
