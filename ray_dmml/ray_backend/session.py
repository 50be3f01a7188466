"""The Ray session of a run: that of this process, a cluster's, or a private one."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import ray
import ray._private.ray_constants
import ray._private.utils
from ray._private.utils import DeferSigint
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from ray_dmml import interruption
from ray_dmml.cores import num_cores
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.private_ray import SafeJobConfig, own_token
from ray_dmml.ray_backend.session_folder import session_folder

_TOKEN_HINT = (
    "set RAY_AUTH_MODE=token and give the cluster's token in RAY_AUTH_TOKEN, in a file named by "
    "RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
)


@contextmanager
def ray_session() -> Iterator[None]:
    """Connects to Ray for the length of the block: in the session of this process if there is one, to the cluster of
    RAY_ADDRESS, or else to a private Ray on this machine, which ends with the block. Raises UserError if the cluster
    cannot be joined."""
    with ExitStack() as stack:
        if not ray.is_initialized():
            with _own_sigterm_handler(), _without_sigint():
                _start_ray(stack)
                stack.callback(ray.shutdown)
        yield


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """In a command, Ray sets no handlers of SIGTERM. One of them raises an exception wherever the process is, the other
    one prints memory addresses."""
    utils, constants = ray._private.utils, ray._private.ray_constants
    before = utils.set_sigterm_handler, constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER
    if interruption.is_watching():
        utils.set_sigterm_handler, constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = lambda handler: None, True
    try:
        yield
    finally:
        utils.set_sigterm_handler, constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = before


def _without_sigint() -> AbstractContextManager[Any]:
    """Ctrl-C in a program or a notebook waits for the end of the block, because half a start of Ray leaves processes. A
    command ends at once, with all its processes."""
    return nullcontext() if interruption.is_watching() else DeferSigint.create_if_main_thread()


def _start_ray(stack: ExitStack) -> None:
    # Ray reports usage to its developers by default. A user may set this variable to 1.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # When a peer is lost, Ray would print the errors of all others; we report the loss once.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    token = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE") == "token" and token and not os.path.isfile(token):
        # Ray would abort the process and print memory addresses.
        raise UserError(f"RAY_AUTH_TOKEN_PATH {token} is not a file: it must contain the cluster's token")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        settings |= {"include_dashboard": False, "_temp_dir": session_folder(), "job_config": SafeJobConfig()}
        stack.enter_context(own_token())
        try:
            # Without "local" Ray would join any cluster that was left in the temporary folder.
            ray.init("local", num_cpus=num_cores(), **settings)
        except Exception as error:  # Ray has no class of its own for this
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"Ray cannot be started on this machine: {reason}") from error
        return
    _require_answer(address)
    if "://" not in address:  # a client's job starts in the folder of its server
        settings["job_config"] = SafeJobConfig()
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        # Ray's client does not say that a token is missing. It waits until it gives up.
        hint = f"; if the cluster has a token: {_TOKEN_HINT}" if "ray://" in address else ""
        raise UserError(f"RAY_ADDRESS {address} cannot be joined: {error}{hint}") from None


def _require_answer(address: str) -> None:
    """Ray would try for minutes, or a wrong token for 20 seconds, and not give the reason."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # Ray resolves "auto" and "local" at once.
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
        if "://" not in address:
            GcsClient(address=address)
    except OSError as error:
        raise UserError(f"RAY_ADDRESS {address} does not answer ({error}); unset it to run on this machine") from None
    except AuthenticationError:
        raise UserError(f"RAY_ADDRESS {address} does not accept this token: {_TOKEN_HINT}") from None


def only_at(node_id: str) -> dict[str, float]:
    """A resource that only this node has. Whatever asks for it runs there."""
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id)
    own = [kind for kind in resources if kind.startswith("node:") and "__" not in kind]
    return dict.fromkeys(own[:1], 0.001)
