"""Starts a search service on Ray, and writes its configuration for `serve deploy`."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions

from ray_dmml import interruption
from ray_dmml.config import yamlio
from ray_dmml.cores import num_cores
from ray_dmml.errors import UserError
from ray_dmml.ray_backend.session import ray_session
from ray_dmml.serve.deployment import build
from ray_dmml.serve.searcher import Searcher
from ray_dmml.serve.settings import ServeSettings

APP = "ray-dmml"
KEEP_ALIVE_S = 30
REQUEST_TIMEOUT_S = 120.0
"""For all of a request, whatever happens."""
START_TIMEOUT_S = 60
"""For the HTTP proxy. Ray kills one that is not ready within 5 s, which a busy machine needs for its imports."""


def serve_forever(settings: ServeSettings, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serves until a signal ends the process.

    Args:
        settings: what is served.
        host: the address to listen on.
        port: 0 takes a free one.
        on_ready: is called with the address of the page once searches are answered.

    Raises:
        UserError: an index or the run cannot be used, the port is taken, or Ray cannot start the service.
    """
    port = _free_port(host, port)
    is_private = not os.environ.get("RAY_ADDRESS")
    if is_private and settings.min_replicas > num_cores():
        raise UserError(f"{settings.min_replicas} replicas need as many cores, and this machine has {num_cores()}")
    _check(settings)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    stopped = threading.Event()
    if not is_private:  # what runs on a cluster does not end with this process
        interruption.outlive_first(stopped.set)
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(START_TIMEOUT_S))  # a private Ray inherits it
    with ray_session():
        try:
            serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(**_http_options(host, port)))
            serve.run(build(settings), name=APP, route_prefix="/")
        except (RuntimeError, TimeoutError, RayError) as error:
            raise UserError(f"Ray cannot start the service: {str(error).splitlines()[0]}") from error
        try:
            shown = f"[{host}]" if ":" in host else host
            on_ready(f"http://{shown}:{port}/")
            stopped.wait()
        finally:
            interruption.outlive_first(None)
            serve.delete(APP)
    if number := interruption.received():
        interruption.end(number)


def write_config(file: Path, settings: ServeSettings, host: str, port: int) -> None:
    """Writes the serve.yaml of the service. Raises UserError if the file exists, or as :func:`serve_forever` does."""
    _check(settings)
    args = settings.model_dump(exclude_defaults=True) | {"indexes": settings.indexes}
    application = {
        "name": APP,
        "route_prefix": "/",
        "import_path": f"{build.__module__}:{build.__name__}",
        "args": args,
    }
    content = {
        "proxy_location": "EveryNode",
        "http_options": _http_options(host, port),
        "applications": [application],
    }
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(yamlio.dump(content))
    except FileExistsError:
        raise UserError(f"{file} already exists; give another file (--write-config)") from None
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


def _check(settings: ServeSettings) -> None:
    """Raises what is wrong with an index or the run here, before Ray starts."""
    Searcher(settings.indexes, settings.run, trust_code=settings.trust_code)


def _http_options(host: str, port: int) -> dict[str, Any]:
    return {
        "host": host,
        "port": port,
        "keep_alive_timeout_s": KEEP_ALIVE_S,
        "request_timeout_s": REQUEST_TIMEOUT_S,
    }


def _free_port(host: str, port: int) -> int:
    """The port, or for 0 a free one. Ray Serve would share one with another service of Ray."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"port {port} of {host} cannot be used: {reason}; give another one (--port)") from None
